"""Values made at once and then cut into parts, such as queries, keys and values: made apart.

A product that makes several things at once makes all of them whole, however little a loop asks of
each. Made apart, from parts of the weights, each can be made in parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from hairpin.graph.axes import Axis
from hairpin.graph.concrete import computed
from hairpin.graph.export import Traced
from hairpin.graph.halo import has_halo
from hairpin.graph.memory import Flow, Step, flow_of, tensors
from hairpin.planning.loops.emit import SIZES
from hairpin.planning.loops.regions import flops


@dataclass(frozen=True)
class Apart:
    """Parts of values are made one by one, from parts of weights.

    Attributes:
        parts: how many there are.
    """

    parts: int

    @classmethod
    def of(cls, traced: Traced) -> "Apart | None":
        """All parts in a graph that can be made apart; None where there are none."""
        parts = len(_parts(flow_of(traced.graph)))
        return cls(parts) if parts else None

    def __call__(self, traced: Traced) -> Traced:
        """The graph with its parts made apart; it takes and gives what it did."""
        graph = _Writer(flow_of(traced.graph)).write()
        return replace(traced, graph=graph, source=traced.source or traced)


@dataclass(frozen=True)
class _Part:
    """``length`` elements of a dim of a value, from ``start`` on; ``drops`` takes the dim away."""

    value: fx.Node
    dim: int
    start: int
    length: int
    drops: bool = False


def _parts(flow: Flow) -> dict[fx.Node, _Part]:
    """Nodes that are such parts."""
    found: dict[fx.Node, _Part] = {}
    for step in flow.steps:
        cuts = {node: part for user in step.node.users for node, part in _cuts(user)}
        alone = all(any(True for _ in _cuts(user)) for user in step.node.users)
        if alone and cuts and all(_Chain(flow).can(part) for part in cuts.values()):
            found.update(cuts)
    return found


def _cuts(node: fx.Node) -> Iterator[tuple[fx.Node, _Part]]:
    """What a node takes out of its first argument."""
    packet = str(getattr(node.target, "overloadpacket", ""))
    if packet not in _CUTS or not isinstance(node.args[0], fx.Node):
        return
    value, given = node.args[0], node.args
    rank = value.meta["val"].dim()
    place = 0 if packet in ("aten.unbind", "aten.select", "aten.slice") else 1
    at = given[place + 1] if len(given) > place + 1 else node.kwargs.get("dim", 0)
    dim = int(at) % rank  # type: ignore[arg-type]
    whole, made = value.meta["val"].shape[dim], node.meta["val"]
    if not isinstance(whole, int):
        return
    if packet == "aten.select":
        yield node, _Part(value, dim, int(given[2]) % whole, 1, drops=True)  # type: ignore[arg-type]
    elif packet == "aten.slice":
        start = int(given[2] or 0) if len(given) > 2 else 0  # type: ignore[arg-type]
        if len(given) <= 4 or given[4] == 1:
            yield (
                node,
                _Part(
                    value, dim, min(start % whole if start < 0 else start, whole), made.shape[dim]
                ),
            )
    else:
        drops = packet == "aten.unbind"
        lengths = [1 if drops else part.shape[dim] for part in made]
        for user in node.users:
            number = int(user.args[1])  # type: ignore[arg-type]
            yield user, _Part(value, dim, sum(lengths[:number]), lengths[number], drops)


_CUTS = frozenset(
    {
        "aten.split",
        "aten.split_with_sizes",
        "aten.chunk",
        "aten.unbind",
        "aten.select",
        "aten.slice",
    }
)


def _axis(step: Step, part: _Part) -> Axis | None:
    """The axis along which a step makes the part alone."""
    if step.operation is None or len(step.operation.outputs) != 1:
        return None
    for axis in step.axes:
        out = axis.outputs.get(0)
        if out is None or out.dim != part.dim or axis.sums or has_halo(out):
            continue
        if part.start % out.unit == 0 and part.length % out.unit == 0:
            return axis
    return None


def _sources(step: Step, axis: Axis, part: _Part) -> list[_Part | None]:
    """For each input of a step, the part of it that is needed; None for the whole."""
    unit = axis.outputs[0].unit
    found: list[_Part | None] = []
    for place, source in enumerate(step.inputs):
        span = axis.inputs.get(place)
        if span is None:
            found.append(None)
            continue
        start, length = (n // unit * span.unit for n in (part.start, part.length))
        found.append(_Part(source, span.dim, start, length))
    return found


@dataclass(eq=False)
class _Chain:
    """The steps that lead from weights to a value of which only parts are wanted."""

    flow: Flow
    nodes: set[fx.Node] = field(default_factory=set)
    products: int = 0

    def can(self, part: _Part) -> bool:
        """Whether a product can make the part alone, and nothing else reads the way to it."""
        able = self._follow(part) and self.products > 0
        inner = self.nodes - {part.value}
        return able and all(set(node.users) <= self.nodes for node in inner)

    def _follow(self, part: _Part) -> bool:
        place = self.flow.index.get(part.value)
        if place is None:
            return part.value.op == "placeholder"
        step = self.flow.steps[place]
        axis = _axis(step, part)
        if axis is None:
            return False
        self.nodes.add(part.value)
        self.products += flops(step) > 0
        return all(each is None or self._follow(each) for each in _sources(step, axis, part))


class _Writer:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.parts = _parts(flow)
        old = [t for node in self.parts for t in tensors(node.meta["val"])]
        self.replaced = {int(t.untyped_storage()._cdata) for t in old}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.made: dict[_Part, fx.Node] = {}

    def write(self) -> fx.Graph:
        """The graph, its parts made apart."""
        for node in self.flow.graph.nodes:
            part = self.parts.get(node)
            self.env[node] = self._copied(node) if part is None else self._used(part)
        self.graph.eliminate_dead_code()
        return self.graph

    def _copied(self, node: fx.Node) -> fx.Node:
        """A node as it was; views of what is made apart now lie in its storage."""
        made = self.graph.node_copy(node, self.env.__getitem__)
        mine = {int(t.untyped_storage()._cdata) for t in tensors(node.meta.get("val"))}
        if node.op == "call_function" and mine & self.replaced:
            made.meta = {**node.meta, "val": computed(made)}
        return made

    def _used(self, part: _Part) -> fx.Node:
        made = self._make(replace(part, drops=False))
        return self._call("select", made, part.dim, 0) if part.drops else made

    def _call(self, name: str, *args: Any) -> fx.Node:
        packet = getattr(torch.ops.aten, name)
        made = self.graph.call_function(getattr(packet, _OVERLOADS[name]), args)
        made.meta["val"] = computed(made)
        return made

    def _make(self, part: _Part) -> fx.Node:
        """A part made without the rest of its value."""
        if part not in self.made:
            place = self.flow.index.get(part.value)
            end = part.start + part.length
            self.made[part] = (
                self._call("slice", self.env[part.value], part.dim, part.start, end)
                if place is None
                else self._step(self.flow.steps[place], part)
            )
        return self.made[part]

    def _step(self, step: Step, part: _Part) -> fx.Node:
        axis = _axis(step, part)
        assert axis is not None
        parts = iter(_sources(step, axis, part))

        def value(source: fx.Node) -> fx.Node:
            if not isinstance(source.meta.get("val"), Tensor):
                return self.env[source]
            wanted = next(parts)
            return self.env[source] if wanted is None else self._make(wanted)

        node = step.node
        args = list(fx.node.map_arg(node.args, value))
        kwargs = fx.node.map_arg(dict(node.kwargs), value)
        target, sizes = node.target, SIZES.get(str(getattr(node.target, "overloadpacket", "")))
        if sizes is not None:
            lengths: list[Any] = list(args[sizes])  # type: ignore[arg-type]
            lengths[part.dim] = part.length
            args[sizes] = lengths
        made = self.graph.create_node(node.op, target, tuple(args), kwargs)
        made.meta = {**node.meta, "val": computed(made)}
        return made


_OVERLOADS = {"slice": "Tensor", "select": "int"}
