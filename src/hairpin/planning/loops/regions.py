"""Regions of a graph that can run as a loop over chunks of one dim, and what each would hold.

A region is a window of consecutive steps and a seed: the last tensor that the window makes, with
the dim to cut (or the dim to sum over). Walking back from the seed, each step is either inside the
loop (all its readers want the same part of it), or ahead of it (someone needs it whole, or it
cannot be cut). Every region found so is right; memory and time decide which is worth having.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from hairpin.graph.axes import Axis, Span
from hairpin.graph.halo import NO_HALO, Halo, asked, halo_for, has_halo, is_statistical, is_windowed
from hairpin.graph.lengths import alike
from hairpin.graph.memory import Flow, Step, may_alias

CACHED_BYTES = 2 * 2**20  # what a turn holds below this is still in the cache when it is read
FRESH_BYTES = 32 * 2**20  # storages from this size on: the C library gives them back each time

Status = Literal["loop", "ahead", "both", "after", "unused"]


@dataclass(frozen=True)
class Seed:
    """Where a region's loop comes from: a step, the place of the axis in its rules, and a scale."""

    step: int
    axis: int
    scale: int = 1


@dataclass(frozen=True, eq=False)
class Inside:
    """A turn of a loop at chunk size 1, as a graph of its own, and the regions in it."""

    flow: Flow
    marks: tuple[int, ...]
    found: tuple["Candidate", ...]


@dataclass(frozen=True)
class Candidate:
    """A region with what its loop would hold, in bytes at the example's lengths.

    Attributes:
        start, end: the window of steps, end not included.
        units: turns of the loop at chunk size 1.
        ahead_bytes: most bytes alive while the steps ahead of the loop run.
        fixed_bytes: alive during the loop whatever the chunk size.
        moments: (bytes, bytes per unit) alive in a turn at the times that matter.
        saved_bytes: storages of inputs that outputs are written back into, already subtracted.
        steps: inside the loop.
        reread_bytes: read whole in every turn: weights, keys and values.
        repeated_bytes: of the steps computed both ahead and inside.
        copied_bytes: of outputs that are written part by part.
        thin_flops: multiplications and additions of the products that the loop makes thinner, each
            over the rows (or columns) that it has at chunk size 1.
        product_flops: those of all products inside the loop.
        made_bytes: of the storages that the loop makes, as they are without it: those too large for
            the cache, and those that the system hands out anew each time.
        largest_bytes: of one of them.
        kept_bytes: what training keeps of the region until the backward: its outputs and all that
            the steps ahead of the loop made.
        turn_bytes: everything that a turn makes, per unit: what its backward needs at once.
        overlap_flops: that every turn repeats, of rows that neighbouring chunks share.
        inside: where a turn is one unit that runs as loops in its turn; ``moments`` then says what
            it holds at the smallest of their chunks.
    """

    start: int
    end: int
    seed: Seed
    units: int
    ahead_bytes: int
    fixed_bytes: int
    moments: tuple[tuple[int, float], ...]
    saved_bytes: int
    steps: int
    reread_bytes: int
    repeated_bytes: int
    copied_bytes: int
    thin_flops: float
    product_flops: float
    made_bytes: tuple[int, int]
    largest_bytes: int
    kept_bytes: int
    turn_bytes: float
    overlap_flops: float = 0.0
    inside: Inside | None = None

    @property
    def unit_bytes(self) -> float:
        """Most bytes alive in a turn per unit of the chunk size."""
        return max((unit for _, unit in self.moments), default=0.0)

    def turn(self, chunk: int) -> float:
        """Most bytes alive in a turn, beyond the fixed ones."""
        return max((own + unit * chunk for own, unit in self.moments), default=0.0)

    @property
    def key(self) -> tuple[int, int, Seed, bool]:
        """Names the region, and whether it has loops inside."""
        return self.start, self.end, self.seed, self.inside is not None


