"""What people use today to save memory, beside a budget: by hand, by checkpoint, by compiler."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hairpin.bench.steps import (
    Eager,
    Say,
    Step,
    budget_bytes,
    budgeted,
    errors,
    floor_bytes,
    held_bytes,
    interleave,
    one_thread,
    peak_bytes,
    run,
    tensors,
    time_ratio,
)
from hairpin.bench.zoo import Case, Inputs, select
from hairpin.errors import HairpinError, MemoryBudgetError

EXPERT_CHUNKS = (64, 32, 16, 8, 4, 1)
TRAINED = (
    "Evoformer block",
    "GPT-2 (eager)",
    "GPT-2 (sdpa)",
    "HF ViT (eager)",
    "HF ViT, high resolution (eager)",
)


# -------------------------------------------------------------------------------------- the expert


@dataclass(frozen=True, kw_only=True)
class ExpertRow:
    """The Evoformer block chunked by hand in one way, and ours within the same bytes.

    Attributes:
        in_place: triangle multiplications in place.
        time_ratio: of the expert to eager; ``ours_time_ratio``: of ours to eager;
            ``ours_over_expert``: of ours to the expert.
    """

    in_place: bool
    chunk_size: int
    peak_bytes: int
    time_ratio: float
    relative_error: float
    ours_peak_bytes: int | None = None
    ours_time_ratio: float | None = None
    ours_over_expert: float | None = None


@dataclass(frozen=True, kw_only=True)
class Expert:
    """Our least memory for an Evoformer block against what hand-written chunking can do.

    Attributes:
        least_bytes: the expert's, standard path; ``least_in_place_bytes``: with its in-place
            triangle multiplications; ``ours_least_bytes``: measured at the planner's floor.
    """

    length: int
    eager_peak_bytes: int
    output_bytes: int
    least_bytes: int
    least_in_place_bytes: int
    ours_least_bytes: int
    ours_least_time_ratio: float
    rows: list[ExpertRow]


def expert(
    *,
    rounds: int = 5,
    length: int | None = None,
    chunk_sizes: Sequence[int] = EXPERT_CHUNKS,
    say: Say = lambda _: None,
) -> Expert:
    """OpenFold's hand-written chunking of the Evoformer block against ours, in one run."""
    (case,) = select("Evoformer block")
    case = replace(case, length=length or case.length)
    with one_thread():
        eager = Eager.of(case)
        rows: list[ExpertRow] = []
        for in_place in (False, True):
            for size in chunk_sizes:
                rows.append(_expert_row(eager, size, in_place=in_place, rounds=rounds))
                say(f"hand-chunked: {rows[-1]}")
        least = budgeted(case, eager.inputs, floor_bytes(case, eager.inputs))
        step = partial(run, least.model, eager.inputs)
        times_s = interleave({"eager": eager.step, "ours": step}, rounds=rounds)
        return Expert(
            length=case.length,
            eager_peak_bytes=eager.peak_bytes,
            output_bytes=eager.output_bytes,
            least_bytes=min(row.peak_bytes for row in rows if not row.in_place),
            least_in_place_bytes=min(row.peak_bytes for row in rows if row.in_place),
            ours_least_bytes=peak_bytes(step),
            ours_least_time_ratio=time_ratio(times_s["ours"], times_s["eager"]),
            rows=rows,
        )


