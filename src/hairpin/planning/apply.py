"""Attaching a plan to a model by hooks at its seams, and taking it off again.

The hooks hold no order: each knows from the plan in which state its tensors arrive, run and leave,
so they work when activation checkpointing runs a module again later. What they need besides are the
global sizes of the forward they belong to. Those are remembered by the storage of the tensor that
enters a stage, which checkpointing keeps, so that two forwards of different shapes may be under way
at once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten_with_path

from hairpin.comm.eager import eager
from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.verbs import Grad
from hairpin.errors import LayoutError, PlanError
from hairpin.layout import Pattern, solve_sizes
from hairpin.planning.axial.attach import AxialSplit, attach_axial, axial_plan_of, detach_axial
from hairpin.planning.axial.plan import AxialPlan
from hairpin.planning.hooks import drop_hooks
from hairpin.planning.loops.looped import attach_loops, detach_loops
from hairpin.planning.plan import CarriedTensor, Plan, Stage
from hairpin.planning.sequence.plan import SequencePlan
from hairpin.planning.sequence.routes import Route, route, unroute
from hairpin.planning.split.attachment import Attachment, LiveMover, Sizes
from hairpin.planning.split.dropout import GlobalDropout
from hairpin.planning.split.seam import bind, manner, stream_name


@dataclass(eq=False)
class _Hook:
    """A hook that belongs to an attachment; found again by its type."""

    attachment: Attachment


@dataclass(eq=False)
class _Carries(_Hook):
    """Marks a model whose plan has loops alone."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Nothing is done before such a model."""


@dataclass(eq=False)
class _BeforeModel(_Hook):
    """Learn the sizes of this forward, and make sure that all ranks are to do the same."""

    @eager
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment, plan = self.attachment, self.attachment.plan
        if module.training and not plan.training:
            raise PlanError(
                f"this {plan.model} is in train() but its plan was made in eval(), where dropouts "
                "do not show; plan again after model.train()"
            )
        if not attachment.other_lengths:
            plan.require_manner(manner(module, args, kwargs))
        attachment.mover.agree(lambda: _statement(plan, module, args, kwargs))
        attachment.current = input_sizes(plan.inputs, module, args, kwargs)
        attachment.left = None
        attachment.running = True


@dataclass(eq=False)
class _AfterModel(_Hook):
    """The forward is over, by its end or by an error."""

    @eager
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.attachment.running = False
        left = self.attachment.left
        if left is not None and output is not None:  # None: the forward ended in an error
            raise PlanError(
                f"this forward ended with its tensors split along '{left}': it left out the last "
                f"stage of the plan, '{self.attachment.plan.stages[-1].module}'; plan with an "
                "example that goes the same way"
            )


@dataclass(eq=False)
class _BeforeStage(_Hook):
    """Bring a stage's arguments into the layout it runs in."""

    stage: Stage

    @eager
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attachment, stage = self.attachment, self.stage
        attachment.require_arrival(stage)
        bound = bind(module, args, kwargs)
        name = stream_name(stage.module, stage.seam, bound)
        others = {n: bound[n] for n in stage.seam.args if isinstance(bound.get(n), Tensor)}
        sizes = attachment.sizes_at(stage, bound[name], others)
        if not attachment.other_lengths:
            attachment.plan.require_lengths(sizes)
        attachment.remember(bound[name], sizes)
        moved = {name: self._stream(bound[name], sizes)}
        moved |= {n: self._side(n, x, sizes) for n, x in others.items()}
        attachment.remember(moved[name], sizes)
        attachment.current = sizes
        return _rebind(module, args, kwargs, moved)

    def _stream(self, x: Tensor, sizes: Sizes) -> Tensor:
        attachment, stage = self.attachment, self.stage
        src = attachment.layout(stage.seam.stream, sizes, stage.arrive)
        dst = attachment.layout(stage.seam.stream, sizes, stage.held)
        return attachment.mover.move(x, src, dst, "partial")

    def _side(self, name: str, x: Tensor, sizes: Sizes) -> Tensor:
        """A side argument arrives whole, or already as the stage needs it."""
        attachment, stage = self.attachment, self.stage
        pattern = stage.seam.args[name]
        complete = _side_sizes(attachment, stage, name, x, sizes)
        dst = attachment.layout(pattern, complete, stage.held)
        if tuple(x.shape) == dst.local_shape_at(attachment.mover.coordinates(dst.axes)):
            return x
        return attachment.mover.move(x, attachment.layout(pattern, complete, None), dst, "partial")


