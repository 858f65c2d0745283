"""The graphs of a model: of each distinct block once, and of what lies around them.

In the graph around, a block is one step. Where the blocks are handed something large that is cheap
to make, such as a mask, they make it themselves.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hairpin.errors import TraceError
from hairpin.graph.export import Traced, filled
from hairpin.graph.leaf import NotALeaf, OtherCall
from hairpin.graph.lengths import hints
from hairpin.graph.memory import flow_of
from hairpin.graph.sink import sink
from hairpin.planning.example import Example
from hairpin.planning.loops.blocks import Group, Overview, all_real, can_run_really, overview
from hairpin.planning.loops.hookless import trace_block, trace_block_call

Progress = Callable[[str], None]

_SINKING = 64  # parts of a budget, of which an argument must take one to be made inside a block


@dataclass(eq=False)
class Graphs:
    """What was found out about a model on one example, for one budget.

    Args:
        blocks: modules that may be given loops; default: those that repeat, and what is around.
        attached: while its block lasts, the model runs as one rank of a split would.
        backward: the graphs are to be differentiated.

    Attributes:
        traced: graph of each block.
        around: of what lies around them; None until it is asked for, or where it has none.
        given: path of a block -> the tensors it takes, where it makes some of its arguments.
        inlined: blocks that are part of the graph around.
        left: modules that were not traced, with the reason.
        really: the code around the blocks was run for real.
    """

    model: nn.Module
    example: Example
    budget_bytes: int
    say: Progress = lambda _: None
    blocks: Sequence[str] | None = None
    attached: Callable[[], AbstractContextManager[None]] = nullcontext
    backward: bool = False
    seen: Overview = field(init=False)
    traced: dict[str, Traced] = field(default_factory=dict)
    around: Traced | None = None
    given: dict[str, list[Tensor]] = field(default_factory=dict)
    inlined: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    really: bool = False
    _mixed: bool = False
    _again: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.say("running on shapes alone")
        self.seen = self.overview({})

    @property
    def real_example(self) -> Example:
        """The example with tensors that have values, whatever they are."""
        args_kwargs = self.example
        if all_real(args_kwargs):
            return args_kwargs
        found: Example = tree_map_only(Tensor, filled, args_kwargs)
        return found

    def overview(self, inner: Mapping[str, int]) -> Overview:
        """One run of the model, in which blocks hold what is said of them."""
        with self.attached():
            return overview(self.model, self.example, inner, self.blocks, really=self.really)

    def look_inside(self) -> None:
        """Trace every distinct block."""
        self._look_really()
        self._drop_mixed()
        for group in self.seen.groups:
            self._trace_block(group)

    @property
    def needs_around(self) -> bool:
        """Whether the blocks alone cannot bring the model under the budget."""
        seen = self.seen
        outside = seen.outside_bytes > self.budget_bytes or not seen.groups or self._mixed
        untraced = any(group.paths[0] not in self.traced for group in seen.groups)
        return self.blocks is None and (outside or untraced)

    def look_around(self) -> None:
        """Trace what lies around the blocks."""
        model = type(self.model).__name__
        self.say(f"tracing {model}" + (" around them" if self.traced else ""))
        self.around = self._trace_around()
        if self.around is not None:
            self._sink()

    def entries(self) -> dict[str, int]:
        """Bytes alive when a block of each group begins."""
        entries = {group.paths[0]: group.entry_bytes for group in self.seen.groups}
        if self.around is None:
            return entries
        flow = flow_of(self.around.graph)
        paths = block_steps(self.around)
        found: dict[str, int] = {}
        for step in flow.steps:
            for group in self.seen.groups:
                if paths.get(step.node) in group.paths:
                    first = group.paths[0]
                    found[first] = max(found.get(first, 0), flow.live_bytes[step.index])
        return {**entries, **found}

    def flat(self, group: Group) -> list[Any]:
        """Inputs of a block's graph, on which it can be certified."""
        path = group.paths[0]
        block, traced = self.model.get_submodule(path), self.traced[path]
        if path in self.given:
            return traced.filled(block, self.given[path])
        args, kwargs = tree_map_only(Tensor, filled, (group.args, group.kwargs))
        return traced.flat_inputs(block, type(block).forward.__get__(block), args, kwargs)

    def _look_really(self) -> None:
        """Take the blocks as they are called on real tensors, if what is around them fits."""
        if (
            self.seen.groups
            and self.blocks is None
            and self.seen.outside_bytes <= self.budget_bytes
            and can_run_really(self.model, self.example)
        ):
            self.say("running what is around the blocks")
            self.really = True
            self.seen = self.overview({})

    def _drop_mixed(self) -> None:
        """Leave out blocks that are called in several ways: the graph around holds them then."""
        groups = self.seen.groups
        counts = Counter(path for group in groups for path in group.paths)
        mixed = {path for path, count in counts.items() if count > 1}
        self.seen.groups = [group for group in groups if not mixed & set(group.paths)]
        self._mixed = bool(mixed)

    def _trace_block(self, group: Group) -> None:
        path = group.paths[0]
        self.say(f"tracing {path}")
        args, kwargs = tree_map_only(Tensor, filled, (group.args, group.kwargs))
        try:
            group.require_autocast()
            block = self.model.get_submodule(path)
            traced = trace_block(block, args, kwargs, backward=self.backward)
        except TraceError as error:
            self.left[path] = str(error)
            return
        for each in group.paths:
            self.traced[each] = traced

    def _trace_around(self) -> Traced | None:
        args, kwargs = self.real_example
        while True:
            try:
                leaves = {p: g for p, g in self.traced.items() if p not in self.inlined}
                return trace_block(self.model, args, kwargs, blocks=leaves, backward=self.backward)
            except NotALeaf as block:
                group = next(group for group in self.seen.groups if block.path in group.paths)
                self.inlined.update(group.paths)
            except OtherCall as other:
                if not self._trace_again(other):
                    return None
            except TraceError as error:
                self.left[""] = str(error)
                return None

    def _trace_again(self, other: OtherCall) -> bool:
        """Trace a block as the traced model calls it, which may differ from how it is run."""
        group = next(group for group in self.seen.groups if other.path in group.paths)
        if other.path in self._again:
            self.left[""] = f"block '{other.path}' is called in several ways"
            return False
        self._again.update(group.paths)
        group.args, group.kwargs = other.arguments
        with torch.no_grad():
            args, kwargs = tree_map_only(Tensor, filled, other.arguments)
        held = overview(self.model.get_submodule(other.path), (args, kwargs), blocks=())
        group.inner_bytes = held.peak_bytes
        self._trace_block(group)
        return True

    def _sink(self) -> None:
        """Let blocks make what is large and cheap."""
        assert self.around is not None
        groups = [g.paths for g in self.seen.groups if g.paths[0] in self.traced]
        sunk = sink(self.around, groups, self.budget_bytes // _SINKING)
        if sunk is None:
            return
        self.say("tracing blocks with what they make themselves")
        calls = {port.name: port.call for port in sunk.around.inputs if port.kind == "block"}
        for paths in groups:
            first = next((path for path in paths if path in sunk.calls), None)
            if first is None:
                continue
            tensors = [filled(_hollow(value)) for value in sunk.calls[first]]
            block, old = self.model.get_submodule(first), self.traced[first]
            traced = trace_block_call(
                block, calls[first], tensors, old.paths, backward=self.backward
            )
            for each in paths:
                self.traced[each], self.given[each] = traced, tensors
        self.around = sunk.around


def _hollow(value: Tensor) -> Tensor:
    return torch.empty_strided(
        hints(value.shape), hints(value.stride()), dtype=value.dtype, device="meta"
    )


def block_steps(around: Traced) -> dict[Any, str]:
    """The steps of a graph that are calls of blocks, with the blocks' paths."""
    ports = zip(around.placeholders, around.inputs, strict=True)
    return {user: port.name for node, port in ports if port.kind == "block" for user in node.users}
