"""Writing a graph again with some of its regions as loops."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from hairpin.graph.axes import Span
from hairpin.graph.concrete import first_part
from hairpin.graph.export import shape_of
from hairpin.graph.halo import (
    NO_HALO,
    has_halo,
    is_statistical,
    is_windowed,
    normalized,
    trimmed,
    units_of,
    write_convolution,
    write_group_norm,
)
from hairpin.graph.lengths import hints, same_size
from hairpin.graph.memory import Flow, Step, flow_of, inplace, may_alias, operands, same_layout
from hairpin.planning.loops.loop import Loop, Out
from hairpin.planning.loops.masks import draw_seed, keyed_dropout, keyed_native_dropout
from hairpin.planning.loops.regions import Seed, Walk, axis_span, fits, reusable, seed_length, walk


class EmissionError(Exception):
    """A region cannot be written as a loop; the search leaves it out.

    Attributes:
        place: of the region among those that were to be written.
    """

    place = 0


@dataclass(frozen=True)
class Region:
    """A window of steps to be run as a loop.

    Attributes:
        start, end: the window, end not included.
        seed: the tensor cut, or summed, and along which axis.
        inner: regions of the loop's body at chunk size 1, by its own steps, with their chunks.
    """

    start: int
    end: int
    seed: Seed
    inner: tuple[tuple["Region", int], ...] = ()


@dataclass(eq=False)
class Emitted:
    """The graph with loops. It takes the original inputs, then a chunk size for each loop.

    Attributes:
        loops: name of each loop -> its region, outer loops first.
        bound: whether it holds for the example's lengths alone, since a loop cuts a dim that the
            graph merged from several lengths, or has loops inside.
    """

    module: fx.GraphModule
    loops: Mapping[str, Region]
    bound: bool = False


def emit(flow: Flow, regions: Sequence[Region], *, reuse: bool = True) -> Emitted:
    """Write the graph with these disjoint regions as loops.

    Args:
        reuse: let pointwise operations and loops write into storages that nobody reads again.

    Raises:
        EmissionError: a region needs a length of a tensor that exists only in parts.
    """
    writer = _Writer(flow, sorted(regions, key=lambda region: region.start), reuse=reuse)
    return writer.write()


def body_of(flow: Flow, region: Region) -> Flow:
    """The steps of one turn of a region's loop at chunk size 1.

    Raises:
        EmissionError: the region cannot be a loop, or its turns depend on where they begin.
    """
    writer = _Writer(flow, [replace(region, inner=())], reuse=False)
    loop = writer.write().module.get_submodule("loop_1")
    assert isinstance(loop, Loop)
    return _one_turn(loop)


def _one_turn(loop: Loop) -> Flow:
    given = [node.meta["val"] for node in loop.body.graph.nodes if node.op == "placeholder"]
    if loop.counts_from or None in [value for value in given if not isinstance(value, Tensor)]:
        raise EmissionError("a turn that depends on more than its parts has no loops inside")
    return flow_of(first_part(loop.body.graph, loop.cuts))


class _Writer:
    def __init__(self, flow: Flow, regions: Sequence[Region], *, reuse: bool) -> None:
        self.flow = flow
        self.regions = list(regions)
        self.reuse = reuse
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.modules = nn.Module()
        self.loops: dict[str, Region] = {}
        self.chunks: dict[str, fx.Node] = {}
        self.bound = False
        self.masks = _dropouts(flow.graph)
        self.seed: fx.Node | None = None

    def write(self) -> Emitted:
        nodes = list(self.flow.graph.nodes)
        self._inputs([node for node in nodes if node.op == "placeholder"])
        for node in nodes:
            name = self._loop_around(node)
            if node.op == "output":
                self._output(node)
            elif node.op != "placeholder" and name is None:
                self.env[node] = self._copy(node)
            elif name is not None and self.flow.index[node] == self.loops[name].end - 1:
                self._region(name)
        module = fx.GraphModule(self.modules, self.graph)
        module.graph.eliminate_dead_code()
        if self.reuse:
            reuse_storages(module.graph)
        module.graph.lint()
        module.recompile()
        return Emitted(module, self.loops, self.bound)

    def _inputs(self, placeholders: Sequence[fx.Node]) -> None:
        """The original inputs, a chunk size for each loop, and the seed of the dropouts."""
        for node in placeholders:
            self.env[node] = self._copy(node)
        for number, region in enumerate(self.regions, start=1):
            chunk = self.graph.placeholder(f"chunk_{number}")
            chunk.meta["val"] = 1
            self.loops[f"loop_{number}"] = region
            self.chunks[f"loop_{number}"] = chunk
        if self.masks:
            self.seed = self.graph.call_function(draw_seed)
            self.seed.meta["val"] = 0

    def _loop_around(self, node: fx.Node) -> str | None:
        """Name of the loop whose window a step is in."""
        place = self.flow.index.get(node)
        if place is None:
            return None
        return next((n for n, r in self.loops.items() if r.start <= place < r.end), None)

    def _region(self, name: str) -> None:
        try:
            _RegionWriter(self, name, self.loops[name]).write()
        except EmissionError as error:
            error.place = list(self.loops).index(name)
            raise

    def whole(self, node: fx.Node) -> fx.Node:
        """The whole value of a node of the source; views of what a loop wrote are made again."""
        if node in self.env:
            return self.env[node]
        place = self.flow.index.get(node)
        if place is None or not (
            self.flow.steps[place].is_view or _is_getitem(node) or not _has_tensors(node)
        ):
            raise EmissionError(f"{node.name} exists in parts only")
        self.env[node] = self._copy(node)
        return self.env[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        made = self.graph.node_copy(node, self.whole)
        if node in self.masks:
            _key(made, self.seed, self.masks[node], ())
        return made

    def _output(self, node: fx.Node) -> None:
        self.graph.output(fx.node.map_arg(node.args[0], self.whole))


def _bound(placeholder: fx.Node, value: int, node: fx.Node) -> Any:
    """What a reader of an input is given where that input has one value only."""
    return value if node is placeholder else node


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list))


def _dropouts(graph: fx.Graph) -> dict[fx.Node, int]:
    """The dropouts that drop something, numbered."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if str(getattr(node.target, "overloadpacket", "")) not in _KEYED:
            continue
        given: list[Any] = [*node.args[1:], *node.kwargs.values()]
        probability, train = given
        if probability and train is not False:
            found[node] = len(found)
    return found


