"""Bringing a model under a budget of bytes: which blocks get loops, and what is left.

Every distinct block is traced and searched once. What lies around the blocks (embeddings, heads,
losses) is a graph of its own, in which a block is one step that holds what its loops were
certified to hold.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hairpin.errors import MemoryBudgetError, TraceError
from hairpin.graph.export import Traced, filled, trace
from hairpin.graph.leaf import NotALeaf, OtherCall
from hairpin.graph.meter import Held
from hairpin.planning.blocks import Group, Overview, all_real, can_run_really, overview
from hairpin.planning.choose import Speeds
from hairpin.planning.program import Program, Search, make_program
from hairpin.planning.rehearse import Example
from hairpin.planning.stamp import stamp
from hairpin.units import format_bytes

Progress = Callable[[str], None]


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
    found = _Fit(
        model,
        example,
        budget_bytes,
        speeds=speeds or Speeds(),
        progress=say,
        blocks=blocks,
        attached=attached,
    )
    return found.run()


class _Fit:
    def __init__(
        self,
        model: nn.Module,
        example: Example,
        budget_bytes: int,
        *,
        speeds: Speeds,
        progress: Progress,
        blocks: Sequence[str] | None,
        attached: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.blocks, self.attached = blocks, attached
        self.model, self.example, self.budget_bytes = model, example, budget_bytes
        self.real_example = example if all_real(example) else tree_map_only(Tensor, filled, example)
        self.speeds, self.say = speeds, progress
        self.graphs: dict[str, Traced] = {}
        self.real = False
        self.again: set[str] = set()
        self.inlined: set[str] = set()  # blocks that are part of the graph around
        self.inner: dict[str, int] = {}

    def run(self) -> Fitted:
        self.say("running on shapes alone")
        seen = self._overview({})
        self.fitted = Fitted(self.budget_bytes, seen.peak_bytes, seen.at_peak, seen.peak_bytes)
        if seen.peak_bytes <= self.budget_bytes:
            return self.fitted
        seen = self._really(seen)
        mixed = self._drop_mixed(seen)
        for group in seen.groups:
            self._trace_block(group)
        around = None
        outside = seen.outside_bytes > self.budget_bytes or not seen.groups or mixed
        if self.blocks is None and (outside or self._untraced(seen)):
            around = self._trace_around(seen)
        entries = self._entries(seen, around)
        for group in seen.groups:
            if not self.inlined & set(group.paths):
                self._fit_block(group, entries[group.paths[0]])
        if around is not None:
            self._fit_around(around)
        else:
            self._check_rest()
        return self.fitted

    def _overview(self, inner: Mapping[str, int], *, really: bool = False) -> Overview:
        with self.attached():
            return overview(self.model, self.example, inner, self.blocks, really=really)

    def _really(self, seen: Overview) -> Overview:
        """The blocks as they are called on real tensors, if what is around them fits."""
        if (
            not seen.groups
            or self.blocks is not None
            or seen.outside_bytes > self.budget_bytes
            or not can_run_really(self.model, self.example)
        ):
            return seen
        self.say("running what is around the blocks")
        self.real = True
        return self._overview({}, really=True)

    def _drop_mixed(self, seen: Overview) -> bool:
        """Leave out blocks that are called in several ways: the graph around holds them then."""
        counts = Counter(path for group in seen.groups for path in group.paths)
        mixed = {path for path, count in counts.items() if count > 1}
        seen.groups = [group for group in seen.groups if not mixed & set(group.paths)]
        return bool(mixed)

    def _untraced(self, seen: Overview) -> bool:
        return any(group.paths[0] not in self.graphs for group in seen.groups)

    def _trace_block(self, group: Group) -> None:
        path = group.paths[0]
        self.say(f"tracing {path}")
        args, kwargs = tree_map_only(Tensor, filled, (group.args, group.kwargs))
        try:
            traced = trace(self.model.get_submodule(path), args, kwargs)
        except TraceError as error:
            self.fitted.left[path] = str(error)
            return
        for each in group.paths:
            self.graphs[each] = traced

    def _trace_around(self, seen: Overview) -> Traced | None:
        self.say(f"tracing {type(self.model).__name__}" + (" around them" if self.graphs else ""))
        args, kwargs = self.real_example
        while True:
            try:
                leaves = {p: g for p, g in self.graphs.items() if p not in self.inlined}
                return trace(self.model, args, kwargs, blocks=leaves)
            except NotALeaf as block:
                group = next(group for group in seen.groups if block.path in group.paths)
                self.inlined.update(group.paths)
            except OtherCall as other:
                if not self._trace_again(other, seen):
                    return None
            except TraceError as error:
                self.fitted.left[""] = str(error)
                return None

    def _trace_again(self, other: OtherCall, seen: Overview) -> bool:
        """Trace a block as the traced model calls it, which may differ from how it is run."""
        group = next(group for group in seen.groups if other.path in group.paths)
        if other.path in self.again:
            self.fitted.left[""] = f"block '{other.path}' is called in several ways"
            return False
        self.again.update(group.paths)
        group.args, group.kwargs = other.arguments
        with torch.no_grad():
            args, kwargs = tree_map_only(Tensor, filled, other.arguments)
        held = overview(self.model.get_submodule(other.path), (args, kwargs), blocks=())
        group.inner_bytes = held.peak_bytes
        self._trace_block(group)
        return True

    def _entries(self, seen: Overview, around: Traced | None) -> dict[str, int]:
        """Bytes alive when a block of each group begins."""
        entries = {group.paths[0]: group.entry_bytes for group in seen.groups}
        if around is None:
            return entries
        flow = Search.of(around).flow
        paths = block_steps(around)
        for step in flow.steps:
            for group in seen.groups:
                if paths.get(step.node) in group.paths:
                    first = group.paths[0]
                    entries[first] = max(entries[first], flow.live_bytes[step.index])
        return entries

    def _fit_block(self, group: Group, entry_bytes: int) -> None:
        path = group.paths[0]
        room = self.budget_bytes - entry_bytes
        for each in group.paths:
            self.inner[each] = group.inner_bytes
        if group.inner_bytes <= room or path not in self.graphs:
            return
        self.say(f"searching {path}")
        traced = self.graphs[path]
        block = self.model.get_submodule(path)
        args, kwargs = tree_map_only(Tensor, filled, (group.args, group.kwargs))
        flat = traced.flat_inputs(block, type(block).forward.__get__(block), args, kwargs)
        search = Search.of(traced)
        if room <= 0:
            raise self._too_little(path, entry_bytes, search.floor_bytes)
        try:
            program = make_program(search, room, flat, self.speeds)
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

    def _fit_around(self, around: Traced) -> None:
        self.say("searching around the blocks" if self.graphs else "searching")
        extra = {node: self.inner.get(path, 0) for node, path in block_steps(around).items()}
        args, kwargs = self.real_example
        flat = around.flat_inputs(
            self.model, type(self.model).forward.__get__(self.model), args, kwargs
        )
        search = Search.of(around, extra)
        try:
            program = make_program(search, self.budget_bytes, flat, self.speeds, inner=self.inner)
        except MemoryBudgetError as error:
            raise self._too_little("", 0, error.floor_bytes) from error
        program.stamps = {"": stamp(self.model)}
        self.fitted.programs[""] = program
        self.fitted.paths[""] = ("",)
        self.fitted.whole[""] = self.fitted.whole_peak_bytes
        self.fitted.peak_bytes = program.peak_bytes

    def _check_rest(self) -> None:
        """The model's own code around the blocks, which stays as it is."""
        self.say("certifying")
        seen = self._overview(self.inner, really=self.real)
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


def block_steps(around: Traced) -> dict[Any, str]:
    """The steps of a graph that are calls of blocks, with the blocks' paths."""
    ports = zip(around.placeholders, around.inputs, strict=True)
    return {user: port.name for node, port in ports if port.kind == "block" for user in node.users}
