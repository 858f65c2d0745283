"""Loops for training: what is kept for the backward, against the time to compute it again.

In training a plain step's operands stay until the backward. A region that runs as a loop keeps only
what it reads, and the backward computes it again, part by part. What is kept does not depend on the
chunk sizes, so the search has two parts: regions by shortest paths, one for each amount of bytes
that may be kept; then, for each loop, the largest chunk size whose way back fits in what is left,
read off two certificates.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hairpin.errors import MemoryBudgetError, TraceError
from hairpin.graph.export import Traced, packed_outputs
from hairpin.graph.memory import Flow, Step
from hairpin.graph.meter import Meter, Timeline, fake_inputs, measure
from hairpin.planning.loops.again import is_hollow, is_product
from hairpin.planning.loops.choose import Choice
from hairpin.planning.loops.emit import EmissionError, Emitted, emit
from hairpin.planning.loops.loop import Loop
from hairpin.planning.loops.program import Program, region_of
from hairpin.planning.loops.regions import Candidate, Walk, flops, walk
from hairpin.planning.loops.search import Search
from hairpin.planning.speeds import Speeds
from hairpin.units import format_bytes

_AMOUNTS = 512  # of kept bytes that paths are looked for at
_MOST_WAYS = 127
_FURTHER = (0, 2, 6)  # ways that are grown: the first that fits, and some that keep less
_MOST_BANNED = 100  # regions that turned out not to be writable as a loop
_ROUNDS = 3  # certificates that correct the chunk sizes
_HALVINGS = 4  # of the chunk sizes after those
_TURN_FACTOR = 2.5  # gradients and saved values of a turn over what its forward makes
_TURN_BYTES = 24 << 20  # a turn larger than this is no faster,
_REREAD = 6  # unless it reads a sixth of what it makes whole, over and over
_ORDERINGS = 12  # reads and writes of what a turn puts in another order, forward and back


@dataclass(frozen=True)
class Kept:
    """What a program holds between its forward and its backward, and during its backward.

    Attributes:
        kept_bytes: alive after the forward, outputs not counted.
        output_bytes: of the outputs that are not inputs.
        backward_bytes: most bytes alive during forward and backward beyond ``kept_bytes``: outputs,
            gradients and what is computed again.
        gradient_bytes: gradients of parameters and inputs: alive at the end.
    """

    kept_bytes: int
    output_bytes: int
    backward_bytes: int
    gradient_bytes: int


@dataclass(eq=False)
class TrainingProgram(Program):
    """A program whose peak is that of a forward and a backward.

    Attributes:
        kept: how the peak is made up, for a stack of blocks.
        loop_peaks: of each loop, the law of its peak: bytes at chunk size 0, and per unit.
    """

    kept: Kept = field(default_factory=lambda: Kept(0, 0, 0, 0))
    loop_peaks: tuple[tuple[float, float], ...] = ()

    def fit(self, lengths: Mapping[Any, int], margin_bytes: int = 0) -> tuple[int, ...] | None:
        """Chunk sizes for these lengths, from the laws at the example's; None where none fit.

        What is kept is taken to grow as the bytes of all steps do, a turn as the bytes it makes.
        """
        flow = self.search.flow.at(lengths)
        then = self.search.flow.at(self.example)
        growth = _all_bytes(flow) / max(_all_bytes(then), 1)
        room = self.room(lengths) - margin_bytes
        found = []
        regions = (self._sized(then, self.example), self._sized(flow, lengths))
        for before, now, (base, slope) in zip(*regions, self.loop_peaks, strict=True):
            unit = slope * now.turn_bytes / max(before.turn_bytes, 1.0)
            chunk = int((room - base * growth) / unit) if unit else now.units
            if chunk < 1 or base * growth > room:
                return None
            found.append(min(chunk, _useful(now)))
        return tuple(found)

    def _for(self, flat: Sequence[Any], lengths: Mapping[Any, int]) -> Program:
        room, margin = self.room(lengths), 0
        if any(port.kind == "block" for port in self.traced.inputs):
            # its blocks keep to budgets of their own, and cannot be run on shapes from in here
            return replace(self, chunks=self.fit(lengths) or (1,) * len(self.chunks))
        for _ in range(0 if self.emitted.bound else _ROUNDS):
            chunks = self.fit(lengths, margin)
            if chunks is None:
                break
            found = certify_training(self.emitted, flat, chunks)
            peak = found.timeline.peak_bytes
            if peak <= room:
                return replace(self, chunks=chunks, peak_bytes=peak, kept=found.kept)
            margin += peak - room
        search = Search.at(self.traced, flat)
        made = make_training_program(search, room, flat, self.speeds)
        return replace(made, entry_bytes=self.entry_bytes)


def _all_bytes(flow: Flow) -> int:
    return sum(step.nbytes for step in flow.steps)


@dataclass(frozen=True, eq=False)
class Around:
    """The code around a model's blocks, as the graph to be given loops.

    Attributes:
        model: its blocks run as they are attached now.
        traced: the graph; a block is one step of it.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: Traced

    def measure(
        self,
        run: Callable[..., Any],
        names: dict[int, Any] | None = None,
        meter: Meter | None = None,
    ) -> Timeline:
        """Bytes along a forward and backward of the model, its own code replaced by ``run``.

        Args:
            run: takes the graph's inputs, and gives its outputs.
            names: takes the storages of parameters and buffers, which count as inputs.
        """
        forward = type(self.model).forward.__get__(self.model)

        def instead(*args: Any, **kwargs: Any) -> Any:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if names is not None:
                    names[tensor.untyped_storage()._cdata] = None
            flat = self.traced.flat_inputs(self.model, forward, args, kwargs)
            return packed_outputs(self.traced, list(run(*flat)))

        self.model.__dict__["forward"] = instead
        try:
            return measure(self.model, self.args, self.kwargs, grad=True, meter=meter)
        finally:
            del self.model.__dict__["forward"]


