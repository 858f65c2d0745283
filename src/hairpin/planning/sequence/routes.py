"""Attaching a sequence plan to a model: every attention along the sequence goes over the ranks.

Nothing of the model's code or of its library is changed. Modules of one model are given another
way to attend: our own by their forward, those of transformers by an attention implementation that
is registered beside the library's own, all others by watching for
``F.scaled_dot_product_attention`` while a named module runs.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.comm.agree import all_statements
from hairpin.comm.eager import eager
from hairpin.errors import SequenceError
from hairpin.exchange.api import attention
from hairpin.exchange.joint import joint_attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.port import Qkv
from hairpin.exchange.stream import put_together, take
from hairpin.kernels.routed import GatedLinearAttention, SoftmaxAttention
from hairpin.planning.hooks import drop_hooks
from hairpin.planning.sequence.counted import refuse_counted
from hairpin.planning.sequence.dropping import draw_seed, route_dropout, take_off_dropping
from hairpin.planning.sequence.mixing import (
    FEWEST,
    NoAnswer,
    Probe,
    Reached,
    copied,
    find_mixing,
    some_positions,
)
from hairpin.planning.sequence.patterns import unknown_pattern
from hairpin.planning.sequence.plan import SequencePlan
from hairpin.planning.sequence.watching import Watching

_MARK = "_hairpin_route"
_NAME = "hairpin"  # of the attention implementation in transformers
# What models hand to their attention that does not change what it computes.
_HARMLESS = {
    "cache_position", "deterministic", "labels", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Route:
    """Where a model's stream is split, and which of its modules attend along it.

    Patterns are module paths with ``*`` as in file names.

    Attributes:
        attention: modules that call ``F.scaled_dot_product_attention`` along the sequence.
        blocks: path of the list of blocks whose stream ``[b, s, c]``, their first argument, is
            split before the first and put together after the last; several lists that follow each
            other; None where the caller splits the batch (``plan.shard``).
        along: arguments of the blocks that go along the sequence too, and their dim.
        beside: where another stream, whole on every rank, stands in those attentions that have it
            in one sequence with the split one: ``"before"`` it or ``"after"`` it.
        output: which result of the last block is the split stream, where there are several.
    """

    attention: tuple[str, ...] = ()
    blocks: str | tuple[str, ...] | None = None
    along: Mapping[str, int] = field(default_factory=dict)
    beside: Literal["before", "after"] | None = None
    output: int = 0


# by the class that a library gives its model; whatever holds one of them is routed inside
_KNOWN: Mapping[str, Route] = {
    "transformers.models.vit.modeling_vit.ViTModel": Route(blocks="layers"),
    "timm.models.vision_transformer.VisionTransformer": Route(
        attention=("blocks.*.attn",), blocks="blocks"
    ),
    "diffusers.models.transformers.transformer_wan.WanTransformer3DModel": Route(
        attention=("blocks.*.attn1",), blocks="blocks", along={"rotary_emb": 1}
    ),
    "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel": Route(
        attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        blocks="transformer_blocks",
        beside="after",
        output=1,
    ),
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel": Route(
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        along={"image_rotary_emb": 0},
        beside="before",
        output=1,
    ),
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel": Route(
        attention=("transformer_blocks.*.attn1",),
        blocks="transformer_blocks",
        along={"image_rotary_emb": 0},
        beside="before",
    ),
    "hairpin.models.vit.model.ViT": Route(blocks="blocks"),
}


def route(model: nn.Module, plan: SequencePlan, way: Route | None = None) -> nn.Module:
    """Send every attention of ``model`` along the plan's sequence over the ranks.

    Args:
        way: where to, for a model that is not known.

    Raises:
        SequenceError: the model already has a route, or nothing in it can be routed.
    """
    if any(_MARK in module.__dict__ for module in model.modules()):
        raise SequenceError(
            f"this {type(model).__name__} already carries a sequence plan; call hp.detach(model) "
            "first"
        )
    refuse_counted(model, plan)
    attachment = Attached(plan)
    try:
        _route(model, attachment, way)
    except BaseException:
        _take_off(model)
        raise
    return model


def _route(model: nn.Module, attachment: "Attached", way: Route | None) -> None:
    prefix, way = (("", way) if way is not None else _known(model)) or ("", Route())
    attachment.mark(model)
    counts = [
        _route_own(model, attachment),
        _route_transformers(model, attachment),
        _route_named(model, prefix, way, attachment),
    ]
    if not sum(counts):
        raise SequenceError(
            f"no attention of this {type(model).__name__} can be routed: it has no hairpin "
            "SoftmaxAttention, is no model of transformers with an attention interface, and is not "
            "known; name its modules that call F.scaled_dot_product_attention with "
            "hp.Route(attention=['blocks.*.attn'])"
        )
    if way.blocks is not None:
        _route_stream(model, prefix, way, attachment)
    route_dropout(model, attachment.plan)
    first = _First(attachment, cuts=way.blocks is not None)
    model.register_forward_pre_hook(first, with_kwargs=True)


def unroute(model: nn.Module) -> SequencePlan | None:
    """Take a sequence plan off a model; None if it carries none."""
    attachment = model.__dict__.get(_MARK)
    if not isinstance(attachment, Attached):
        return None
    _take_off(model)
    return attachment.plan


def _take_off(model: nn.Module) -> None:
    """Take off what the modules of this model carry; a copy of it keeps its own."""
    for module in model.modules():
        attachment = module.__dict__.pop(_MARK, None)
        take_off_dropping(module)
        if isinstance(module.__dict__.get("forward"), _ROUTED):
            del module.__dict__["forward"]
        drop_hooks(module, lambda hook: isinstance(hook, _HOOKS))
        if isinstance(attachment, Attached) and attachment.before is not None:
            named: Any = module
            if _is_transformers(module) and named.config._attn_implementation == _NAME:
                named.set_attn_implementation(attachment.before)


class Attached:
    """One plan on one model.

    Attributes:
        before: attention implementation that a model of transformers had; None for other models.
        probe: of the run under way that looks for what mixes positions; None in every other call.
    """

    def __init__(self, plan: SequencePlan) -> None:
        self.plan = plan
        self.before: str | None = None
        self.probe: Probe | None = None

    def mark(self, module: nn.Module) -> None:
        """Let a module know the plan."""
        module.__dict__[_MARK] = self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention over the ranks; ``mask`` refines that of the plan."""
        if self.probe is not None:
            return self.probe.attend(q, k, v)
        if options.get("dropout"):
            options["seed"] = draw_seed()
        return attention(q, k, v, self.plan.split, **options)

    @property
    def held(self) -> int:
        """Positions of the split stream that this call is on."""
        return len(self.plan.positions if self.probe is None else self.probe.rows)

    def attend_jointly(self, qkv: Qkv, *, before: bool, scale: float | None) -> Tensor:
        """Attention of the split stream and of one that is whole ``before`` it, or after it."""
        whole = qkv[0].shape[2] - self.held
        sizes = [whole, self.held] if before else [self.held, whole]
        streams = [x.split(sizes, 2) for x in qkv]
        (q, k, v), others = (tuple(x[i] for x in streams) for i in (before, not before))
        if self.probe is not None:
            outs = self.probe.attend(q, k, v), others[2]
        else:
            outs = joint_attention((q, k, v), others, self.plan.split, scale=scale)
        return torch.cat(outs[::-1] if before else outs, 2)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole stream."""
        if self.probe is not None and x.shape[dim] == self.plan.length:
            return self.probe.take(x, dim)
        return take(x, self.plan.split, dim)

    def put_together(self, x: Tensor) -> Tensor:
        """The whole of a stream ``[b, s, c]``."""
        if self.probe is not None:
            raise Reached(x)
        return put_together(x, self.plan.split, 1, grad="replicated")

    def replace_forward(self, module: nn.Module, forward: Callable[..., object]) -> None:
        """Give one module another forward."""
        module.__dict__["forward"] = forward


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _known(model: nn.Module) -> tuple[str, Route] | None:
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
            if known is not None:
                return (f"{path}." if path else ""), known
    return None


# ---------------------------------------------------------------------------------- our own models


def _route_own(model: nn.Module, attachment: Attached) -> int:
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, SoftmaxAttention):
            mask = replace(attachment.plan.mask, causal=module.causal)
            attachment.replace_forward(module, _Softmax(attachment, mask))
        elif isinstance(module, GatedLinearAttention):
            attachment.replace_forward(module, _linear(attachment, path))
        else:
            continue
        count += 1
    return count


@dataclass(frozen=True)
class _Softmax:
    attached: Attached
    mask: Mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attached.attend(q, k, v, mask=self.mask)


def _linear(attachment: Attached, path: str) -> Callable[..., Tensor]:
    plan = attachment.plan
    if plan.split.order.kind != "contiguous" or plan.split.heads > 1:
        raise SequenceError(
            f"module '{path}' is linear attention, whose states pass from one part of the sequence "
            f"to the next, and the plan deals it {plan.split.order.kind} over "
            f"{plan.split.heads} heads places; plan with method='linear'"
        )
    return _Linear(attachment)


@dataclass(frozen=True)
class _Linear:
    attached: Attached

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if self.attached.probe is not None:
            return self.attached.probe.attend(q, k, v, log_decay)
        return self.attached.plan.linear_attention(q, k, v, log_decay)


# ----------------------------------------------------------------------------------- transformers


def _route_transformers(model: nn.Module, attachment: Attached) -> int:
    models: list[Any] = [m for m in model.modules() if _is_transformers(m)]
    if not models:
        return 0
    inner = models[0]
    if not type(inner)._can_set_attn_implementation():
        raise SequenceError(
            f"{type(inner).__name__} does not take attention implementations (transformers' "
            "attention interface), so its attention cannot be routed; use a version or model that "
            "does, or name its modules with hp.Route(attention=[...])"
        )
    _register()
    _own_configs(inner)
    attachment.before = inner.config._attn_implementation
    inner.set_attn_implementation(_NAME)
    for module in inner.modules():
        attachment.mark(module)
    return 1


def _own_configs(model: nn.Module) -> None:
    """Give a model a copy of its config: others may be built on the same one."""
    from transformers import PretrainedConfig

    copies: dict[int, Any] = {}
    for module in model.modules():
        configs = [(n, v) for n, v in vars(module).items() if isinstance(v, PretrainedConfig)]
        for name, config in configs:
            module.__dict__[name] = copy.deepcopy(config, copies)


def _require_routed(model: nn.Module, attached: "Attached") -> None:
    """Raise if somebody has chosen another attention implementation since."""
    if attached.before is None:
        return
    inner: Any = next(m for m in model.modules() if _is_transformers(m))
    now = inner.config._attn_implementation
    if now != _NAME:
        raise SequenceError(
            f"this {type(inner).__name__} attends with {now!r} now, inside each rank's part alone; "
            "take the plan off with hp.detach(model), choose the implementation, and attach the "
            "plan again"
        )


def _is_transformers(module: nn.Module) -> bool:
    kinds = {f"{k.__module__}.{k.__qualname__}" for k in type(module).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in kinds


def _register() -> None:
    """Add our implementation beside the library's own; it keeps no state, modules know the plan."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, transformers_attention)
    AttentionMaskInterface.register(_NAME, transformers_mask)


