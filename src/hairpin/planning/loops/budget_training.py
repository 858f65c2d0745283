"""Bringing a training step under a budget of bytes.

What the blocks of a stack keep for the backward adds up, so they share the budget: their own
budgets are lowered together until a whole forward and backward of the model is certified to fit.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hairpin.errors import MemoryBudgetError, TraceError
from hairpin.graph.export import Traced, filled
from hairpin.graph.leaf import NotALeaf, OtherCall
from hairpin.graph.meter import Timeline, measure
from hairpin.planning.example import Example, plainly
from hairpin.planning.loops.blocks import Group, overview
from hairpin.planning.loops.budget import Fitted, Progress
from hairpin.planning.loops.hookless import trace_block
from hairpin.planning.loops.program import Program
from hairpin.planning.loops.search import Search
from hairpin.planning.loops.stamp import stamp
from hairpin.planning.loops.training import Around, TrainingProgram, make_training_program
from hairpin.planning.speeds import Speeds
from hairpin.units import format_bytes

_MOST_STEPS = 2000  # of the code around blocks; a search of more would take minutes
_SHARES = (0.7, 0.5, 0.36, 0.26, 0.19, 0.14, 0.1)  # of what a block takes without loops


def fit_training(
    model: nn.Module, example: Example, budget_bytes: int, *, speeds: Speeds, progress: Progress
) -> Fitted:
    """Find loops that keep one forward and backward, gradients included, under a budget.

    Raises:
        MemoryBudgetError: it cannot be done; says what was reached.
        PlanError: the model cannot run on the example.
    """
    progress("running forward and backward on shapes alone")
    whole = _step(model, example)
    fitted = Fitted(budget_bytes, whole.peak_bytes, whole.at_peak, whole.peak_bytes)
    if whole.peak_bytes <= budget_bytes:
        return fitted
    blocks = _blocks(model, example, fitted, progress)
    if not blocks:
        _whole_model(model, example, fitted, speeds, progress)
        return fitted
    return _stack(model, example, fitted, blocks, speeds=speeds, say=progress)


@dataclass(frozen=True, eq=False)
class _Block:
    """One kind of block: its graph, an example of its inputs, and what it takes without loops."""

    paths: tuple[str, ...]
    search: Search
    flat: list[Any]
    whole_bytes: int


def _step(model: nn.Module, example: Example) -> Timeline:
    args, kwargs = example
    with plainly():
        return measure(model, args, kwargs, grad=True)


def _blocks(model: nn.Module, example: Example, fitted: Fitted, say: Progress) -> list[_Block]:
    found = []
    for group in overview(model, example).groups:
        path = group.paths[0]
        say(f"tracing {path}")
        block = model.get_submodule(path)
        args, kwargs = tree_map_only(Tensor, filled, (group.args, group.kwargs))
        try:
            group.require_autocast()
            traced = trace_block(block, args, kwargs, backward=True)
        except TraceError as error:
            fitted.left[path] = str(error)
            continue
        found.append(_block(block, group, traced, (args, kwargs)))
    return found


def _block(block: nn.Module, group: Group, traced: Traced, call: Example) -> _Block:
    call = tree_map_only(Tensor, _with_gradient, call)
    flat = traced.flat_inputs(block, type(block).forward.__get__(block), *call)
    return _Block(tuple(group.paths), Search.of(traced), flat, _step(block, call).peak_bytes)


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _whole_model(
    model: nn.Module, example: Example, fitted: Fitted, speeds: Speeds, say: Progress
) -> None:
    """Loops for a model that is one block."""
    say(f"tracing {type(model).__name__}")
    flags = [leaf.requires_grad for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, example)
    try:
        traced = trace_block(model, args, kwargs, backward=True)
    except TraceError as error:
        raise _too_little(model, fitted, fitted.whole_peak_bytes, str(error)) from error
    for leaf, flag in zip(tree_leaves((args, kwargs)), flags, strict=False):
        if isinstance(leaf, Tensor):
            leaf.requires_grad_(flag)
    flat = traced.flat_inputs(model, type(model).forward.__get__(model), args, kwargs)
    say("searching")
    try:
        program = make_training_program(Search.of(traced), fitted.budget_bytes, flat, speeds)
    except MemoryBudgetError as error:
        reason = "" if error.floor_bytes else str(error)
        least = error.floor_bytes or fitted.whole_peak_bytes
        raise _too_little(model, fitted, least, reason) from error
    _take(model, fitted, ("",), program, fitted.whole_peak_bytes)
    fitted.peak_bytes = program.peak_bytes


def _stack(
    model: nn.Module,
    example: Example,
    fitted: Fitted,
    blocks: list[_Block],
    *,
    speeds: Speeds,
    say: Progress,
) -> Fitted:
    """Lower the budgets of all blocks together until the whole step fits."""
    least = fitted.whole_peak_bytes
    rest = _Rest(model, example, fitted, blocks, say)
    for share in (1.0, *_SHARES):
        if share < 1:
            _lower(model, fitted, blocks, share, speeds=speeds, say=say)
        if fitted.programs:
            fitted.peak_bytes = _with_loops(model, fitted, lambda: _step(model, example)).peak_bytes
            least = min(least, fitted.peak_bytes)
            if fitted.peak_bytes <= fitted.budget_bytes:
                return fitted
        elif share < 1:
            break
        try:
            outer = rest.program(speeds)
        except MemoryBudgetError as error:
            least = min(least, error.floor_bytes or least)
            continue
        if outer is not None:
            _take(model, fitted, ("",), outer, fitted.whole_peak_bytes)
            fitted.peak_bytes = outer.peak_bytes
            return fitted
    reasons = "; ".join(f"'{path or 'the model'}': {why}" for path, why in fitted.left.items())
    raise _too_little(model, fitted, least, reasons)


def _lower(
    model: nn.Module,
    fitted: Fitted,
    blocks: list[_Block],
    share: float,
    *,
    speeds: Speeds,
    say: Progress,
) -> None:
    """Give each block this share of what it takes; where that is too little, it stays as it is."""
    for block in blocks:
        path = block.paths[0]
        if path in fitted.left:
            continue
        say(f"searching {path} at {share:.0%}")
        try:
            program = make_training_program(
                block.search, int(share * block.whole_bytes), block.flat, speeds
            )
        except MemoryBudgetError:
            continue  # it keeps the loops of the share before
        except TraceError as error:
            fitted.left[path] = str(error)
            continue
        _take(model, fitted, block.paths, program, block.whole_bytes)


@dataclass(eq=False)
class _Rest:
    """The code around the blocks of a model."""

    model: nn.Module
    example: Example
    fitted: Fitted
    blocks: list[_Block]
    say: Progress
    _search: list[Search | None] = field(default_factory=list)

    def program(self, speeds: Speeds) -> TrainingProgram | None:
        """Loops there for the whole budget, the blocks as they are now; None without a graph.

        Raises:
            MemoryBudgetError: there is no way.
        """
        if not self._search:
            self._search.append(self._traced())
        (search,) = self._search
        if search is None or len(search.flow.steps) > _MOST_STEPS:
            return None
        self.say("searching around the blocks")
        args, kwargs = tree_map_only(Tensor, _plain, self.example)
        forward = type(self.model).forward.__get__(self.model)
        flat = search.traced.flat_inputs(self.model, forward, args, kwargs)
        around = Around(self.model, *self.example, search.traced)
        budget = self.fitted.budget_bytes
        with _attached(self.model, self.fitted):
            return make_training_program(search, budget, flat, speeds, tries=6, around=around)

    def _traced(self) -> Search | None:
        leaves = {path: b.search.traced for b in self.blocks for path in b.paths}
        self.say(f"tracing {type(self.model).__name__} around them")
        args, kwargs = tree_map_only(Tensor, _plain, self.example)
        try:
            traced = trace_block(self.model, args, kwargs, blocks=leaves, backward=True)
        except (TraceError, OtherCall, NotALeaf) as error:
            self.fitted.left[""] = str(error)
            return None
        return Search.of(traced)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach()


@contextmanager
def _attached(model: nn.Module, fitted: Fitted) -> Iterator[None]:
    """While the block lasts, loops run in place of the blocks' own forwards."""
    with ExitStack() as stack:
        for path, program in fitted.programs.items():
            for each in fitted.paths[path]:
                block = model.get_submodule(each)
                block.__dict__["forward"] = _Run(block, program)
                stack.callback(block.__dict__.pop, "forward")
        yield