def make_training_program(
    search: Search,
    budget_bytes: int,
    flat: Sequence[Any],
    speeds: Speeds,
    *,
    tries: int = 8,
    around: Around | None = None,
) -> TrainingProgram:
    """The cheapest loops that keep forward and backward under a budget, certified on fake tensors.

    Args:
        budget_bytes: for everything but inputs, parameters and buffers: what is kept, what is
            computed, and gradients, those of parameters among them.
        flat: the graph's inputs; those that need a gradient in training say ``requires_grad``.
        tries: programs that are certified.
        around: where the graph is the code around a model's blocks.

    Raises:
        MemoryBudgetError: there is no way; ``floor_bytes`` says what was reached.
        TraceError: the graph has a step that cannot be trained in parts.
    """
    require_trainable(search)
    paths = _Paths(search, flat, budget_bytes, speeds, around)
    return replace(_Fit(search, paths, budget_bytes, flat, around).run(tries), speeds=speeds)


def require_trainable(search: Search) -> None:
    """Raise unless every random step of the graph can repeat itself.

    Raises:
        TraceError: attention draws its own dropout.
    """
    for step in search.flow.steps:
        described = step.operation
        if described is None or "scaled_dot_product" not in described.name:
            continue
        probability = described.arguments.get("dropout_p", 0.0)
        if probability:
            raise TraceError(
                f"{search.traced.name} has attention that drops out {probability} of its weights "
                "inside one kernel, whose mask cannot be made in parts; set the attention's "
                "dropout to 0, or build the model with its eager attention"
            )


# ------------------------------------------------------------------------------ what steps keep


def saved_by_steps(
    search: Search, flat: Sequence[Any], around: Around | None = None
) -> list[dict[Any, int]]:
    """What autograd saves for each step: name of a storage -> bytes; inputs are not counted.

    A storage that is the value of a step goes by that step's root node, another by a number.
    """
    flow, graph = search.flow, search.flow.graph
    found: list[dict[Any, int]] = [{} for _ in flow.steps]
    names: dict[int, Any] = {}
    keep: list[Any] = []
    running: list[int] = [-1]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        keep.append(storage)
        if running[0] >= 0:
            found[running[0]][storage._cdata] = storage.nbytes()
        return tensor

    class Followed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            running[0] = flow.index.get(n, -1)
            result = super().run_node(n)
            for place, value in enumerate(tree_leaves(result)):
                if isinstance(value, Tensor):
                    keep.append(value)
                    key = value.untyped_storage()._cdata
                    if n.op == "placeholder":
                        names.setdefault(key, None)
                    elif running[0] >= 0:
                        names.setdefault(key, _maker(flow, n, place))
            return result

    followed = Followed(fx.GraphModule(nn.Module(), graph))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    if around is not None:
        with hooks:
            around.measure(followed.run, names)
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = fake_inputs(list(flat), mode)
        with torch.inference_mode(mode=False), mode, torch.enable_grad(), hooks:
            followed.run(*fakes)
    return [
        {names.get(key, key): size for key, size in each.items() if names.get(key, key) is not None}
        for each in found
    ]


