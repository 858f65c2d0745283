"""All regions of a graph, and the other ways to write the graph that hold less at the least."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hairpin.graph.concrete import concrete
from hairpin.graph.export import Traced
from hairpin.graph.memory import Flow, flow_of
from hairpin.planning.loops.apart import Apart
from hairpin.planning.loops.choose import Bottleneck, bottleneck, floor_bytes
from hairpin.planning.loops.emit import EmissionError, Region
from hairpin.planning.loops.nested import nested
from hairpin.planning.loops.regions import Candidate, boundaries, candidates
from hairpin.planning.loops.rewrite import Reorder, Rewrite

_ORDERS = 4  # of a graph, tried against one bottleneck
_MOST_REWRITES = 24  # from a graph's own order
_MOST_NESTED = 16  # regions with loops inside
_LOWER = 0.98  # of a floor, below which another order is worth having


@dataclass(eq=False)
class Search:
    """Everything about a graph that does not depend on the budget.

    Attributes:
        follow: gives the flow of another order of the same graph.
        rewrites: how this order came about; none for the graph as it was traced.
    """

    traced: Traced
    flow: Flow
    marks: list[int]
    found: list[Candidate]
    follow: Callable[[Traced], Flow]
    rewrites: tuple[Rewrite, ...] = ()

    @classmethod
    def of(cls, traced: Traced, extra: Mapping[Any, int] | None = None) -> "Search":
        """Follow the graph and list its regions.

        Args:
            extra: node of the graph -> bytes that a block inside it holds while it runs.
        """
        named = {node.name: nbytes for node, nbytes in (extra or {}).items()}

        def follow(order: Traced) -> Flow:
            held = {node: named[node.name] for node in order.graph.nodes if node.name in named}
            return flow_of(order.graph).with_extra(held)

        return cls._following(traced, follow)

    @classmethod
    def at(cls, traced: Traced, flat: Sequence[Any]) -> "Search":
        """List the regions of a graph at the lengths of these inputs."""
        return cls._following(traced, lambda order: flow_of(concrete(order.graph, flat)))

    @classmethod
    def _following(
        cls,
        traced: Traced,
        follow: Callable[[Traced], Flow],
        rewrites: tuple[Rewrite, ...] = (),
    ) -> "Search":
        flow = follow(traced)
        marks = boundaries(flow)
        return cls(traced, flow, marks, list(candidates(flow, marks)), follow, rewrites)

    @cached_property
    def floor_bytes(self) -> int:
        """The least budget that the search can meet in this order, as it estimates it."""
        return self._bottleneck.nbytes

    @cached_property
    def _bottleneck(self) -> Bottleneck:
        return bottleneck(self.flow, self.marks, self.found)

    @cached_property
    def better(self) -> "Search | None":
        """The same graph without its bottleneck; None where no way is found.

        Other orders come first. Loops inside others come last: they hold for these lengths and
        this order only.
        """
        if any(candidate.inside is not None for candidate in self.found):
            return self._with_loops_inside()
        return self._apart() or self._in_another_order() or self._with_loops_inside()

    def _apart(self) -> "Search | None":
        """With what is made at once and then cut made apart, where that is no worse."""
        rewrite = None if self.rewrites else Apart.of(self.traced)
        if rewrite is None:
            return None
        found = self._following(rewrite(self.traced), self.follow, (rewrite,))
        return found if found.floor_bytes <= self.floor_bytes else None

    def _in_another_order(self) -> "Search | None":
        worst = self._bottleneck
        if len(self.rewrites) >= _MOST_REWRITES:
            return None
        wanted = [
            (loop, candidate)
            for candidate in self.found
            if candidate.start <= worst.start
            and candidate.end >= worst.end
            and (loop := candidate.fixed_bytes + candidate.turn(1)) < _LOWER * worst.nbytes
            and candidate.ahead_bytes > loop
        ]
        wanted.sort(key=lambda each: (each[0], each[1].end - each[1].start))
        for _, candidate in wanted[:_ORDERS]:
            rewrite = Reorder.of(Region(candidate.start, candidate.end, candidate.seed))
            try:
                order = rewrite(self.traced)
            except EmissionError:
                continue
            found = self._following(order, self.follow, (*self.rewrites, rewrite))
            now, longer = found._bottleneck, len(found.flow.steps) - len(self.flow.steps)
            elsewhere = now.end <= candidate.start or now.start >= candidate.end + longer
            if now.nbytes < _LOWER * worst.nbytes or (elsewhere and now.nbytes <= worst.nbytes):
                return found
        return None

    def _with_loops_inside(self) -> "Search | None":
        """With one more region around its bottleneck whose turns have loops of their own."""
        worst = self._bottleneck
        enough = _LOWER * worst.nbytes
        known = {candidate.key for candidate in self.found}
        wanted = [
            (least, candidate)
            for candidate in self.found
            if candidate.start < worst.end
            and candidate.end > worst.start
            and (least := max(candidate.ahead_bytes, candidate.fixed_bytes)) < enough
            and floor_bytes(candidate) >= enough
            and (*candidate.key[:3], True) not in known
        ]
        if sum(inside for *_, inside in known) >= _MOST_NESTED:
            return None
        wanted.sort(key=lambda each: (each[0], each[1].start - each[1].end))
        for _, candidate in wanted[:_ORDERS]:
            made = nested(self.flow, candidate)
            if made is not None and floor_bytes(made) < enough:
                return replace(self, found=[*self.found, made])
        return None