def _with_loops(model: nn.Module, fitted: Fitted, step: Callable[[], Timeline]) -> Timeline:
    """Run a step with the loops in place of the blocks' own forwards."""
    with _attached(model, fitted):
        return step()


class _Run:
    ours = True

    def __init__(self, block: nn.Module, program: Program) -> None:
        self.block, self.program = block, program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward.__get__(self.block)
        return self.program.run(self.block, forward, args, kwargs)


def _take(
    model: nn.Module, fitted: Fitted, paths: tuple[str, ...], program: Program, whole_bytes: int
) -> None:
    program.stamps = {path: stamp(model.get_submodule(path)) for path in paths}
    fitted.programs[paths[0]] = program
    fitted.paths[paths[0]] = paths
    fitted.whole[paths[0]] = whole_bytes


def _too_little(
    model: nn.Module, fitted: Fitted, least_bytes: int, reason: str
) -> MemoryBudgetError:
    error = MemoryBudgetError(
        f"a forward and backward of {type(model).__name__} cannot run in "
        f"{format_bytes(fitted.budget_bytes)}: the least that was reached is "
        f"{format_bytes(least_bytes)}, gradients of parameters included"
        + (f" ({reason})" if reason else "")
        + ". Allow more memory, a smaller batch or shorter inputs"
    )
    error.floor_bytes = least_bytes
    return error