_KEYED = MappingProxyType(
    {"aten.dropout": keyed_dropout, "aten.native_dropout": keyed_native_dropout}
)


def _key(made: fx.Node, seed: fx.Node | None, number: int, place: tuple[Any, ...]) -> None:
    """Turn a dropout into one whose mask goes by position.

    Args:
        place: dim that is cut, and where along it the part begins.
    """
    x, probability = (*made.args, *made.kwargs.values())[:2]
    made.target = _KEYED[str(made.target.overloadpacket)]  # type: ignore[union-attr]
    made.args, made.kwargs = (x, probability, seed, number, *place), {}


SIZES = {
    "aten.view": 1,
    "aten.reshape": 1,
    "aten._unsafe_view": 1,
    "aten.expand": 1,
    "aten.unflatten": 2,
    "aten.full": 0,
    "aten.zeros": 0,
    "aten.ones": 0,
    "aten.empty": 0,
    "aten.new_zeros": 1,
    "aten.new_ones": 1,
    "aten.new_full": 1,
    "aten.new_empty": 1,
}  # place of the argument that gives the lengths of the result


_UNITS = "units"  # stands for the number of all units among a loop's inputs


def _is_resized(step: Step) -> bool:
    return step.operation is not None and step.operation.name in SIZES


class _RegionWriter:
    """Writes one region: the steps ahead of its loop, the loop, and its results."""

    def __init__(self, writer: _Writer, name: str, region: Region) -> None:
        self.writer = writer
        self.name = name
        self.region = region
        self.flow = writer.flow
        self.state: Walk = walk(self.flow, region.end, region.seed)
        self.body = fx.Graph()
        self.body_env: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Span | None], fx.Node] = {}
        self.given: list[tuple[Any, Span | None]] = []
        self.place: tuple[fx.Node, ...] = ()  # start, count and all units, where parts overlap
        self.inside: dict[int, Step] = {}

    def write(self) -> None:
        region, state = self.region, self.state
        steps = self.flow.steps[region.start : region.end]
        for step in steps:
            status = state.status.get(step.index, "unused")
            if status in ("loop", "both") and not self._views_outside(step):
                self.inside[step.index] = step
        for step in steps:
            status = state.status.get(step.index, "unused")
            if status in ("ahead", "both") or (status == "loop" and step.index not in self.inside):
                made = self.writer._copy(step.node)
                made.meta["ahead_of"] = self.name
                self.writer.env[step.node] = made
        self.count = self.body.placeholder("count")
        self.count.meta["val"] = 1
        self.begin: fx.Node | None = None
        overlaps = any(has_halo(span) for s in self.inside.values() for _, span in self._sources(s))
        if overlaps or any(step.node in self.writer.masks for step in self.inside.values()):
            self.begin = self.body.placeholder("start")
            self.begin.meta["val"] = 0
        if overlaps:
            assert self.begin is not None
            self.place = (self.begin, self.count, self.body.placeholder("units"))
            self.place[2].meta["val"] = 1
            self.given.append((_UNITS, None))
        for step in self.inside.values():
            if self._takes_statistics(step):
                found = self.body.placeholder(f"{step.node.name}_statistics")
                found.meta["val"] = None
                self.taken[step.node, None] = found
                self.given.append((step, None))
        self._placeholders()
        for step in self.inside.values():
            self.body_env[step.node] = self._inside(step)
        self._finish()

    def _takes_statistics(self, step: Step) -> bool:
        """Whether a step is a group norm that is cut along a dim it normalises over."""
        return is_statistical(step.operation, step.axes[self.state.demands[step.index][0]])

    def _views_outside(self, step: Step) -> bool:
        """Whether a step only views, or picks from, what is whole when the loop begins."""
        if _is_getitem(step.node):
            return self.flow.index.get(step.inputs[0]) not in self.inside
        if not step.is_view:
            return False
        place = self.flow.index.get(step.root)
        return place is None or place not in self.inside

    def _placeholders(self) -> None:
        """One input of the body for each (value, part) that its steps take from outside."""
        for step in self.inside.values():
            for source, span in self._sources(step):
                key = (source, span)
                if key in self.taken:
                    continue
                name = source.name if span is None else f"{source.name}_part"
                made = self.body.placeholder(name)
                made.target = made.name  # two parts of one value must not have one name
                made.meta = dict(source.meta)
                self.taken[key] = made
                self.given.append(key)

    def _sources(self, step: Step) -> list[tuple[fx.Node, Span | None]]:
        """Values that a step inside the loop takes from outside, with their parts."""
        found: list[tuple[fx.Node, Span | None]] = []
        spans = self._spans(step)
        for count, source in enumerate(step.inputs):
            if self.flow.index.get(source) not in self.inside:
                found.append((source, spans.get(count)))
        found.extend(
            (source, None)
            for source in step.node.all_input_nodes
            if source not in step.inputs and not self._is_tensor(source)
        )
        if step.node in self.writer.masks:
            assert self.writer.seed is not None
            found.append((self.writer.seed, None))
        return found

    @staticmethod
    def _is_tensor(node: fx.Node) -> bool:
        return _has_tensors(node)

    def _spans(self, step: Step) -> dict[int, Span]:
        parts = {count: self.state.part(step, count) for count in range(len(step.inputs))}
        return {count: span for count, span in parts.items() if span is not None}

    def _part(self, node: fx.Node, span: Span | None) -> fx.Node:
        """The value of a step inside, without what only other readers want around it."""
        made = self.body_env[node]
        own = self.state.out_span(self.flow.steps[self.flow.index[node]])
        if own is None or span is None or (own.before, own.after) == (span.before, span.after):
            return made
        if not isinstance(node.meta["val"], Tensor):
            raise EmissionError(f"parts of {node.name} overlap in several ways")
        have, want = (own.before, own.after), (span.before, span.after)
        view = self.body.call_function(trimmed, (made, (own.dim, own.unit), have, want, self.place))
        view.meta["val"] = node.meta["val"]
        return view

    def _inside(self, step: Step) -> fx.Node:
        """One step in the body, its lengths along the cut dim replaced by the chunk's."""
        node = step.node
        spans = self._spans(step)
        counter = iter(range(len(step.inputs)))

        def value(source: fx.Node) -> fx.Node:
            if not self._is_tensor(source):
                return self.taken[source, None]
            count = next(counter)
            if self.flow.index.get(source) in self.inside:
                return self._part(source, spans.get(count))
            return self.taken[source, spans.get(count)]

        number, scale = self.state.demands[step.index]
        if is_windowed(step.operation, step.axes[number]):
            assert step.operation is not None
            halo = self.state.halos.get(step.index, NO_HALO)
            inputs = [value(source) for source in step.inputs]
            made = write_convolution(
                self.body, step.operation, inputs, (step.axes[number], scale, halo), self.place
            )
            made.meta = dict(node.meta)
            return made
        if self._takes_statistics(step):
            statistics = self.taken[node, None]
            made = self.body.call_function(normalized, (value(step.inputs[0]), statistics))
            made.meta = dict(node.meta)
            return made
        args = fx.node.map_arg(node.args, value)
        kwargs = fx.node.map_arg(dict(node.kwargs), value)
        target, resized = self._resized(step, node.target, list(args))
        made = self.body.create_node(node.op, target, tuple(resized), kwargs, name=node.name)
        made.meta = dict(node.meta)
        if node in self.writer.masks:
            assert self.writer.seed is not None
            seed = self.taken[self.writer.seed, None]
            _key(made, seed, self.writer.masks[node], self._begins(step))
        return made

    def _begins(self, step: Step) -> tuple[Any, ...]:
        """The dim of a step's result that is cut, and where along it the turn's part begins."""
        number, scale = self.state.demands[step.index]
        span = step.axes[number].outputs[0]
        unit = span.unit * scale
        begin: Any = self.begin
        if unit != 1:
            begin = self.body.call_function(operator.mul, (self.begin, unit))
        return span.dim, begin

    def _resized(self, step: Step, target: Any, args: list[Any]) -> tuple[Any, list[Any]]:
        name = str(getattr(target, "overloadpacket", target))
        place = SIZES.get(name)
        if place is None:
            return target, args
        number, scale = self.state.demands[step.index]
        out = step.axes[number].outputs.get(0)
        if name in ("aten.view", "aten._unsafe_view"):
            target = torch.ops.aten.reshape.default
        if out is None:
            return target, args
        sizes = list(args[place])
        dim = out.dim
        if name == "aten.unflatten":
            split = int(args[1]) % len(step.operation.inputs[0])  # type: ignore[union-attr]
            if not split <= dim < split + len(sizes):
                return target, args
            dim -= split
        unit = out.unit * scale
        sizes[dim] = (
            self.count if unit == 1 else self.body.call_function(operator.mul, (self.count, unit))
        )
        args[place] = sizes
        return target, args

    def _finish(self) -> None:
        """Close the body, and call the loop where the region was."""
        state, writer = self.state, self.writer
        outs = [self.flow.steps[index] for index in state.outs if index in self.inside]
        if not outs or not any(span for _, span in self.given):
            raise EmissionError("the loop writes nothing, or cuts nothing")
        self._check_lengths(outs)
        into = self._write_back(outs) if writer.reuse else {}
        self.body.output(tuple(self._part(out.node, self._out_span(out)) for out in outs))
        if writer.reuse and not self.region.inner:
            reuse_storages(self.body)
        loop = Loop(
            fx.GraphModule(nn.Module(), self.body),
            [span for _, span in self.given],
            [self._out(out, into.get(out.index)) for out in outs],
            counts_from=self.begin is not None,
        )
        if self.region.inner:
            loop.body = self._with_loops(loop)
        writer.modules.add_module(self.name, loop)
        arguments = tuple(self._argument(source) for source, _ in self.given)
        call = writer.graph.call_module(self.name, (writer.chunks[self.name], *arguments))
        values = [out.node.meta["val"] for out in outs]
        call.meta["val"] = values[0] if len(values) == 1 else tuple(values)
        for place, out in enumerate(outs):
            made = call
            if len(outs) > 1:
                made = writer.graph.call_function(operator.getitem, (call, place))
                made.meta["val"] = values[place]
            writer.env[out.node] = made

    def _with_loops(self, loop: Loop) -> fx.GraphModule:
        """The body with loops of its own, whose chunk sizes are written into it."""
        self.writer.bound = True
        regions, chunks = zip(*self.region.inner, strict=True)
        module = emit(_one_turn(loop), regions, reuse=self.writer.reuse).module
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node, chunk in zip(placeholders[-len(chunks) :], chunks, strict=True):
            for user in list(node.users):
                user.args = fx.node.map_arg(user.args, partial(_bound, node, chunk))
            module.graph.erase_node(node)
        module.recompile()
        return module

    def _argument(self, source: Any) -> fx.Node:
        """What the loop is called with for one of its inputs."""
        if source is self.writer.seed:
            return cast(fx.Node, source)
        if isinstance(source, Step):
            assert source.operation is not None
            inputs = [self.writer.whole(each) for each in source.inputs]
            return write_group_norm(self.writer.graph, source.operation, inputs)
        if source is not _UNITS:
            return self.writer.whole(source)
        cut, span = next((source, span) for source, span in self.given if span is not None)
        made = self.writer.graph.call_function(
            units_of, (self.writer.whole(cut), span.dim, span.unit)
        )
        made.meta["val"] = 1
        return made

    def _out_span(self, step: Step) -> Span | None:
        """The part of an output that is written: without a halo."""
        number, scale = self.state.demands[step.index]
        span = step.axes[number].outputs.get(0)
        return None if span is None else Span(span.dim, span.unit * scale)

    def _check_lengths(self, outs: Sequence[Step]) -> None:
        """Raise unless everything cut has as many units as the loop."""
        units = self.state.units
        cuts = [(source, span) for source, span in self.given if span is not None]
        for out in outs:
            number, scale = self.state.demands[out.index]
            span = out.axes[number].outputs.get(0)
            if span is not None:
                cuts.append((out.node, Span(span.dim, span.unit * scale)))
        whole = seed_length(self.flow, self.region.seed)
        unit = axis_span(self.flow.steps[self.region.seed.step].axes[self.region.seed.axis]).unit
        resized = [(s.node, self._out_span(s)) for s in self.inside.values() if _is_resized(s)]
        for node, span in [*cuts, *((n, s) for n, s in resized if s is not None)]:
            length = node.meta["val"].shape[span.dim]
            if not same_size(length, whole, span.unit, unit * self.region.seed.scale):
                self.writer.bound = True
        for node, span in cuts:
            if shape_of(node.meta["val"])[span.dim] != units * span.unit:
                raise EmissionError(f"{node.name} has other lengths than the loop")

    def _write_back(self, outs: Sequence[Step]) -> dict[int, int]:
        """For each output that can take over the storage of an input: that input's place."""
        free = [
            source
            for source in reusable(self.state, self.region.start)
            if sum(given is source.node for given, _ in self.given) == 1
        ]
        found = {}
        for out in outs:
            for source in free:
                if fits(self.state, source, out):
                    place = next(i for i, (g, _) in enumerate(self.given) if g is source.node)
                    found[out.index] = place
                    free.remove(source)
                    break
        return found

    def _out(self, step: Step, into: int | None) -> Out:
        value: Tensor = step.node.meta["val"]
        strides = hints(value.stride())
        shape = shape_of(value)
        order = tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], shape[d] == 1, d)))
        number, scale = self.state.demands[step.index]
        span = step.axes[number].outputs.get(0)
        if span is None:
            return Out(None, order)
        return Out(Span(span.dim, span.unit * scale), order, into)