def _expert_row(eager: Eager, chunk_size: int, *, in_place: bool, rounds: int) -> ExpertRow:
    from hairpin.bench.evoformer import EvoformerBlock, HandChunked

    block = eager.model
    assert isinstance(block, EvoformerBlock)
    # its 256 columns a turn would be all of them here; no larger part than of the other loops
    columns = max(16, chunk_size)
    by_hand = HandChunked(
        block, chunk_size, in_place_triangles=in_place, triangle_chunk_size=columns
    )
    steps: dict[str, Step] = {"eager": eager.step, "expert": partial(run, by_hand, eager.inputs)}
    _, relative = errors(steps["expert"](), eager.output)
    peak = peak_bytes(steps["expert"])
    ours_peak = None
    try:
        ours = budgeted(eager.case, eager.inputs, peak)
    except MemoryBudgetError:
        pass
    else:
        steps["ours"] = partial(run, ours.model, eager.inputs)
        ours_peak = peak_bytes(steps["ours"])
    times_s = interleave(steps, rounds=rounds)
    ours_s = times_s.get("ours")
    return ExpertRow(
        in_place=in_place,
        chunk_size=chunk_size,
        peak_bytes=peak,
        time_ratio=time_ratio(times_s["expert"], times_s["eager"]),
        relative_error=relative,
        ours_peak_bytes=ours_peak,
        ours_time_ratio=None if ours_s is None else time_ratio(ours_s, times_s["eager"]),
        ours_over_expert=None if ours_s is None else time_ratio(ours_s, times_s["expert"]),
    )


