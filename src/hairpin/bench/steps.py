"""What a run of a case costs: exact peak, process time in turn with others, error, under a budget.

Bytes are activations: what a run allocates beyond parameters and inputs, outputs included, as the
profiler sees it. Times are process time on one thread, taken in turn so that drift hits all alike;
a ratio is the median over the turns.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import hairpin as hp
from hairpin.bench.zoo import Case, Inputs
from hairpin.errors import MemoryBudgetError
from hairpin.graph.meter import measure
from hairpin.run.profile import peak_cpu_bytes

Say = Callable[[str], None]
Step = Callable[[], Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread inside, as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_bytes(step: Step, *, warm: bool = True) -> int:
    """Most bytes in use during the step beyond those before it, after one that warms up."""
    if warm:
        step()
    return peak_cpu_bytes(step)


def held_bytes(tree: Any) -> int:
    """Bytes of the storages of all tensors in ``tree``, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors(tree)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def interleave(steps: Mapping[str, Step], *, rounds: int) -> dict[str, list[float]]:
    """Process time in seconds of every step, in turn; each round begins with another step."""
    names = list(steps)
    for name in names:
        steps[name]()
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start_s = time.process_time()
            steps[name]()
            times_s[name].append(time.process_time() - start_s)
    return times_s


def time_ratio(ours_s: Sequence[float], theirs_s: Sequence[float]) -> float:
    """Median over the rounds of the one time over the other in the same round."""
    return median(ours / theirs for ours, theirs in zip(ours_s, theirs_s, strict=True))


_ZERO = 1e-6  # of the largest entry of all: a tensor below is rounding around zero


def errors(got: Any, want: Any) -> tuple[float, float]:
    """Largest absolute difference of all tensors, and the largest one relative to its tensor.

    A tensor that is zero but for rounding, such as the gradient of a bias before a softmax, is
    compared with the largest of all.
    """
    pairs = [
        (a.detach().double(), b.detach().double())
        for a, b in zip(tensors(got), tensors(want), strict=True)
    ]
    sizes = [float(b.abs().max()) if b.numel() else 0.0 for _, b in pairs]
    largest = max(sizes, default=0.0)
    absolute = relative = 0.0
    for (a, b), size in zip(pairs, sizes, strict=True):
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        scale = size if size > _ZERO * largest else largest
        absolute = max(absolute, difference)
        relative = max(relative, difference / scale if scale else difference)
    return absolute, relative


def budget_bytes(ratio: float, *, peak: int, output: int) -> int:
    """``O + r (P - O)`` for a peak of P with outputs of O bytes."""
    return output + int(ratio * (peak - output))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of an output or of inputs, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(*inputs[0], **inputs[1])


@dataclass(frozen=True)
class Eager:
    """A case's model as its library runs it, and what that costs.

    Attributes:
        output: what it gives, to compare others with.
        output_bytes: of the storages that the output holds.
    """

    case: Case
    inputs: Inputs
    model: nn.Module
    output: Any
    peak_bytes: int
    output_bytes: int

    @classmethod
    def of(cls, case: Case, length: int | None = None) -> "Eager":
        """Build and measure it at ``length``, by default the case's."""
        inputs, model = case.inputs(length or case.length), case.build()
        output = run(model, inputs)
        step = partial(run, model, inputs)
        return cls(case, inputs, model, output, peak_bytes(step), held_bytes(output))

    def budget_bytes(self, ratio: float) -> int:
        """The budget at a ratio of this peak."""
        return budget_bytes(ratio, peak=self.peak_bytes, output=self.output_bytes)

    def step(self) -> None:
        """One more run."""
        run(self.model, self.inputs)


# ------------------------------------------------------------------------------------ a budget


@dataclass(frozen=True)
class Budgeted:
    """A case's model under a budget: the model, its plan, and seconds that the search took."""

    model: nn.Module
    plan: Any
    search_s: float


_MOST_RAISES = 20  # of the budget, by 2 % each, before a floor counts as not found


def budgeted(case: Case, inputs: Inputs, budget: int, *, grad: bool = False) -> Budgeted:
    """A new model of the case with a plan within ``budget`` bytes attached.

    Raises:
        MemoryBudgetError: no plan is.
    """
    model = case.build()
    if not grad:
        model.requires_grad_(False)
    start_s = time.perf_counter()
    with torch.set_grad_enabled(grad):
        plan = hp.plan(model, inputs, memory=budget, backward=grad)
    search_s = time.perf_counter() - start_s
    return Budgeted(hp.parallelize(model, plan), plan, search_s)


def floor_bytes(case: Case, inputs: Inputs) -> int:
    """Least budget that the planner honours: its own estimate, raised until a plan is made."""
    budget = 1
    for _ in range(_MOST_RAISES):
        try:
            budgeted(case, inputs, budget)
        except MemoryBudgetError as error:
            budget = max(error.floor_bytes, budget + budget // 50)
        else:
            return budget
    raise MemoryBudgetError(f"no plan for {case.name} was found up to {budget} bytes")


# ------------------------------------------------------------------------------- without memory


def fake_inputs(case: Case, length: int) -> Inputs:
    """Inputs of any length that take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return case.inputs(length)


def fake_peak_bytes(case: Case, model: nn.Module, length: int) -> int:
    """What a run of ``model`` at ``length`` would peak at, foretold on fake tensors."""
    args, kwargs = fake_inputs(case, length)
    return measure(model, args, kwargs).peak_bytes