def _maker(flow: Flow, node: fx.Node, place: int) -> fx.Node:
    """The step that a storage is named by: of one of several results, what picks it."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == place and user in flow.index:
            return flow.steps[flow.index[user]].root
    return flow.steps[flow.index[node]].root


@dataclass(frozen=True)
class _Work:
    """What a region's cost needs beyond its :class:`Candidate`."""

    hollow_flops: float
    strided_bytes: int


@dataclass(frozen=True)
class _Edge:
    """One way from a mark to a later one: as it is, or as a loop."""

    end: int
    kept_bytes: int
    cost_s: float
    choice: Choice | None


class _Paths:
    """Ways through a graph, by what they keep and what they cost."""

    def __init__(
        self,
        search: Search,
        flat: Sequence[Any],
        budget_bytes: int,
        speeds: Speeds,
        around: Around | None,
    ) -> None:
        self.search, self.flow, self.speeds = search, search.flow, speeds
        self.budget_bytes = budget_bytes
        self.saved = saved_by_steps(search, flat, around)
        self.root_bytes = {s.node: s.nbytes for s in self.flow.steps if s.nbytes}
        self.first = self._first_uses()
        self.last = {name: at for at, names in enumerate(self.saved) for name in names}
        self.work: dict[Any, _Work] = {}
        self.edges: dict[int, list[_Edge]] = {mark: [] for mark in search.marks}
        self._plain()
        self._loops()

    def _first_uses(self) -> dict[Any, int]:
        """The step that keeps a storage first, where all steps are plain; else its first reader."""
        first: dict[Any, int] = {}
        for step in self.flow.steps:
            for name in self.saved[step.index]:
                first.setdefault(name, step.index)
        for step in self.flow.steps:
            if not step.is_view:
                for root in self.roots(step):
                    first.setdefault(root, step.index)
        return first

    def roots(self, step: Step) -> Iterator[fx.Node]:
        """Storages that a step reads, inputs of the graph left out."""
        for source in step.inputs:
            place = self.flow.index.get(source)
            if place is not None and self.flow.steps[place].root in self.root_bytes:
                yield self.flow.steps[place].root

    def _plain(self) -> None:
        marks = self.search.marks
        for start, end in pairwise(marks):
            steps = self.flow.steps[start:end]
            kept: dict[Any, int] = {}
            for step in steps:
                kept.update(self.saved[step.index])
            total = sum(size for name, size in kept.items() if self.first[name] >= start)
            if all(2 * step.nbytes + step.extra <= self.budget_bytes for step in steps):
                self.edges[start].append(_Edge(end, total, 0.0, None))

    def _loops(self) -> None:
        groups: dict[tuple[int, Any], list[Candidate]] = {}
        for candidate in self.search.found:
            groups.setdefault((candidate.end, candidate.seed), []).append(candidate)
        for (end, seed), found in groups.items():
            kept = _kept_by_loops(self, walk(self.flow, end, seed), [c.start for c in found])
            for candidate in found:
                size, work = kept[candidate.start]
                room = self.budget_bytes - size
                if candidate.ahead_bytes > self.budget_bytes or room <= 0:
                    continue
                self.work[candidate.key] = work
                choice = self._choice(candidate, room)
                if choice is not None:
                    edge = _Edge(end, size, choice.cost_s, choice)
                    self.edges[candidate.start].append(edge)

    def kept_after(self, root: fx.Node, end: int) -> bool:
        """Whether a storage counts as kept before ``end``, by a step, and is read by a later."""
        return self.first.get(root, end) < end <= self.flow.storage_end.get(root, -1)

    def bytes_of(self, node: fx.Node) -> int:
        """Of the storage that a value lies in; 0 for inputs of the graph."""
        place = self.flow.index.get(node)
        return 0 if place is None else self.root_bytes.get(self.flow.steps[place].root, 0)

    def _choice(self, candidate: Candidate, room: int) -> Choice | None:
        unit = max(candidate.turn_bytes * _TURN_FACTOR, 1.0)
        chunk = min(int(room // 2 // unit), _useful(candidate))
        if chunk < 1:
            if unit > room:
                return None
            chunk = 1
        return Choice(candidate, chunk, self.cost_s(candidate, chunk))

    def cost_s(self, c: Candidate, chunk: int) -> float:
        """Seconds beyond what the steps take where nothing is computed again."""
        speeds, work = self.speeds, self.work[c.key]
        turns = -(-c.units // chunk)
        made = c.turn_bytes * c.units
        products = c.product_flops / speeds.flops_per_s
        again = products - work.hollow_flops / speeds.flops_per_s
        slower = 4 * c.thin_flops / chunk * speeds.rows / speeds.flops_per_s
        moved = (made + 2 * c.copied_bytes + c.repeated_bytes) / speeds.bytes_per_s
        each = speeds.turn_s * 4 + c.steps * speeds.step_s * 5
        weights = turns * c.reread_bytes * 3 / (speeds.bytes_per_s * 2)
        ordered = (turns - 1) * work.strided_bytes * _ORDERINGS / speeds.bytes_per_s
        return again + slower + moved + turns * each + weights + ordered

    def ways(self, banned: set[Any]) -> list[tuple[Choice, ...]]:
        """Ways through the graph, none both slower and keeping more; the quickest first."""
        marks = self.search.marks
        unit = max(self.budget_bytes / _AMOUNTS, 1.0)
        best = {m: torch.full((_AMOUNTS + 1,), inf, dtype=torch.float64) for m in marks}
        last = {m: torch.full((_AMOUNTS + 1,), -1) for m in marks}
        best[marks[0]][0] = 0.0
        taken: list[tuple[int, int, Choice | None]] = []
        for mark in marks[:-1]:
            for edge in _fewest(self.edges[mark], banned):
                kept = round(edge.kept_bytes / unit)
                if kept > _AMOUNTS:
                    continue
                found = best[mark][: _AMOUNTS + 1 - kept] + edge.cost_s
                better = found < best[edge.end][kept:]
                best[edge.end][kept:][better] = found[better]
                last[edge.end][kept:][better] = len(taken)
                taken.append((mark, kept, edge.choice))
        ends = _falling(best[marks[-1]].tolist())
        thin = ends[:: -(-len(ends) // _MOST_WAYS)] if ends else []
        return [_way(marks, last, taken, kept) for kept in reversed(thin)]


def _fewest(edges: Sequence[_Edge], banned: set[Any]) -> Iterator[_Edge]:
    """Edges that no other of the same end beats in both bytes and seconds."""
    least: dict[int, float] = {}
    for edge in sorted(edges, key=lambda e: (e.kept_bytes, e.cost_s)):
        if edge.choice is not None and edge.choice.candidate.key in banned:
            continue
        if edge.cost_s < least.get(edge.end, inf):
            least[edge.end] = edge.cost_s
            yield edge


def _falling(costs: Sequence[float]) -> list[int]:
    """Places where a cost is less than at all places before."""
    found, least = [], inf
    for place, cost in enumerate(costs):
        if cost < least:
            found.append(place)
            least = cost
    return found


def _way(
    marks: Sequence[int],
    last: Mapping[int, Tensor],
    taken: Sequence[tuple[int, int, Choice | None]],
    kept: int,
) -> tuple[Choice, ...]:
    """The loops on the best path that keeps this much."""
    choices: list[Choice] = []
    place = marks[-1]
    while place != marks[0]:
        place, less, choice = taken[int(last[place][kept])]
        kept -= less
        if choice is not None:
            choices.append(choice)
    return tuple(choices[::-1])


def _kept_by_loops(
    paths: _Paths, state: Walk, starts: Sequence[int]
) -> dict[int, tuple[int, _Work]]:
    """Bytes kept by the regions that end where this walk began, and their work, by their starts."""
    kept, found, wanted = _KeptByLoop(paths, state), {}, set(starts)
    for index in range(state.end - 1, min(wanted) - 1, -1):
        kept.take(paths.flow.steps[index])
        if index in wanted:
            found[index] = kept.total(index), kept.work()
    return found


@dataclass(eq=False)
class _KeptByLoop:
    """What a region keeps, as its window grows back from its end.

    Attributes:
        before: storages that it keeps and that are made before the window as it is.
        inside: storages that its loop makes, which nobody keeps.
        made_bytes: of what it keeps and makes itself, ahead of the loop.
        hollow: steps whose values no gradient depends on; ``hollow_flops``: of products there.
        strided_bytes: taken whole by steps that copy them into another order in every turn.
    """

    paths: _Paths
    state: Walk
    before: dict[Any, int] = field(default_factory=dict)
    inside: set[Any] = field(default_factory=set)
    made_bytes: int = 0
    hollow: set[fx.Node] = field(default_factory=set)
    hollow_flops: float = 0.0
    strided_bytes: int = 0

    def take(self, step: Step) -> None:
        """Widen the window by the step before it."""
        status = self.state.status.get(step.index, "unused")
        in_loop = status in {"loop", "both"}
        if in_loop:
            self._take_work(step)
        if step.node in self.paths.root_bytes:
            size = self.before.pop(step.node, 0)
            if status != "loop":
                self.made_bytes += size
            if in_loop:
                self.inside.add(step.node)
            if status == "loop" and self.paths.kept_after(step.node, self.state.end):
                self.made_bytes += self.paths.root_bytes[step.node]
        if in_loop:
            for root in self.paths.roots(step):
                self.before.setdefault(root, self.paths.root_bytes[root])
        if status in {"ahead", "both"}:
            self._take_saved(step)

    def _take_work(self, step: Step) -> None:
        """What the backward need not compute again, and what each turn puts in another order."""
        if is_hollow(step.node, self._valueless):
            self.hollow.add(step.node)
            self.hollow_flops += flops(step)
        if step.operation is not None and step.operation.name == "aten.einsum":
            self.strided_bytes += sum(
                self.paths.bytes_of(source)
                for source in step.inputs
                if source in self.state.whole_in_loop
            )

    def _valueless(self, user: fx.Node) -> bool:
        """Whether a step has no use for the value of a hollow operand."""
        place = self.paths.flow.index.get(user)
        outside = user.op == "output" or place is None or place >= self.state.end
        return outside or (user in self.hollow and not is_product(user))

    def work(self) -> "_Work":
        """So far."""
        return _Work(self.hollow_flops, self.strided_bytes)

    def _take_saved(self, step: Step) -> None:
        """What autograd saves for a step ahead of the loop."""
        for name, size in self.paths.saved[step.index].items():
            if isinstance(name, fx.Node) and self.paths.flow.index[name] < step.index:
                self.before.setdefault(name, size)
            elif name not in self.inside:
                self.made_bytes += size

    def total(self, start: int) -> int:
        """Bytes kept by the region that begins here, and by no earlier one."""
        first = self.paths.first
        return self.made_bytes + sum(
            size for name, size in self.before.items() if first.get(name, 0) >= start
        )


# --------------------------------------------------------------------------------- certificates


@dataclass(frozen=True)
class Certificate:
    """A forward and a backward on fake tensors.

    Attributes:
        loops: peak while each loop runs, forward or backward.
        outside_bytes: peak while none does.
    """

    timeline: Timeline
    kept: Kept
    loops: tuple[int, ...]
    outside_bytes: int


def certify_training(
    emitted: Emitted, flat: Sequence[Any], chunks: Sequence[int], around: Around | None = None
) -> Certificate:
    """Bytes along one forward and backward of a graph with loops, exact, without running it."""
    meter = Meter()
    watched = _Watched(meter)
    after: list[tuple[int, int]] = []

    def run(*given: Any) -> Any:
        out = emitted.module(*given, *chunks)
        after.append((meter.live_bytes, _new_bytes(out, given)))
        return out

    loops: list[Loop] = [emitted.module.get_submodule(name) for name in emitted.loops]  # type: ignore[misc]
    for place, loop in enumerate(loops):
        loop.watch = partial(watched, place)
    try:
        if around is not None:
            timeline = around.measure(run, meter=meter)
        else:
            timeline = measure(run, list(flat), grad=True, meter=meter)
    finally:
        for loop in loops:
            loop.watch = nullcontext
    live, outputs = after[0]
    kept = Kept(
        kept_bytes=live - outputs,
        output_bytes=outputs,
        backward_bytes=timeline.peak_bytes - (live - outputs),
        gradient_bytes=timeline.end_bytes - outputs,
    )
    peaks = tuple(watched.peaks.get(place, 0) for place in range(len(loops)))
    return Certificate(timeline, kept, peaks, watched.outside(timeline))


class _Watched:
    """Peaks while loops run."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.peaks: dict[int, int] = {}
        self.periods: list[tuple[int, int]] = []

    @contextmanager
    def __call__(self, place: int, _: str) -> Iterator[None]:
        mark = self.meter.mark()
        yield
        self.peaks[place] = max(self.peaks.get(place, 0), self.meter.peak_since(mark))
        self.periods.append((mark, self.meter.mark()))

    def outside(self, timeline: Timeline) -> int:
        """Peak while no loop runs."""
        inside = {moment for start, end in self.periods for moment in range(start, end)}
        return max(
            (m.live_bytes for place, m in enumerate(timeline.moments) if place not in inside),
            default=0,
        )


def _new_bytes(out: Any, given: Sequence[Any]) -> int:
    """Bytes of the storages of outputs that are not inputs."""
    old = {x.untyped_storage()._cdata for x in given if isinstance(x, Tensor)}
    sizes = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for x in tree_leaves(out)
        if isinstance(x, Tensor)
    }
    return sum(size for key, size in sizes.items() if key not in old)


# -------------------------------------------------------------------------------------- the fit


class _Fit:
    """Looks for the cheapest path whose certificate fits."""

    def __init__(
        self,
        search: Search,
        paths: _Paths,
        budget_bytes: int,
        flat: Sequence[Any],
        around: Around | None,
    ) -> None:
        self.search, self.paths, self.flat, self.around = search, paths, list(flat), around
        self.budget_bytes = budget_bytes
        self.banned: set[Any] = set()
        self.least_bytes = 1 << 62

    def run(self, tries: int) -> TrainingProgram:
        """The cheapest that fits among the ways, by bisection over what they keep."""
        ways = self.paths.ways(self.banned)
        low, high = 0, len(ways) - 1
        if self.around is not None and not self._leanest_fits(ways):
            raise self._out_of_reach()
        fitting: dict[int, tuple[Emitted, Certificate]] = {}
        while low <= high and tries:
            tries -= 1
            middle = (low + high) // 2 if tries or fitting else high
            try:
                found = self._least(ways[middle])
            except EmissionError:
                ways, fitting = self.paths.ways(self.banned), {}
                low, high = 0, len(ways) - 1
                tries += len(self.banned) < _MOST_BANNED
                continue
            if found is None:
                low = middle + 1
            else:
                fitting[middle] = found
                high = middle - 1
        if not fitting:
            raise self._out_of_reach()
        return self._quickest(ways, fitting)

    def _leanest_fits(self, ways: Sequence[tuple[Choice, ...]]) -> bool:
        """Whether there is any use in looking: a certificate of a whole model takes its time."""
        try:
            return bool(ways) and self._least(ways[-1]) is not None
        except EmissionError:
            return True

    def _quickest(
        self,
        ways: Sequence[tuple[Choice, ...]],
        fitting: dict[int, tuple[Emitted, Certificate]],
    ) -> TrainingProgram:
        """Of some ways that fit, the cheapest with the chunk sizes that there is room for."""
        first, programs = min(fitting), []
        for place in sorted({min(first + further, max(fitting)) for further in _FURTHER}):
            try:
                found = fitting.get(place) or self._least(ways[place])
            except EmissionError:
                continue
            if found is not None:
                programs.append(self._grown(ways[place], *found))
        return min(programs, key=self._cost_s)

    def _cost_s(self, program: TrainingProgram) -> float:
        pairs = zip(program.choices, program.chunks, strict=True)
        return sum(self.paths.cost_s(choice.candidate, chunk) for choice, chunk in pairs)

    def _least(self, choices: tuple[Choice, ...]) -> tuple[Emitted, Certificate] | None:
        """The loops written out, certified at chunk size 1; None where that is too much."""
        try:
            regions = [region_of(choice) for choice in choices]
            emitted = emit(self.search.flow, regions, reuse=False)
        except EmissionError as error:
            self.banned.add(choices[error.place].candidate.key)
            raise
        least = self._certify(emitted, (1,) * len(choices))
        return (emitted, least) if least.timeline.peak_bytes <= self.budget_bytes else None

    def _grown(
        self, choices: tuple[Choice, ...], emitted: Emitted, least: Certificate
    ) -> TrainingProgram:
        """The same loops with the largest chunks that are of use and fit."""
        wanted = [_useful(choice.candidate) for choice in choices]
        fits = [(1, peak) for peak in least.loops]
        chunks, certificate = tuple(wanted), least
        laws = [(float(peak), 0.0) for peak in least.loops]
        for turn in range(_ROUNDS + _HALVINGS):
            found = self._certify(emitted, chunks)
            laws = [
                _law(fit, (chunk, peak)) if chunk > fit[0] else law
                for fit, chunk, peak, law in zip(fits, chunks, found.loops, laws, strict=True)
            ]
            if found.timeline.peak_bytes <= self.budget_bytes:
                certificate = found
                break
            if turn < _ROUNDS:
                chunks = self._smaller(chunks, found.loops, laws)
            else:
                chunks = tuple(max(1, chunk // 2) for chunk in chunks)
        else:
            chunks = tuple(1 for _ in choices)
        return TrainingProgram(
            self.search,
            choices,
            emitted,
            self.budget_bytes,
            chunks,
            0,
            certificate.timeline.peak_bytes,
            certificate.timeline,
            backward=True,
            kept=certificate.kept,
            loop_peaks=tuple(laws),
        )

    def _smaller(
        self, chunks: Sequence[int], peaks: Sequence[int], laws: Sequence[tuple[float, float]]
    ) -> tuple[int, ...]:
        """Chunk sizes for the loops that held too much, by the laws of their peaks."""
        return tuple(
            chunk
            if peak <= self.budget_bytes
            else max(1, min(chunk - 1, int((self.budget_bytes - law[0]) / max(law[1], 1.0))))
            for chunk, peak, law in zip(chunks, peaks, laws, strict=True)
        )

    def _certify(self, emitted: Emitted, chunks: Sequence[int]) -> Certificate:
        found = certify_training(emitted, self.flat, chunks, self.around)
        self.least_bytes = min(self.least_bytes, found.timeline.peak_bytes)
        return found

    def _out_of_reach(self) -> MemoryBudgetError:
        least = self.least_bytes if self.least_bytes < 1 << 62 else 0
        reason = (
            f"the least that loops brought a forward and a backward to is {format_bytes(least)}, "
            "gradients of parameters included"
            if least
            else "no loops were found that might come under it"
        )
        error = MemoryBudgetError(
            f"{self.search.traced.name} cannot be trained in {format_bytes(self.budget_bytes)}: "
            + reason
        )
        error.floor_bytes = least
        return error


def _useful(candidate: Candidate) -> int:
    """The chunk size beyond which turns only take more memory; equal turns."""
    unit = max(candidate.turn_bytes, 1.0)
    enough = max(_TURN_BYTES, _REREAD * candidate.reread_bytes)
    most = max(1, min(candidate.units, int(enough // unit)))
    return -(-candidate.units // -(-candidate.units // most))


def _law(less: tuple[int, int], more: tuple[int, int]) -> tuple[float, float]:
    """Bytes at chunk size 0 and per unit, from two chunk sizes and their peaks."""
    slope = max(0.0, (more[1] - less[1]) / (more[0] - less[0]))
    return less[1] - slope * less[0], slope