@dataclass(eq=False)
class Walk:
    """The walk back from one seed: what is asked of every step before the window's end."""

    flow: Flow
    end: int
    seed: Seed
    demands: dict[int, tuple[int, int]] = field(default_factory=dict)  # step -> (axis, scale)
    spans: dict[fx.Node, set[Span]] = field(default_factory=dict)  # parts asked of a node
    whole_in_loop: set[fx.Node] = field(default_factory=set)  # needed whole in every turn
    whole_ahead: set[fx.Node] = field(default_factory=set)  # needed whole before the loop
    halos: dict[int, Halo] = field(default_factory=dict)  # step -> elements around its part
    whole_once: set[fx.Node] = field(default_factory=set)  # needed whole just before the loop
    status: dict[int, Status] = field(default_factory=dict)
    outs: list[int] = field(default_factory=list)  # steps whose storage the loop writes
    sums: bool = False

    length: int | None = None  # of the seed's dim, where it is not the example's

    def part(self, step: Step, place: int) -> Span | None:
        """The part of an input that a step inside the loop takes; None for the whole."""
        number, scale = self.demands[step.index]
        return asked(step.axes[number], place, scale, self.halos.get(step.index, NO_HALO))

    def out_span(self, step: Step) -> Span | None:
        """The part of its first result that a step inside the loop makes."""
        number, scale = self.demands[step.index]
        span = step.axes[number].outputs.get(0)
        if span is None:
            return None
        return Span(span.dim, span.unit * scale, *self.halos.get(step.index, NO_HALO))

    @property
    def units(self) -> int:
        """Turns at chunk size 1."""
        if self.length is None:
            return self.example_units
        axis = self.flow.steps[self.seed.step].axes[self.seed.axis]
        return self.length // axis_span(axis).unit // self.seed.scale

    @property
    def example_units(self) -> int:
        """The same at the example's lengths."""
        step = self.flow.steps[self.seed.step]
        return axis_length(step, step.axes[self.seed.axis]) // self.seed.scale


def axis_span(axis: Axis) -> Span:
    """The first span of an axis, of an output where there is one."""
    return next(iter((axis.outputs or axis.inputs).values()))


def seed_length(flow: Flow, seed: Seed) -> Any:
    """The (symbolic) length of the dim that a seed cuts."""
    step = flow.steps[seed.step]
    axis = step.axes[seed.axis]
    place, span = next(iter((axis.outputs or axis.inputs).items()))
    node = step.node if axis.outputs else step.inputs[place]
    return node.meta["val"].shape[span.dim]


def axis_length(step: Step, axis: Axis) -> int:
    """Units that an axis has in a step."""
    assert step.operation is not None
    for shapes, spans in (
        (step.operation.outputs, axis.outputs),
        (step.operation.inputs, axis.inputs),
    ):
        for place, span in spans.items():
            return shapes[place][span.dim] // span.unit
    return 1


def matching(step: Step, place: int, span: Span) -> tuple[int, int] | None:
    """The axis of a step that gives output ``place`` in the parts ``span``, and its scale."""
    for number, axis in enumerate(step.axes):
        found = axis.outputs.get(place)
        if found is not None and found.dim == span.dim and span.unit % found.unit == 0:
            return number, span.unit // found.unit
    return None


def walk(flow: Flow, end: int, seed: Seed) -> Walk:
    """Follow the seed's parts back to the beginning of the graph."""
    first = _walk(flow, end, seed, {})
    hints = _forward(flow, first, end)
    return _walk(flow, end, seed, hints) if hints else first


def _walk(flow: Flow, end: int, seed: Seed, hints: dict[int, tuple[int, int]]) -> Walk:
    state = Walk(flow, end, seed)
    seed_step = flow.steps[seed.step]
    state.sums = seed_step.axes[seed.axis].sums
    roots_out = _roots_out(flow, end)
    for index in range(end - 1, -1, -1):
        _visit(state, flow.steps[index], roots_out, hints)
    return state


def _roots_out(flow: Flow, end: int) -> frozenset[fx.Node]:
    """Nodes whose storage is read at or after ``end``."""
    return frozenset(step.node for step in flow.live_roots(end))


def _visit(
    state: Walk, step: Step, roots_out: frozenset[fx.Node], hints: dict[int, tuple[int, int]]
) -> None:
    """Decide where one step runs, and pass on what it needs of its inputs."""
    node, index = step.node, step.index
    whole = node in state.whole_in_loop or node in state.whole_ahead
    is_out = node in roots_out
    demand = _demand(state, step, hints if is_out and not whole else {}, whole=whole)
    halo = None
    if demand is not None:
        axis = step.axes[demand[0]]
        halo = halo_for(step.operation, axis, demand[1], state.spans.get(node, ()))
    if demand is None or halo is None:
        asked = bool(state.spans.get(node)) or whole or is_out
        if asked or not (step.is_view or step.last_use < state.end):
            _run_ahead(state, step)
        else:  # read by nobody here, or only as a view of what the loop wrote
            state.status[index] = "after" if step.last_use >= state.end else "unused"
        return
    if whole and (is_out or not _worth_repeating(state, step)):
        _run_ahead(state, step)
        return
    state.status[index] = "both" if whole else "loop"
    if whole:
        _ask_whole(state, step)
    elif is_out:
        state.outs.append(index)
    state.demands[index], state.halos[index] = demand, halo
    _ask_parts(state, step)