# ---------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A forward and backward by one method.

    Attributes:
        method: ``"eager"``, ``"module checkpointing"``, ``"torch.compile"`` or ``"ours"``.
        setting: of the method, such as its budget.
        peak_bytes: activations, outputs and gradients.
        peak_ratio: to the eager peak, both whole.
        activation_ratio: to the eager peak, both above the gradients.
        gradient_bytes: of the parameters and inputs, which no method can save.
        max_error: largest difference of a gradient from eager's in float64.
        relative_error: the same relative to the largest entry of its tensor there; of tensors
            that are zero but for rounding, to the largest entry of all.
        from_eager: of the gradients, relative in the same way, from eager's in float32.
    """

    model: str
    variant: str
    method: str
    setting: str
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    activation_ratio: float | None = None
    gradient_bytes: int = 0
    time_ratio: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    from_eager: float | None = None
    note: str = ""


class _Training:
    """A model's forward and backward from fixed gradients of its outputs."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs
        self.cotangents: list[Tensor] = []
        self.leaves = [*model.parameters(), *(t for t in tensors(inputs) if t.requires_grad)]

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        outputs = [t for t in tensors(self._forward()) if t.requires_grad]
        if not self.cotangents:
            generator = torch.Generator().manual_seed(2)
            self.cotangents = [
                torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs
            ]
        torch.autograd.backward(outputs, self.cotangents)

    def _forward(self) -> Any:
        return self.model(*self.inputs[0], **self.inputs[1])

    def gradients(self) -> list[Tensor]:
        """Of all leaves after a step; zeros for those that take no part."""
        self()
        found = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
            for leaf in self.leaves
        ]
        self.drop()
        return found

    def drop(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def training(
    chosen: Sequence[Case] | None = None,
    *,
    ratio: float = 0.3,
    compile_budgets: Sequence[float] = (1.0, 0.5, 0.2, 0.0),
    rounds: int = 5,
    say: Say = lambda _: None,
) -> list[TrainingRow]:
    """Gradients, peak and time of training by each method, in eval mode (no dropout).

    With gradients of G bytes and an eager peak of P, ours gets ``ratio * P``, and where that is out
    of reach ``G + ratio * (P - G)``.
    """
    rows: list[TrainingRow] = []
    with one_thread():
        for case in select(*TRAINED) if chosen is None else chosen:
            for row in _training_rows(case, ratio, compile_budgets, rounds=rounds):
                rows.append(row)
                say(f"training: {row}")
    return rows


def _training_rows(
    case: Case, ratio: float, compile_budgets: Sequence[float], *, rounds: int
) -> Iterator[TrainingRow]:
    eager = _Training(case.build(), _with_gradients(case.inputs(case.length)))
    found = eager.gradients()
    truth = _Truth(_exact_gradients(case), found)
    peak = _training_peak_bytes(eager)
    absolute, relative = truth.errors(found)
    base = TrainingRow(
        model=case.name,
        variant=case.variant,
        method="eager",
        setting="",
        peak_bytes=peak,
        peak_ratio=1.0,
        activation_ratio=1.0,
        gradient_bytes=held_bytes(found),
        time_ratio=1.0,
        max_error=absolute,
        relative_error=relative,
        from_eager=0.0,
    )
    yield base
    compare = partial(_compared, eager, truth, base, rounds=rounds)
    make = partial(_checkpointed_case, case)
    yield compare(make, method="module checkpointing", setting="every layer")
    for kept in compile_budgets:
        with _compile_budget(kept):
            make = partial(_compiled, case)
            yield compare(make, method="torch.compile", setting=f"budget {kept}")
    make = partial(_budgeted_case, case, eager.inputs, int(ratio * peak))
    ours = compare(make, method="ours", setting=f"{ratio} of the peak")
    yield ours
    if ours.peak_bytes is None:
        budget = budget_bytes(ratio, peak=peak, output=base.gradient_bytes)
        make = partial(_budgeted_case, case, eager.inputs, budget)
        yield compare(make, method="ours", setting=f"gradients and {ratio} of the rest")


def _exact_gradients(case: Case) -> list[Tensor]:
    """In float64."""
    inputs = tree_map_only(Tensor, _doubled, case.inputs(case.length))
    return _Training(case.build().double(), _with_gradients(inputs)).gradients()


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Truth:
    """Gradients to compare with.

    Attributes:
        exact: in float64.
        eager: as eager gives them in float32.
    """

    exact: Sequence[Tensor]
    eager: Sequence[Tensor]

    def errors(self, found: Sequence[Tensor]) -> tuple[float, float]:
        """Largest difference from the exact ones, and the largest relative to its tensor."""
        return errors(found, self.exact)

    def from_eager(self, found: Sequence[Tensor]) -> float:
        """Largest difference from eager's, relative to its tensor."""
        return errors(found, self.eager)[1]


def _checkpointed_case(case: Case) -> nn.Module:
    return checkpointed(case.build())


def _budgeted_case(case: Case, inputs: Inputs, budget: int) -> nn.Module:
    return budgeted(case, inputs, budget, grad=True).model


def _compared(
    eager: _Training,
    truth: _Truth,
    base: TrainingRow,
    make: Callable[[], nn.Module],
    *,
    method: str,
    setting: str,
    rounds: int,
) -> TrainingRow:
    blank = TrainingRow(
        model=base.model,
        variant=base.variant,
        method=method,
        setting=setting,
        gradient_bytes=base.gradient_bytes,
    )
    try:
        other = _Training(make(), eager.inputs)
        found = other.gradients()
    except HairpinError as error:
        return replace(blank, note=f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001  # what torch.compile raises has no common root
        return replace(blank, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    absolute, relative = truth.errors(found)
    from_eager = truth.from_eager(found)
    del found
    peak = _training_peak_bytes(other)
    times_s = interleave({"eager": eager, "other": other}, rounds=rounds)
    assert base.peak_bytes is not None
    return replace(
        blank,
        peak_bytes=peak,
        peak_ratio=peak / base.peak_bytes,
        activation_ratio=(peak - base.gradient_bytes) / (base.peak_bytes - base.gradient_bytes),
        time_ratio=time_ratio(times_s["other"], times_s["eager"]),
        max_error=absolute,
        relative_error=relative,
        from_eager=from_eager,
    )


def _training_peak_bytes(step: _Training) -> int:
    """From no gradients to all of them."""
    step()
    step.drop()
    peak = peak_bytes(step, warm=False)
    step.drop()
    return peak


def _with_gradients(inputs: Inputs) -> Inputs:
    """Inputs that are not indices carry gradients, as they would inside a larger model."""

    def carry(tensor: Tensor) -> Tensor:
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    marked: Inputs = tree_map_only(Tensor, carry, inputs)
    return marked


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with every layer recomputed in the backward, as a training script would write it.

    Layers are the items of its ``ModuleList``s; a block that has none gives its children.
    """
    from torch.utils.checkpoint import checkpoint

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in [layer for items in lists for layer in items] or list(model.children()):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


@contextmanager
def _compile_budget(budget: float) -> Iterator[None]:
    """What torch.compile may keep for the backward: 1 all that it would, 0 the inputs alone."""
    from torch._functorch import config

    torch._dynamo.reset()
    with config.patch(activation_memory_budget=budget):
        yield


def _compiled(case: Case) -> nn.Module:
    """The case's model compiled at the shapes of its first call."""
    model: nn.Module = torch.compile(case.build(), dynamic=False)  # type: ignore[assignment]
    return model


# ----------------------------------------------------------------------- what people use today


@dataclass(frozen=True, kw_only=True)
class Option:
    """A model's own way of saving memory, or ``torch.compile``, and ours within the same bytes.

    Attributes:
        option: name of the model's method, or ``"torch.compile"``.
        size: given to it; None for ``torch.compile``.
        peak_ratio: to the eager peak, both above the outputs.
        ours_floor_bytes: least that ours could do.
        ours_time_ratio: to eager, at this option's peak; None where ours cannot go as low.
    """

    model: str
    variant: str
    option: str
    size: int | None
    eager_peak_bytes: int
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    time_ratio: float | None = None
    relative_error: float | None = None
    ours_floor_bytes: int | None = None
    ours_peak_bytes: int | None = None
    ours_time_ratio: float | None = None
    note: str = ""


def own_options(
    chosen: Sequence[Case],
    *,
    compiled: bool = True,
    rounds: int = 5,
    say: Say = lambda _: None,
) -> list[Option]:
    """Every case's own chunking option at each of its sizes, and ``torch.compile``."""
    rows: list[Option] = []
    with one_thread():
        for case in chosen:
            if not compiled and case.set_option is None:
                continue
            eager, floor = Eager.of(case), None
            try:
                floor = floor_bytes(case, eager.inputs)
            except HairpinError as error:
                say(f"{case.title}: {type(error).__name__}: {error}")
            for option, size, make in _options(case, compiled=compiled):
                row = _option(eager, option, size, make, rounds=rounds)
                rows.append(replace(row, ours_floor_bytes=floor))
                say(f"option: {rows[-1]}")
    return rows


def _options(
    case: Case, *, compiled: bool
) -> Iterator[tuple[str, int | None, Callable[[], nn.Module]]]:
    """Name, size and maker of each way that the case can be run."""
    if case.set_option is not None:
        for size in case.option_sizes:
            yield case.option, size, partial(_with_option, case, size)
    if compiled:
        torch._dynamo.reset()
        yield "torch.compile", None, partial(_compiled, case)


def _with_option(case: Case, size: int) -> nn.Module:
    assert case.set_option is not None
    return case.set_option(case.build(), size)


def _option(
    eager: Eager,
    option: str,
    size: int | None,
    make: Callable[[], nn.Module],
    *,
    rounds: int,
) -> Option:
    case = eager.case
    blank = Option(
        model=case.name,
        variant=case.variant,
        option=option,
        size=size,
        eager_peak_bytes=eager.peak_bytes,
    )
    steps: dict[str, Step] = {"eager": eager.step}
    try:
        steps["option"] = partial(run, make(), eager.inputs)
        _, relative = errors(steps["option"](), eager.output)
    except Exception as error:  # noqa: BLE001  # a foreign option may fail in any way
        return replace(blank, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    peak, ours_peak = peak_bytes(steps["option"]), None
    try:
        ours = budgeted(case, eager.inputs, peak)
        steps["ours"] = partial(run, ours.model, eager.inputs)
        ours_peak = peak_bytes(steps["ours"])
    except HairpinError as error:
        blank = replace(blank, note=f"ours: {type(error).__name__}")
    times_s = interleave(steps, rounds=rounds)
    ours_s = times_s.get("ours")
    return replace(
        blank,
        peak_bytes=peak,
        peak_ratio=(peak - eager.output_bytes) / (eager.peak_bytes - eager.output_bytes),
        time_ratio=time_ratio(times_s["option"], times_s["eager"]),
        relative_error=relative,
        ours_peak_bytes=ours_peak,
        ours_time_ratio=None if ours_s is None else time_ratio(ours_s, times_s["eager"]),
    )
