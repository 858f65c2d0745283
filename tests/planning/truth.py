"""One process in float64 is the truth: a split model must give its values and all its gradients."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import hairpin as hp
from hairpin.run.launch import launch

TOLERANCE = 1e-12
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its inputs, its seams, and how to use it.

    Attributes:
        example: arguments to plan with in the first place, before those it runs with.
        prepare: done to both models before they run, such as switching checkpointing on.
        after: done to the split model only, after it was split, such as compiling its blocks.
        others: arguments of further forwards, whose gradients accumulate.
        interleaved: whether all forwards come before the first backward.
    """

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[], Arguments]
    attends: Mapping[str, Any]
    free_dims: Sequence[str] = ()
    example: Callable[[], Arguments] | None = None
    prepare: Callable[[nn.Module], Any] = lambda model: None
    after: Callable[[nn.Module], Any] = lambda model: None
    others: Callable[[], list[Arguments]] = list
    interleaved: bool = False
    words: Mapping[str, Any] = field(default_factory=dict)

    def but(self, name: str, **changes: Any) -> "Case":
        """This case under another name, with something changed."""
        return replace(self, name=f"{self.name}, {name}", **changes)


@dataclass
class Result:
    """Outputs, gradients of the inputs and of the parameters."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    parameters: dict[str, Tensor | None]


def seeded(shape: Sequence[int], seed: int = 3) -> Tensor:
    """Random float64 numbers, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def randomised(model: nn.Module, std: float = 0.1) -> nn.Module:
    """The model in float64 with every parameter random, those that start at zero too."""
    torch.manual_seed(0)
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def loss_of(output: Any) -> Tensor:
    """A loss that depends on each element of each output in its own way."""
    return sum(leaf.sin().sum() for leaf in floats(output))


def floats(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def fresh(arguments: Arguments) -> Arguments:
    """The arguments as new leaves that collect gradients."""
    return tree_map_only(
        Tensor,
        lambda x: x.clone().requires_grad_(x.is_floating_point()),
        arguments,
    )


def run(model: nn.Module, case: Case) -> Result:
    """All forwards and backwards of the case."""
    result = Result([], [], {})
    pending = []
    for arguments in [case.arguments(), *case.others()]:
        args, kwargs = fresh(arguments)
        output = model(*args, **kwargs)
        result.outputs += [leaf.detach().clone() for leaf in floats(output)]
        pending.append((output, floats((args, kwargs))))
        if not case.interleaved:
            loss_of(output).backward()
    for output, _ in pending if case.interleaved else []:
        loss_of(output).backward()
    result.inputs = [x.grad for _, inputs in pending for x in inputs if x.grad is not None]
    result.parameters = {name: p.grad for name, p in model.named_parameters()}
    return result


def mean_over_ranks(x: Tensor, mesh: hp.Mesh) -> Tensor:
    for axis in mesh.axes:
        x = hp.all_reduce(x, mesh, axis=axis, grad="replicated") / mesh.size(axis)
    return x


def require_close(got: Tensor, wanted: Tensor, what: str, floor: float = 0.0) -> None:
    """Raise unless two tensors agree to 1e-12 relative to ``max(|wanted|, floor)``."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if not wanted.numel():
        return
    got, wanted = got.detach(), wanted.detach()
    scale = max(float(wanted.norm()), floor, 1e-300)
    error = float((got - wanted).norm()) / scale
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def require_equal(got: Result, wanted: Result, name: str) -> None:
    """Raise unless values and all gradients agree."""
    for place, (mine, truth) in enumerate(zip(got.outputs, wanted.outputs, strict=True)):
        require_close(mine, truth, f"{name}: output {place}")
    assert len(got.inputs) == len(wanted.inputs)
    for place, (mine, truth) in enumerate(zip(got.inputs, wanted.inputs, strict=True)):
        require_close(mine, truth, f"{name}: gradient of input {place}")
    norms = [float(g.norm()) for g in wanted.parameters.values() if g is not None]
    floor = 1e-3 * max(norms, default=0.0)
    for key, truth in wanted.parameters.items():
        mine = got.parameters[key]
        if truth is None:
            assert mine is None or not mine.any(), f"{name}: {key} has a gradient"
        else:
            assert mine is not None, f"{name}: {key} has no gradient"
            require_close(mine, truth, f"{name}: gradient of {key}", floor)


def truth_of(case: Case) -> Result:
    """What one process without any plan computes."""
    torch.manual_seed(11)
    model = case.build()
    case.prepare(model)
    torch.manual_seed(12)
    return run(model, case)


def plan_for(case: Case, mesh: hp.Mesh) -> hp.Plan:
    """The case's plan; it survives a way through TOML."""
    model = case.build()
    case.prepare(model)
    examples = [case.arguments(), *case.others()]
    if case.example is not None:
        examples.insert(0, case.example())
    plan = hp.plan(
        model,
        examples[0],
        mesh,
        attends=case.attends,
        free_dims=case.free_dims,
        more_examples=examples[1:],
        **case.words,
    )
    assert hp.Plan.from_toml(plan.to_toml()) == plan, f"{case.name}: TOML changed the plan"
    return plan


def split(case: Case, plan: hp.Plan, mesh: hp.Mesh) -> Result:
    """What this rank computes; gradients averaged over the mesh, bytes as the plan printed."""
    torch.manual_seed(11)
    model = case.build()
    case.prepare(model)
    hp.parallelize(model, plan, mesh)
    case.after(model)
    if case.example is None:
        require_printed_bytes(model, plan, case, mesh)
    torch.manual_seed(12)
    result = run(model, case)
    hp.sync_grads(model, mesh)
    result.parameters = {
        name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()
    }
    result.inputs = [mean_over_ranks(grad, mesh) for grad in result.inputs]
    return result


def require_printed_bytes(model: nn.Module, plan: hp.Plan, case: Case, mesh: hp.Mesh) -> None:
    """Raise unless one forward sends exactly the bytes that the plan prints for this rank."""
    args, kwargs = fresh(case.arguments())  # with gradients, or reentrant checkpoints complain
    before = mesh.traffic.snapshot()
    model(*args, **kwargs)
    sent = mesh.traffic.since(before).bytes_sent
    printed = plan.sent_bytes_by_rank[mesh.rank("sp")]
    assert sent == printed, f"{case.name}: sent {sent} bytes, the plan prints {printed}"
    assert sum(move.bytes_by_rank[mesh.rank("sp")] for move in plan.moves) == printed


@functools.cache
def truths(cases: tuple[Case, ...]) -> list[Result]:
    """The truth of each case, from a process of its own: forks come from a parent that has run no
    backward.
    """
    return launch(lambda: [truth_of(case) for case in cases], 1)[0]


def check(cases: tuple[Case, ...], ranks: int) -> list[hp.Plan]:
    """Every case on this many ranks against the truth. Returns the plans."""
    plans = [plan_for(case, hp.Mesh(sp=ranks)) for case in cases]
    launch(_check_rank, ranks, cases, plans, truths(cases), timeout_s=100)
    return plans


def _check_rank(cases: Sequence[Case], plans: list[hp.Plan], wanted: list[Result]) -> None:
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=30)
    for case, plan, truth in zip(cases, plans, wanted, strict=True):
        name = f"{case.name}, rank {mesh.global_rank} of {mesh.world}"
        require_equal(split(case, plan, mesh), truth, name)