def _demand(
    state: Walk, step: Step, hints: dict[int, tuple[int, int]], *, whole: bool
) -> tuple[int, int] | None:
    """The one kind of part that is wanted of a step, as (axis, scale)."""
    parts = state.spans.get(step.node, set())
    found = {_as_demand(step, span) for span in parts}
    if step.index == state.seed.step:
        own = (state.seed.axis, state.seed.scale)
        if state.sums:
            return None if parts or whole else own
        return own if found <= {own} and not whole else None
    if parts:
        return found.pop() if len(found) == 1 else None
    return hints.get(step.index)


def _as_demand(step: Step, span: Span) -> tuple[int, int] | None:
    """A part of a step's value as (axis, scale)."""
    return matching(step, 0, span)


def _run_ahead(state: Walk, step: Step) -> None:
    state.status[step.index] = "ahead"
    if step.is_view and step.node in state.whole_in_loop:
        state.whole_in_loop.update(step.inputs)  # its storage stays for the loop
    _ask_whole(state, step)


def _ask_whole(state: Walk, step: Step) -> None:
    for source in step.inputs:
        state.whole_ahead.add(source)


def _ask_parts(state: Walk, step: Step) -> None:
    """Ask each input for its part along the axis; those without one are needed whole each turn."""
    for count, source in enumerate(step.inputs):
        part = state.part(step, count)
        if part is None:
            state.whole_in_loop.add(source)
        else:
            state.spans.setdefault(source, set()).add(part)
    if is_statistical(step.operation, step.axes[state.demands[step.index][0]]):
        state.whole_ahead.add(step.inputs[0])
        state.whole_once.add(step.inputs[0])


_CHEAP = frozenset(
    {
        "aten.layer_norm",
        "aten.native_layer_norm",
        "aten.rms_norm",
        "aten.softmax",
        "aten._softmax",
        "aten.sum",
        "aten.mean",
    }
)


def _worth_repeating(state: Walk, step: Step) -> bool:
    """Whether to compute a step again inside the loop although it exists whole before it.

    Not if its whole value stays for the loop anyway, nor if keeping its inputs costs more.
    """
    if step.is_view:
        if step.node in state.whole_once:
            state.whole_once.update(step.inputs)
        return True
    if step.node in state.whole_in_loop | state.whole_once or step.operation is None:
        return False
    if not (step.operation.pointwise or step.operation.name in _CHEAP):
        return False
    big = [s for s in step.inputs if s in state.flow.index]
    return len(big) <= 1


def _forward(flow: Flow, known: Walk, end: int) -> dict[int, tuple[int, int]]:
    """For steps that nobody asked for: the axis along which their inputs are already cut."""
    hints: dict[int, tuple[int, int]] = {}
    spans: dict[fx.Node, Span] = {}
    for node, parts in known.spans.items():
        if len(parts) == 1:
            (part,) = parts
            spans[node] = Span(part.dim, part.unit)
    for step in flow.steps[:end]:
        if step.node in spans or step.index in known.demands:
            continue
        found = _axis_from_inputs(step, spans)
        if found is not None:
            number, scale = found
            hints[step.index] = found
            out = step.axes[number].outputs.get(0)
            if out is not None:
                spans[step.node] = Span(out.dim, out.unit * scale)
    return hints