@dataclass(eq=False)
class _AfterStage(_Hook):
    """Bring a stage's outputs into the layout in which the code after it uses them."""

    stage: Stage

    @eager
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        attachment, stage = self.attachment, self.stage
        bound = bind(module, args, kwargs)
        x = bound[stream_name(stage.module, stage.seam, bound)]
        sizes = attachment.recall(x)
        outputs = output if isinstance(output, tuple) else (output,)
        patterns = stage.seam.outputs
        if len(patterns) > len(outputs):
            raise PlanError(
                f"module '{stage.module}' gave {len(outputs)} outputs, its seam names "
                f"{len(patterns)}; correct `out` in the attends table"
            )
        rest = (None,) * (len(outputs) - len(patterns))
        attachment.left = stage.leave
        moved = tuple(
            self._out(index, out, pattern, sizes)
            for index, (out, pattern) in enumerate(zip(outputs, (*patterns, *rest), strict=True))
        )
        return moved if isinstance(output, tuple) else moved[0]

    def _out(self, index: int, out: Any, pattern: str | None, sizes: Sizes) -> Any:
        if pattern is None or not isinstance(out, Tensor):
            return out
        attachment, stage, axis = self.attachment, self.stage, self.attachment.plan.axis
        complete = attachment.solved(stage, stage.held, sizes, {pattern: out}, {})
        src = attachment.layout(pattern, complete, stage.held)
        dst = attachment.layout(pattern, complete, stage.leave if index == 0 else None)
        last = stage is attachment.plan.stages[-1] and dst.split_dim(axis) is None
        grad: Grad = attachment.plan.output_grad if last else "partial"
        moved = attachment.mover.move(out, src, dst, grad)
        if index == 0:
            attachment.remember(moved, complete)
        return moved


@dataclass(eq=False)
class _BeforeOwner(_Hook):
    """Let a module see its part of a parameter or buffer while it runs."""

    tensor: CarriedTensor

    @eager
    def __call__(self, module: nn.Module, args: Any) -> None:
        attachment, tensor = self.attachment, self.tensor
        name = tensor.name.rpartition(".")[2]
        module.__dict__.pop(name, None)
        whole = getattr(module, name)
        pattern = Pattern.parse(tensor.pattern)
        sizes = solve_sizes({f"'{tensor.name}'": (pattern, tuple(whole.shape))}, {})
        src = attachment.layout(tensor.pattern, sizes, None)
        dst = attachment.layout(tensor.pattern, sizes, tensor.held)
        module.__dict__[name] = attachment.mover.move(whole, src, dst, "partial")


@dataclass(eq=False)
class _AfterOwner(_Hook):
    """Give the module its whole parameter or buffer back."""

    tensor: CarriedTensor

    @eager
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(self.tensor.name.rpartition(".")[2], None)


def parallelize(
    model: nn.Module,
    plan: Plan | SequencePlan | AxialPlan,
    mesh: Mesh | DeviceMesh | None = None,
    *,
    other_lengths: bool = False,
    compile_bodies: bool = False,
    way: Route | None = None,
) -> nn.Module:
    """Split ``model`` over the mesh as ``plan`` says, and give blocks their loops.

    A sequence plan sends every attention of the model along that sequence over the ranks; it knows
    its mesh. An axial plan splits the stacks of a folding model.

    Returns the same model.

    The model's inputs and outputs stay whole and its ``state_dict`` is unchanged. Attach before
    wrapping in DDP, FSDP2 or ``torch.compile``. ``detach`` undoes it.

    Args:
        plan: from ``hp.plan`` or ``hp.Plan.load``.
        mesh: a live mesh; may be left out for a plan over one rank.
        other_lengths: allow lengths of the split dims that were not rehearsed. Only for a model
            whose code does not branch on them.
        compile_bodies: hand the body of each loop to ``torch.compile`` (once, for any chunk size);
            what it then holds is no longer certified to the byte.
        way: of a sequence plan: where a model that is not known is split and attends.

    Raises:
        SequenceError: no attention of the model can be sent over the ranks.
        PlanError: the plan is for another model or another number of ranks, or the model already
            carries a plan.
        MeshError: the mesh lacks the plan's axis, or is only a description.
    """
    if isinstance(plan, SequencePlan):
        return route(model, plan, way)
    degrees = plan.degrees if isinstance(plan, AxialPlan) else {plan.axis: plan.degree}
    mesh = Mesh(**dict.fromkeys(degrees, 1)) if mesh is None else as_mesh(mesh)
    if isinstance(plan, Plan):
        plan.require_model(model)
    require_bare(model)
    for axis, degree in degrees.items():
        if mesh.size(axis) != degree:
            raise PlanError(
                f"this plan splits over {degree} ranks of axis '{axis}', the mesh has "
                f"{mesh.size(axis)} there; plan again for this mesh"
            )
        mesh.group(axis)
    if isinstance(plan, AxialPlan):
        return attach_axial(model, AxialSplit(plan, mesh))
    attach_loops(
        model,
        plan.loops,
        plan.programs,
        compile_bodies=compile_bodies,
        drop=None if plan.origin is None else plan.origin.drop,
    )
    attachment = Attachment(plan, LiveMover(mesh, plan.axis), other_lengths)
    if plan.stages:
        attach(model, attachment)
    else:
        model.register_forward_pre_hook(_Carries(attachment))
    return model


def require_bare(model: nn.Module) -> None:
    """Raise if the model, or a module inside it, carries a plan.

    Raises:
        PlanError: naming the module.
    """
    for path, module in model.named_modules():
        if plan_of(module) is not None:
            what = f"module '{path}' of this" if path else "this"
            fix = "hp.detach on that module" if path else "hp.detach(model)"
            raise PlanError(
                f"{what} {type(model).__name__} already carries a plan; call {fix} first"
            )