def reuse_storages(graph: fx.Graph) -> None:
    """Let pointwise operations write into operands that this graph made and nobody reads again."""
    nodes = list(graph.nodes)
    owner: dict[fx.Node, fx.Node | None] = {}  # node -> the node here that made its storage
    last: dict[fx.Node, int] = {}
    place = {node: number for number, node in enumerate(nodes)}
    by_storage: dict[int, fx.Node | None] = {}
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        key = int(value.untyped_storage()._cdata)
        if key not in by_storage:
            by_storage[key] = None if may_alias(node) else node
        owner[node] = by_storage[key]
    for node in nodes:
        root = owner.get(node)
        if root is not None:
            users = [place[user] for user in node.users]
            last[root] = max([last.get(root, 0), *users])
        if node.op == "output":
            for used in node.all_input_nodes:
                root = owner.get(used)
                if root is not None:
                    last[root] = len(nodes)
    for node in nodes:
        _write_into_operand(node, owner, last, place)


def _write_into_operand(
    node: fx.Node,
    owner: dict[fx.Node, fx.Node | None],
    last: dict[fx.Node, int],
    place: dict[fx.Node, int],
) -> None:
    variant = inplace(node.target)
    if variant is None or node.kwargs.get("out") is not None or not node.args:
        return
    for operand in operands(node):
        root = owner.get(operand)
        if root is None or last[root] != place[node] or not same_layout(operand, node):
            continue
        number = node.args.index(operand)
        others = [arg for i, arg in enumerate(node.args) if i != number]
        if any(owner.get(arg) is root for arg in others if isinstance(arg, fx.Node)):
            continue  # the operand is read in another arrangement at the same time
        node.args = (operand, *others)
        node.target = variant
        mine = owner.get(node)
        if mine is not None:
            for value, maker in owner.items():
                if maker is mine:
                    owner[value] = root
            last[root] = last[mine]
        return