def _axis_from_inputs(step: Step, spans: dict[fx.Node, Span]) -> tuple[int, int] | None:
    cut = {count: spans[s] for count, s in enumerate(step.inputs) if s in spans}
    if not cut:
        return None
    for number, axis in enumerate(step.axes):
        if axis.sums:
            continue
        scales = set()
        for count, span in cut.items():
            part = axis.inputs.get(count)
            if part is None or part.dim != span.dim or span.unit % part.unit or has_halo(part):
                scales = {0}
                break
            scales.add(span.unit // part.unit)
        if len(scales) == 1 and 0 not in scales:
            return number, scales.pop()
    return None


def seeds(flow: Flow, end: int) -> Iterator[Seed]:
    """Ways to cut the last storage that is alive at ``end``."""
    last = None
    for step in flow.live_roots(end):
        last = step
    if last is None:
        return
    for number, axis in enumerate(last.axes):
        if axis_length(last, axis) > 1:
            yield Seed(last.index, number)


def boundaries(flow: Flow, *, most: int = 72) -> list[int]:
    """Places between steps where little is alive: windows begin and end there."""
    live = flow.live_bytes
    count = len(flow.steps)
    inner = [
        b
        for b in range(1, count)
        if (live[b] <= live[b - 1] and (live[b] < live[b - 1] or live[b] < live[b + 1]))
        or (live[b] < live[b + 1] and live[b] <= live[b - 1])
    ]
    if len(inner) > most:
        inner = sorted(sorted(inner, key=lambda b: live[b])[:most])
    return [0, *inner, count]


def candidates(flow: Flow, marks: Sequence[int], *, widest: int = 220) -> Iterator[Candidate]:
    """Every region between two of the marks."""
    starts = sorted(marks, reverse=True)
    for end in marks[1:]:
        for seed in seeds(flow, end):
            found = walk(flow, end, seed)
            yield from sized(found, [s for s in starts if s < end and end - s <= widest])


def sized(state: Walk, starts: Sequence[int]) -> Iterator[Candidate]:
    """The same walk cut off at different starts, sizes added up as the window grows."""
    sizes = _Sizes(state)
    wanted = set(starts)
    lowest = min(starts, default=state.end)
    for index in range(state.end - 1, lowest - 1, -1):
        sizes.take(state.flow.steps[index])
        if index in wanted and sizes.steps:
            found = sizes.candidate(index)
            if found is not None:
                yield found


class _Sizes:
    """Bytes and work of a growing window."""

    def __init__(self, state: Walk) -> None:
        self.state = state
        end = state.end
        self.loop_profile = [0.0] * (end + 1)
        self.own_profile = [0] * (end + 1)
        self.ahead_profile = [0] * (end + 1)
        self.kept_ahead = 0
        self.made_ahead = 0
        self.turn_bytes = 0.0
        self.steps = 0
        self.out_bytes = 0
        self.copied = 0
        self.repeated = 0
        self.thin = 0.0
        self.flops = 0.0
        self.made = [0, 0]
        self.largest = 0
        self.overlap_flops = 0.0
        self.in_window: set[fx.Node] = set()
        self.outs: list[Step] = []
        self.reread: dict[fx.Node, int] = {}
        # last reader of each storage inside the loop, and ahead of it
        self.last_loop: dict[fx.Node, int] = {}
        self.last_ahead: dict[fx.Node, int] = {}
        for index in range(end):
            status = state.status.get(index)
            step = state.flow.steps[index]
            for source in step.inputs:
                root = self._root(source)
                if status in ("loop", "both"):
                    self.last_loop[root] = index
                if status in ("ahead", "both"):
                    self.last_ahead[root] = index

    def _root(self, node: fx.Node) -> fx.Node:
        place = self.state.flow.index.get(node)
        return node if place is None else self.state.flow.steps[place].root

    def take(self, step: Step) -> None:
        """Widen the window by the step before it."""
        state, index = self.state, step.index
        status = state.status.get(index, "unused")
        self.in_window.add(step.node)
        if status in ("loop", "both"):
            self._take_loop(step, repeated=status == "both")
        if status in ("ahead", "both") and step.nbytes:
            self.made_ahead += step.nbytes
            in_loop = step.node in self.last_loop and self._needed_by_loop(step)
            after = state.flow.storage_end[step.node] >= state.end
            if (in_loop or after) and status == "ahead":
                self.kept_ahead += step.nbytes
                last = state.end
            else:
                last = self.last_ahead.get(step.node, index)
            for time in range(index, min(last, state.end - 1) + 1):
                self.ahead_profile[time] += step.nbytes

    def _needed_by_loop(self, step: Step) -> bool:
        return self.state.status.get(step.index) == "ahead"

    def _take_loop(self, step: Step, *, repeated: bool) -> None:
        state = self.state
        index = step.index
        self.steps += 1
        if repeated:
            self.repeated += step.nbytes
        units = state.units
        operation = step.operation
        if index in state.outs:
            self.outs.append(step)
            self.out_bytes += step.nbytes
            self.copied += step.nbytes
        if step.nbytes:
            summed = state.sums and index == state.seed.step
            share = float(step.nbytes) if summed else step.nbytes / units
            self.turn_bytes += share
            self._note_made(step.nbytes)
            last = max(self.last_loop.get(step.node, index), index)
            first = index + 1 if self._takes_over(step) else step.made_at
            around = round(share * self._halo_units(step))
            for time in range(first, last + 1):
                self.loop_profile[time] += share
                self.own_profile[time] += around
        self._add_edges(step)
        if step.work:
            self._add_work(step)
        if operation is not None:
            work = flops(step)
            if work:
                self.flops += work
                self.thin += work / self._breadth(step)
                self.overlap_flops += work / units * self._halo_units(step)
        for source in step.inputs:
            if source in state.whole_in_loop:
                self.reread[source] = _node_bytes(source)

    def _note_made(self, nbytes: int) -> None:
        if nbytes > CACHED_BYTES:
            self.made[nbytes >= FRESH_BYTES] += nbytes
        self.largest = max(self.largest, nbytes)

    def _breadth(self, step: Step) -> float:
        """Rows or columns of a product at chunk size 1, whichever the loop cuts; inf for neither.

        A batched product has those of its matrices, any other all of its output but the columns.
        """
        operation = step.operation
        assert operation is not None
        number, _ = self.state.demands[step.index]
        span = step.axes[number].outputs.get(0)
        shape = operation.outputs[0]
        is_conv = "conv" in operation.name
        columns = 1 if is_conv else len(shape) - 1
        batched = not is_conv and (
            "scaled_dot_product" in operation.name
            or len(operation.inputs[_PRODUCTS.get(operation.name, 0) + 1]) > 2
        )
        if span is None or (batched and span.dim < len(shape) - 2):
            return float("inf")
        if span.dim == columns:
            return shape[columns] / self.state.units
        rows = shape[-2] if batched else math.prod(shape) / shape[columns]
        return rows / self.state.units

    def _halo_units(self, step: Step) -> float:
        """Units around its part that a step computes in every turn."""
        span = self.state.out_span(step)
        return 0.0 if span is None else (span.before + span.after) / span.unit

    def _add_edges(self, step: Step) -> None:
        """A convolution copies its part of the image where the padding is beside it."""
        if not is_windowed(step.operation, step.axes[self.state.demands[step.index][0]]):
            return
        for place, source in enumerate(step.inputs):
            span = self.state.part(step, place)
            if span is not None:
                share = _node_bytes(source) / self.state.units
                self.loop_profile[step.index] += share
                self.own_profile[step.index] += round(
                    share * (span.before + span.after) / span.unit
                )

    def _takes_over(self, step: Step) -> bool:
        """Whether its result goes into the storage of an operand that the loop made."""
        source = step.takes_over
        if source is None or (self.state.sums and step.index == self.state.seed.step):
            return False
        return self.state.status.get(self.state.flow.index[source]) in ("loop", "both")

    def _add_work(self, step: Step) -> None:
        """What a step takes for itself in a turn: what grows with the chunk, and the rest.

        Weighed at the example's lengths; at others both are taken to grow as a unit's result does.
        """
        state = self.state
        parts = {place: state.part(step, place) for place in range(len(step.inputs))}
        spans = {place: span for place, span in parts.items() if span is not None}
        units = state.example_units
        half = max(units // 2, 1)
        least, most = (state.flow.scale.part(step, spans, n) for n in (1, half))
        slope = (most - least) / (half - 1) if half > 1 else float(most)
        growth = step.growth * units / state.units
        self.own_profile[step.index] += max(round((least - slope) * growth), 0)
        self.loop_profile[step.index] += slope * growth

    def candidate(self, start: int) -> Candidate | None:
        state = self.state
        flow = state.flow
        saved = self._written_back(start)
        base = flow.live_bytes[start]
        ahead = base + max(self.ahead_profile[start : state.end], default=0)
        fixed = base + self.kept_ahead + self.out_bytes - saved
        return Candidate(
            start=start,
            end=state.end,
            seed=state.seed,
            units=state.units,
            ahead_bytes=ahead,
            fixed_bytes=fixed,
            moments=_front(
                self.own_profile[start : state.end], self.loop_profile[start : state.end]
            ),
            saved_bytes=saved,
            steps=self.steps,
            reread_bytes=sum(self.reread.values()),
            repeated_bytes=self.repeated,
            copied_bytes=self.copied,
            thin_flops=self.thin,
            product_flops=self.flops,
            made_bytes=(self.made[0], self.made[1]),
            largest_bytes=self.largest,
            kept_bytes=self.made_ahead + self.out_bytes,
            turn_bytes=self.turn_bytes,
            overlap_flops=self.overlap_flops,
        )

    def _written_back(self, start: int) -> int:
        """Bytes of outputs that may go into the storage of an input that is read in parts only."""
        free = list(reusable(self.state, start))
        saved = 0
        for out in self.outs:
            for source in free:
                if fits(self.state, source, out):
                    saved += out.nbytes
                    free.remove(source)
                    break
        return saved


def _front(own: Sequence[int], units: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """The pairs that no other exceeds in both."""
    kept: list[tuple[int, float]] = []
    for pair in sorted(set(zip(own, units, strict=True)), reverse=True):
        if not kept or pair[1] > kept[-1][1]:
            kept.append(pair)
    return tuple(kept)


def _node_bytes(node: fx.Node) -> int:
    from hairpin.graph.export import shape_of

    value = node.meta["val"]
    if not hasattr(value, "element_size"):
        return 0
    count = 1
    for length in shape_of(value):
        count *= length
    return count * int(value.element_size())


def reusable(state: Walk, start: int) -> Iterator[Step]:
    """Steps before the window whose storage dies in it and is read only in parts, all alike."""
    flow = state.flow
    for step in flow.live_roots(start):
        if flow.storage_end[step.node] >= state.end or step.index >= start:
            continue
        if not step.operation or len(step.operation.outputs) != 1 or may_alias(step.node):
            continue
        if _read_in_parts_only(state, step, start):
            yield step


def _read_in_parts_only(state: Walk, step: Step, start: int) -> bool:
    """Whether the loop reads a storage through one value, in one kind of part, never whole.

    What runs ahead of the loop may read it whole: it is done when the loop begins to write.
    """
    flow = state.flow
    for other in flow.steps[: state.end]:
        if other.root is not step.node or other.node is step.node:
            continue
        if other.last_use >= start:
            return False  # another view of it is about
    if step.node in state.whole_in_loop:
        return False
    return len(state.spans.get(step.node, ())) == 1


def fits(state: Walk, source: Step, out: Step) -> bool:
    """Whether output ``out`` may be written into the storage of ``source``, part for part."""
    (span,) = state.spans[source.node]
    number, scale = state.demands[out.index]
    axis = out.axes[number]
    if axis.sums or out.operation is None or len(out.operation.outputs) != 1:
        return False
    target = axis.outputs[0]
    mine, theirs = source.node.meta["val"], out.node.meta["val"]
    return bool(
        span == Span(target.dim, target.unit * scale)
        and mine.dtype == theirs.dtype
        and alike(mine.shape, theirs.shape)
        and alike(mine.stride(), theirs.stride())
        and source.nbytes == out.nbytes
    )


def flops(step: Step) -> float:
    """Multiplications and additions of a product; 0 for the rest."""
    operation = step.operation
    if operation is None or not operation.outputs:
        return 0.0
    out = 1.0
    for length in operation.outputs[0]:
        out *= length
    name = operation.name
    if name in _PRODUCTS and operation.inputs:
        return 2.0 * out * operation.inputs[_PRODUCTS[name]][-1]
    if "scaled_dot_product" in name:
        return 4.0 * out * operation.inputs[1][-2]
    if "conv" in name and len(operation.inputs) > 1:
        weight = 1.0
        for length in operation.inputs[1][1:]:
            weight *= length
        return 2.0 * out * weight
    if name == "aten.einsum" and len(operation.inputs) > 1:  # of one tensor it is no product
        work = 1.0
        for length in set(sum(operation.inputs, ())):
            work *= length
        return 2.0 * work
    return 0.0


_PRODUCTS = {
    "aten.linear": 0,
    "aten.matmul": 0,
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.addmm": 1,
    "aten.baddbmm": 1,
}