def transformers_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    config: Any = None,
    **options: Any,
) -> Any:
    """The padding mask ``[b, s]`` as it is: what a position may see follows from the plan.

    Raises:
        SequenceError: the model has a pattern of its own.
    """
    window = getattr(config, "sliding_window", None)
    unknown = None if mask_function is None else unknown_pattern(mask_function, window)
    if unknown is not None:
        raise SequenceError(
            f"{type(config).__name__}'s model masks its attention with {unknown}, which attention "
            "over ranks does not do: causal, full and windowed attention go over ranks; take the "
            "plan off with hp.detach(model)"
        )
    return attention_mask


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention of a routed model.

    Raises:
        SequenceError: something that attention over ranks does not do.
    """
    attachment = module.__dict__.get(_MARK)
    label = type(module).__name__
    if not isinstance(attachment, Attached):
        raise SequenceError(
            f"{label} has attention implementation 'hairpin' but carries no sequence plan; attach "
            "one with hp.parallelize(model, plan)"
        )
    for name, given in options.items():
        if name not in _HARMLESS and given is not None:
            raise SequenceError(
                f"{label} attends with {name!r}, which attention over ranks does not do yet; leave "
                "it out if it can be, or take the plan off with hp.detach(model)"
            )
    if query.shape[2] != attachment.held:
        raise SequenceError(
            f"{label} got {query.shape[2]} positions, and this rank holds {attachment.held} of "
            f"{attachment.plan.length} positions: give what plan.shard gives; generation with a "
            "cache does not go over ranks, so call hp.detach(model) before generate()"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise SequenceError(
            f"{label} got a mask of shape {tuple(attention_mask.shape)}; give the padding mask "
            "[b, s] that plan.shard cuts, or none"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = replace(attachment.plan.mask, causal=bool(causal))
    if sliding_window is not None:
        mask = replace(mask, window=sliding_window)
    key_mask = None if attention_mask is None else attention_mask.bool()
    out = attachment.attend(
        query, key, value, mask=mask, key_mask=key_mask, scale=scaling, dropout=dropout
    )
    return out.transpose(1, 2).contiguous(), None


# -------------------------------------------------------------------------- modules that are named


def _route_named(model: nn.Module, prefix: str, way: Route, attachment: Attached) -> int:
    patterns = [prefix + pattern for pattern in way.attention]
    known = way in _KNOWN.values()
    found = [
        (path, module)
        for path, module in model.named_modules()
        if any(fnmatchcase(path, pattern) for pattern in patterns)
    ]
    missing = [p for p in patterns if not any(fnmatchcase(path, p) for path, _ in found)]
    if missing and not (known and found):  # not all sizes of a known model have all modules
        raise SequenceError(
            f"this {type(model).__name__} has no module {missing[0]!r}; its modules are named "
            f"like {', '.join(path for path, _ in list(model.named_modules())[1:6])}"
        )
    for path, module in found:
        attachment.replace_forward(module, _Watched(module, path, attachment, way.beside))
    return len(found)


class _Watched:
    """Runs a module's own forward, its one call of torch's attention going over the ranks."""

    def __init__(
        self, module: nn.Module, path: str, attachment: Attached, beside: str | None
    ) -> None:
        self.forward = type(module).forward.__get__(module)
        self.path, self.attachment, self.beside = path, attachment, beside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = _Watch(self.path, self.attachment, self.beside)
        with watch:
            result = self.forward(*args, **kwargs)
        if not watch.calls:
            raise SequenceError(
                f"module '{self.path}' did not call F.scaled_dot_product_attention, so its "
                "attention along the sequence was not seen; switch its fused attention on, or name "
                "the module that attends"
            )
        return result


class _Watch(Watching):
    function = F.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, path: str, attachment: Attached, beside: str | None) -> None:
        super().__init__()
        self.path, self.attachment, self.beside, self.calls = path, attachment, beside, 0

    def instead(self, call: dict[str, Any], usual: Callable[[], Any]) -> Any:
        self.calls += 1
        hides = call.get("attn_mask")
        if hides is not None:
            raise SequenceError(
                f"module '{self.path}' attends with a mask of shape {tuple(hides.shape)}, which is "
                "of this rank's part alone; masks follow from the plan"
            )
        mask = replace(self.attachment.plan.mask, causal=bool(call.get("is_causal", False)))
        q, k, v = (call[name] for name in self.names[:3])
        dropout, scale = call.get("dropout_p", 0.0), call.get("scale")
        if self.beside is None or q.shape[2] == self.attachment.held:
            return self.attachment.attend(q, k, v, mask=mask, scale=scale, dropout=dropout)
        if mask != Mask() or dropout:
            raise SequenceError(
                f"module '{self.path}' attends to another stream too, under {mask} with "
                f"dropout={dropout}; in such attention all keys count and nothing is dropped: plan "
                "with mask=hp.Mask() and set its dropout to 0"
            )
        return self.attachment.attend_jointly(
            (q, k, v), before=self.beside == "before", scale=scale
        )


# --------------------------------------------------------------------------------------- the stream


def _route_stream(model: nn.Module, prefix: str, way: Route, attachment: Attached) -> None:
    paths = (way.blocks,) if isinstance(way.blocks, str) else way.blocks or ()
    blocks = [block for path in paths for block in _blocks(model, prefix + path)]
    if not blocks:
        raise SequenceError(
            f"this {type(model).__name__} has no blocks in {' or '.join(paths)}; name its list of "
            "blocks with hp.Route(blocks='...')"
        )
    blocks[0].register_forward_pre_hook(_Enter(attachment), with_kwargs=True)
    if way.along:
        beside = _Beside(attachment, way.along, way.beside)
        for block in blocks:
            block.register_forward_pre_hook(beside, with_kwargs=True)
    blocks[-1].register_forward_hook(_Leave(attachment, way.output))


def _blocks(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise SequenceError(
            f"this {type(model).__name__} has no list of blocks at {path!r}; name it with "
            "hp.Route(blocks='...')"
        )
    return blocks


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Enter:
    """Cuts the stream before the first block."""

    attached: Attached

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if args:
            return (self.attached.take(args[0], 1), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.attached.take(kwargs[name], 1)}


@dataclass(frozen=True)
class _Beside:
    """Cuts what goes along the stream, before each block."""

    attached: Attached
    along: Mapping[str, int]
    beside: str | None

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        bound = _bound(block, args, kwargs)
        along = {name: dim for name, dim in self.along.items() if name in bound}
        parts = {name: self._taken(bound[name], dim) for name, dim in along.items()}
        new = tuple(parts.get(name, x) for name, x in zip(bound, args, strict=False))
        return new, {name: parts.get(name, x) for name, x in kwargs.items()}

    def _taken(self, x: Any, dim: int) -> Any:
        """The part; what is longer than the sequence is of the stream that stays whole too."""
        if isinstance(x, (tuple, list)):
            return type(x)(self._taken(item, dim) for item in x)
        if not isinstance(x, Tensor):
            return x
        length = self.attached.plan.length
        whole = x.shape[dim] - length
        if self.beside is None or whole <= 0:
            return self.attached.take(x, dim)
        before = self.beside == "before"
        parts = list(x.split([whole, length] if before else [length, whole], dim))
        parts[before] = self.attached.take(parts[before], dim)
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class _Leave:
    """Puts the stream together after the last block."""

    attached: Attached
    output: int

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            whole = self.attached.put_together(output[self.output])
            return (*output[: self.output], whole, *output[self.output + 1 :])
        return self.attached.put_together(output)


def _bound(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    from inspect import signature

    return dict(signature(block.forward).bind_partial(*args, **kwargs).arguments)


# ---------------------------------------------------------------------- what mixes beside attention


@dataclass(frozen=True)
class _First:
    """Before the first call, in training and not: does anything but attention mix positions?

    Every rank asks, and all go on or all refuse. Sends a few bytes, which count as control.

    Attributes:
        cuts: whether the model cuts its stream itself; else the caller gives this rank's part.
    """

    attached: Attached
    cuts: bool
    asked: set[bool] = field(default_factory=set)

    @eager
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _require_routed(model, self.attached)
        plan = self.attached.plan
        mesh, axis = plan.split.mesh, plan.split.axis
        if model.training in self.asked or mesh.size(axis) == 1 or self.attached.probe is not None:
            return
        positions = plan.length if self.cuts else len(plan.positions)
        few = f"a rank holds {positions} positions" if positions < FEWEST else ""
        answers = all_statements(few, mesh, axis)
        if not any(answers):
            answers = all_statements(self._answer(model, (args, kwargs)), mesh, axis)
        mixes = next((answer for answer in answers if _MIXES in answer), None)
        if mixes is not None:
            raise SequenceError(mixes)
        self.asked.add(model.training)
        unknown = next((answer for answer in answers if answer), None)
        plan.noted(type(model).__name__, unknown)

    def _answer(self, model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
        """What this rank finds: nothing, what mixes, or why it cannot tell."""
        plan, attached = self.attached.plan, self.attached
        length = len(plan.positions)

        def run(probe: Probe) -> object:
            args, kwargs = copied(inputs) if self.cuts else some_positions(inputs, length, probe)
            attached.probe = probe
            try:
                return model.forward(*args, **kwargs)
            finally:
                attached.probe = None

        positions = plan.length if self.cuts else length
        try:
            path = find_mixing(model, run, positions, watching=not self.cuts)
        except NoAnswer as error:
            return str(error)
        return "" if path is None else _mixing(model, path)


_MIXES = "mixes positions outside its attention"


def _mixing(model: nn.Module, path: str) -> str:
    inside = f"in module '{path}' ({type(model.get_submodule(path)).__name__})"
    return (
        f"this {type(model).__name__} {_MIXES}, {inside if path else 'in its own forward'}: what "
        "it gives for one depends on which others are beside it, or on its place in this rank's "
        "part, so several ranks would give other numbers than one. Pass the position_ids of "
        "plan.shard; cut the stream where only attention mixes, with hp.Route(blocks='...'); or "
        "run that module on plan.gather(x)"
    )


_ROUTED = (_Softmax, _Linear, _Watched)
_HOOKS = (_Enter, _Beside, _Leave, _First)
