"""Other orders of a graph, in which a budget can be met that its own order cannot meet.

A region's loop may need values whole that are made ahead of it, step by step. In another order of
the same graph all of those come first, and may then run as loops of their own. A value that both
read, such as a norm, is computed twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from hairpin.graph.concrete import computed
from hairpin.graph.export import Traced
from hairpin.graph.memory import Flow, flow_of, tensors
from hairpin.planning.loops.apart import Apart
from hairpin.planning.loops.emit import EmissionError, Region
from hairpin.planning.loops.regions import Seed, Walk, walk


@dataclass(frozen=True)
class Reorder:
    """What runs ahead of a region's loop goes before everything else in its window.

    Attributes:
        start, end: the window, end not included, by the steps of the graph it is applied to.
        step, axis, scale: the region's seed.
    """

    start: int
    end: int
    step: int
    axis: int
    scale: int = 1

    @classmethod
    def of(cls, region: Region) -> "Reorder":
        """The order that suits a region."""
        seed = region.seed
        return cls(region.start, region.end, seed.step, seed.axis, seed.scale)

    def __call__(self, traced: Traced) -> Traced:
        """The graph in this order; it takes and gives what it did.

        Raises:
            EmissionError: a step ahead of the loop reads what only the loop makes.
        """
        flow = flow_of(traced.graph)
        state = walk(flow, self.end, Seed(self.step, self.axis, self.scale))
        graph = _Writer(flow, state, self.start).write()
        return replace(traced, graph=graph, source=traced.source or traced)


Rewrite = Apart | Reorder


class _Writer:
    def __init__(self, flow: Flow, state: Walk, start: int) -> None:
        self.flow, self.state = flow, state
        self.nodes = list(flow.graph.nodes)
        first = flow.steps[start].node
        last = flow.steps[state.end - 1].node
        self.window = self.nodes[self.nodes.index(first) : self.nodes.index(last) + 1]
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.again: dict[fx.Node, fx.Node] = {}  # the second copy of what is computed twice

    def write(self) -> fx.Graph:
        early, twice = self._early()
        inside = set(self.window)
        for node in self.nodes:
            if node is self.window[0]:
                for each in (n for n in self.window if n in early):
                    self.env[each] = self._copy(each)
                for each in self.window:
                    self._late(each, early, twice)
            if node not in inside:
                self.env[node] = self._copy(node)
        self.graph.eliminate_dead_code()
        self._renew()
        return self.graph

    def _early(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """Nodes that come first, and those of them that come again."""
        early: set[fx.Node] = set()
        twice: set[fx.Node] = set()
        late: set[fx.Node] = set()
        for node in self.window:
            place = self.flow.index.get(node)
            status = None if place is None else self.state.status.get(place, "unused")
            blocked = any(source in late for source in node.all_input_nodes)
            if status in ("ahead", "both") or (status is None and not blocked):
                if blocked:
                    raise EmissionError(f"{node.name} reads what only the loop makes")
                early.add(node)
                if status == "both":
                    twice.add(node)
            else:
                late.add(node)
        return early, twice

    def _late(self, node: fx.Node, early: set[fx.Node], twice: set[fx.Node]) -> None:
        if node in twice:
            self.again[node] = self.graph.node_copy(node, self._reader(node))
        elif node not in early:
            self.env[node] = self.graph.node_copy(node, self._reader(node))

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, self.env.__getitem__)

    def _reader(self, node: fx.Node) -> Any:
        """What a step of the loop reads: second copies of what it takes in parts."""
        place = self.flow.index.get(node)
        demand = None if place is None else self.state.demands.get(place)
        if place is None or demand is None:
            return self.env.__getitem__
        step = self.flow.steps[place]
        cut = {step.inputs[count] for count in step.axes[demand[0]].inputs}
        return lambda source: (
            self.again[source] if source in self.again and source in cut else self.env[source]
        )

    def _renew(self) -> None:
        """Give what is computed twice, and all that views it, a storage of its own."""
        copies = set(self.again.values())
        shared = {_storage(t) for node in self.again for t in tensors(node.meta["val"])}
        originals = {self.env[node] for node in self.again}
        reached = set(copies)
        for node in self.graph.nodes:
            if node not in copies:
                mine = tensors(node.meta.get("val"))
                reads = any(source in reached for source in node.all_input_nodes)
                if node in originals or not reads or not any(_storage(t) in shared for t in mine):
                    continue
            reached.add(node)
            node.meta = {**node.meta, "val": computed(node)}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def rewritten(traced: Traced, rewrites: Sequence[Rewrite]) -> Traced:
    """A graph after these rewrites, one after another."""
    for rewrite in rewrites:
        traced = rewrite(traced)
    return traced


def rewrite_from(data: Mapping[str, Any]) -> Rewrite:
    """A rewrite from what a TOML file holds."""
    return Apart(**data) if "parts" in data else Reorder(**data)