def attach(model: nn.Module, attachment: Attachment) -> None:
    """Register the hooks of an attachment."""
    plan = attachment.plan
    modules = dict(model.named_modules())
    model.register_forward_pre_hook(_BeforeModel(attachment), with_kwargs=True, prepend=True)
    model.register_forward_hook(_AfterModel(attachment), always_call=True)
    for stage in {stage.module: stage for stage in plan.stages}.values():
        module = modules[stage.module]
        module.register_forward_pre_hook(_BeforeStage(attachment, stage), with_kwargs=True)
        module.register_forward_hook(_AfterStage(attachment, stage), with_kwargs=True)
    for tensor in plan.tensors:
        if tensor.held is not None:
            owner = modules[tensor.name.rpartition(".")[0]]
            owner.register_forward_pre_hook(_BeforeOwner(attachment, tensor))
            owner.register_forward_hook(_AfterOwner(attachment, tensor), always_call=True)
    for site in plan.dropouts:
        dropout = modules[site.module]
        dropout.__dict__["forward"] = GlobalDropout(dropout, site, attachment)


def detach(model: nn.Module) -> Plan | SequencePlan | AxialPlan | None:
    """Take a plan off a model and return it; None if it carries none."""
    other = unroute(model) or detach_axial(model)
    if other is not None:
        return other
    plan = plan_of(model)
    for module in model.modules():
        drop_hooks(module, _is_ours)
        if isinstance(module.__dict__.get("forward"), GlobalDropout):
            del module.__dict__["forward"]
    detach_loops(model)
    return plan


def _is_ours(hook: object) -> bool:
    return isinstance(hook, _Hook)


def plan_of(model: nn.Module) -> Plan | AxialPlan | None:
    """The plan that a model, or a stack of it, carries, or None."""
    axial = axial_plan_of(model)
    if axial is not None:
        return axial
    hooks: Sequence[object] = list(model._forward_pre_hooks.values())
    marks = (_BeforeModel, _Carries)
    return next((hook.attachment.plan for hook in hooks if isinstance(hook, marks)), None)


def input_sizes(
    patterns: Mapping[str, str], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """Sizes named by the patterns of the model's own arguments.

    Raises:
        PlanError: an argument that the patterns name has another shape or is missing.
    """
    bound = bind(module, args, kwargs)
    shapes = {}
    for name, pattern in patterns.items():
        if not isinstance(bound.get(name), Tensor):
            raise PlanError(
                f"attends names argument {name!r} of the model, which is no tensor in this call; "
                f"its arguments are {', '.join(bound) or 'none'}"
            )
        shapes[f"argument '{name}' of the model"] = (
            Pattern.parse(pattern),
            tuple(bound[name].shape),
        )
    try:
        return solve_sizes(shapes, {})
    except LayoutError as error:
        raise PlanError(str(error)) from error


def _side_sizes(attachment: Attachment, stage: Stage, name: str, x: Tensor, sizes: Sizes) -> Sizes:
    """``sizes`` completed by a side argument that arrives whole or as the stage runs."""
    pattern = Pattern.parse(stage.seam.args[name])
    label = f"argument '{name}' of module '{stage.module}'"
    failures = []
    for dim in (None, stage.held if stage.held in pattern.dims else None):
        local = attachment.local(sizes, dim, what=label)
        try:
            solved = solve_sizes({label: (pattern, tuple(x.shape))}, local)
            return {**solved, **({} if dim is None else {dim: sizes[dim]})}
        except LayoutError as error:
            failures.append(error)
    raise PlanError(
        f"{failures[0]}; it fits neither whole nor split along '{stage.held}'. Correct its pattern "
        "in the attends table"
    )


def _rebind(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], moved: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with the moved tensors in their places."""
    positional = list(bind(module, args, {}))
    new_args = tuple(moved.get(name, value) for name, value in zip(positional, args, strict=True))
    return new_args, {name: moved.get(name, value) for name, value in kwargs.items()}


def _drops(module: nn.Module) -> bool:
    return module.training and getattr(module, "p", 0.0) > 0.0


def _statement(plan: Plan, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What this rank is about to do, for comparison with the others."""
    leaves = tree_flatten_with_path((args, kwargs))[0]
    words = [
        f"{''.join(map(str, path))}: {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    words += [
        f"{''.join(map(str, path))}: {leaf!r}"
        for path, leaf in leaves
        if isinstance(leaf, (bool, int, float, str))
    ]
    mode = "training" if module.training else "eval"
    grad = "grad" if torch.is_grad_enabled() else "no grad"
    draws = ""
    if plan.draws or any(_drops(module.get_submodule(site.module)) for site in plan.dropouts):
        state = torch.get_rng_state().numpy().tobytes()
        draws = f"; CPU random state {hashlib.blake2b(state, digest_size=4).hexdigest()}"
    return f"inputs {'; '.join(words)}; {mode}, {grad}; plan {plan.digest}{draws}"
