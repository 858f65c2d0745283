"""Bringing a model under a budget of bytes: which blocks get loops, and what is left.

Every distinct block is traced and searched once. What lies around the blocks (embeddings, heads,
losses) is a graph of its own, in which a block is one step that holds what its loops were
certified to hold.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import nn

from hairpin.errors import MemoryBudgetError
from hairpin.graph.meter import Held
from hairpin.planning.example import Example
from hairpin.planning.loops.blocks import Group
from hairpin.planning.loops.graphs import Graphs, Progress, block_steps
from hairpin.planning.loops.program import Program, make_program
from hairpin.planning.loops.search import Search
from hairpin.planning.loops.stamp import stamp
from hairpin.planning.speeds import Speeds
from hairpin.units import format_bytes

__all__ = ["Fitted", "Progress", "fit"]

_MANY_TURNS = 32  # of a loop, from which on the graph around is worth a look


@dataclass(eq=False)
class Fitted:
    """Loops for a whole model.

    Attributes:
        programs: for each distinct block, and ``""`` for what is around them.
        paths: of the modules that each program replaces, by the program's first path.
        peak_bytes: certified peak of one forward with the loops.
        whole_peak_bytes: the same without.
        whole: what each held without loops.
        left: modules that were not traced, with the reason.
    """

    budget_bytes: int
    whole_peak_bytes: int
    whole_at_peak: tuple[Held, ...]
    peak_bytes: int = 0
    programs: dict[str, Program] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fit(
    model: nn.Module,
    example: Example,
    budget_bytes: int,
    *,
    speeds: Speeds | None = None,
    progress: Progress | None = None,
    blocks: Sequence[str] | None = None,
    attached: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Fitted:
    """Find loops that keep one forward's activations under a budget.

    Args:
        speeds: of this machine, which the choice of loops weighs.
        progress: called with a few words at each step.
        blocks: modules that may be given loops; default: those that repeat, and what is around.
        attached: while its block lasts, the model runs as one rank of a split would.

    Raises:
        MemoryBudgetError: it cannot be done; says the floor and what sets it.
        PlanError: the model cannot run on the example.
    """
    say = progress or (lambda _: None)
    graphs = Graphs(model, example, budget_bytes, say, blocks, attached)
    if graphs.seen.peak_bytes <= budget_bytes:
        return _Fit(graphs, speeds or Speeds()).fitted
    graphs.look_inside()
    if graphs.needs_around:
        graphs.look_around()
    is_last = graphs.around is not None or blocks is not None
    found: Fitted | MemoryBudgetError
    try:
        found = _Fit(graphs, speeds or Speeds()).run()
    except MemoryBudgetError as error:
        if is_last:
            raise
        found = error
    if isinstance(found, Fitted) and (is_last or _turns(found) <= _MANY_TURNS):
        return found
    return _fit_around(graphs, speeds or Speeds(), found)


def _fit_around(graphs: Graphs, speeds: Speeds, first: Fitted | MemoryBudgetError) -> Fitted:
    """The better of what was found, and of the same with the graph around the blocks.

    That graph holds less than the model's own code, so that loops may take larger chunks.
    """
    graphs.look_around()
    second: Fitted | MemoryBudgetError = first
    if graphs.around is not None:
        try:
            second = _Fit(graphs, speeds).run()
        except MemoryBudgetError as error:
            second = error
    fitted = [each for each in (first, second) if isinstance(each, Fitted)]
    if fitted:
        return min(fitted, key=_turns)
    errors = [each for each in (first, second) if isinstance(each, MemoryBudgetError)]
    raise min(errors, key=lambda each: each.floor_bytes)


def _turns(fitted: Fitted) -> int:
    """Most turns that a loop takes."""
    pairs = [
        (choice.candidate.units, chunk)
        for program in fitted.programs.values()
        for choice, chunk in zip(program.choices, program.chunks, strict=True)
    ]
    return max((-(-units // chunk) for units, chunk in pairs), default=0)


class _Fit:
    """The search in all graphs of a model."""

    def __init__(self, graphs: Graphs, speeds: Speeds) -> None:
        self.graphs, self.model, self.speeds = graphs, graphs.model, speeds
        self.budget_bytes, self.say = graphs.budget_bytes, graphs.say
        seen = graphs.seen
        self.fitted = Fitted(self.budget_bytes, seen.peak_bytes, seen.at_peak, seen.peak_bytes)
        self.fitted.left = graphs.left
        self.inner: dict[str, int] = {}

    def run(self) -> Fitted:
        """Loops for all that need them; where several parts cannot, the highest floor is named."""
        graphs = self.graphs
        entries = graphs.entries()
        failed: list[MemoryBudgetError] = []
        for group in graphs.seen.groups:
            if graphs.inlined & set(group.paths):
                continue
            try:
                self._fit_block(group, entries[group.paths[0]])
            except MemoryBudgetError as error:
                failed.append(error)
                least = error.floor_bytes - entries[group.paths[0]]
                self.inner.update(dict.fromkeys(group.paths, least))
        try:
            if graphs.around is not None:
                self._fit_around()
            elif not failed:
                self._check_rest()
        except MemoryBudgetError as error:
            failed.append(error)
        if failed:
            raise max(failed, key=lambda each: each.floor_bytes)
        return self.fitted

    def _fit_block(self, group: Group, entry_bytes: int) -> None:
        path = group.paths[0]
        room = self.budget_bytes - entry_bytes
        for each in group.paths:
            self.inner[each] = group.inner_bytes
        fits = group.inner_bytes <= room and path not in self.graphs.given
        if fits or path not in self.graphs.traced:
            return
        self.say(f"searching {path}")
        search = Search.of(self.graphs.traced[path])
        try:
            program = make_program(search, room, self.graphs.flat(group), self.speeds)
        except MemoryBudgetError as error:
            raise self._too_little(path, entry_bytes, error.floor_bytes) from error
        program.entry_bytes = entry_bytes
        program.stamps = {each: stamp(self.model.get_submodule(each)) for each in group.paths}
        self.fitted.programs[path] = program
        self.fitted.paths[path] = tuple(group.paths)
        self.fitted.whole[path] = group.inner_bytes
        for each in group.paths:
            self.inner[each] = program.peak_bytes

    def _too_little(self, path: str, entry_bytes: int, inner_bytes: int) -> MemoryBudgetError:
        floor = entry_bytes + inner_bytes
        names = ", ".join(
            f"{held.op.removeprefix('aten.')} {list(held.shape)} {format_bytes(held.nbytes)}"
            for held in self.fitted.whole_at_peak[:3]
        )
        error = MemoryBudgetError(
            f"{type(self.model).__name__} cannot run in {format_bytes(self.budget_bytes)} of "
            f"activations: the floor is about {format_bytes(floor)}, set by module "
            f"'{path or 'the model itself'}' ({format_bytes(entry_bytes)} alive before it, "
            f"{format_bytes(inner_bytes)} in it at the smallest chunks). Without loops the peak is "
            f"{format_bytes(self.fitted.whole_peak_bytes)} ({names}). Allow more memory, a smaller "
            "batch or shorter inputs, or split over ranks with a mesh"
        )
        error.floor_bytes = floor
        return error

    def _fit_around(self) -> None:
        graphs, around, model = self.graphs, self.graphs.around, self.model
        assert around is not None
        self.say("searching around the blocks" if graphs.traced else "searching")
        extra = {node: self.inner.get(path, 0) for node, path in block_steps(around).items()}
        args, kwargs = graphs.real_example
        flat = around.flat_inputs(model, type(model).forward.__get__(model), args, kwargs)
        search = Search.of(around, extra)
        try:
            program = make_program(search, self.budget_bytes, flat, self.speeds, inner=self.inner)
        except MemoryBudgetError as error:
            raise self._too_little("", 0, error.floor_bytes) from error
        program.stamps = {"": stamp(model)}
        self.fitted.programs[""] = program
        self.fitted.paths[""] = ("",)
        self.fitted.whole[""] = self.fitted.whole_peak_bytes
        self.fitted.peak_bytes = program.peak_bytes

    def _check_rest(self) -> None:
        """The model's own code around the blocks, which stays as it is."""
        self.say("certifying")
        seen = self.graphs.overview(self.inner)
        self.fitted.peak_bytes = seen.peak_bytes
        if seen.peak_bytes <= self.budget_bytes:
            return
        reasons = "; ".join(
            f"'{path or 'the model'}': {why}" for path, why in self.fitted.left.items()
        )
        error = MemoryBudgetError(
            f"{type(self.model).__name__} holds {format_bytes(seen.peak_bytes)} of activations, "
            f"more than {format_bytes(self.budget_bytes)}, and what holds it could not be given "
            "loops" + (f": {reasons}" if reasons else "")
        )
        error.floor_bytes = seen.peak_bytes
        raise error
