"""Loops for training: what is kept for the backward, against the time to compute it again.

In training a plain step's operands stay until the backward. A region that runs as a loop keeps only
what it reads, and the backward computes it again, part by part. What is kept does not depend on the
chunk sizes, so the search has two parts: regions by the shortest path over kept bytes times a price
plus seconds, at several prices; then, for each loop, the largest chunk size whose way back fits in
what is left, read off two certificates.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hairpin.errors import MemoryBudgetError, TraceError
from hairpin.graph.memory import Flow, Step
from hairpin.graph.meter import Meter, Timeline, fake_inputs, measure
from hairpin.planning.choose import Choice
from hairpin.planning.emit import EmissionError, Emitted, emit
from hairpin.planning.loop import Loop
from hairpin.planning.program import Program, Search, region_of
from hairpin.planning.regions import Candidate, Walk, walk
from hairpin.planning.speeds import Speeds
from hairpin.units import format_bytes

_PRICES_S_PER_BYTE = tuple(10.0 ** (-13 + place / 4) for place in range(29))
_ROUNDS = 3  # certificates that correct the chunk sizes
_TURN_FACTOR = 2.5  # gradients and saved values of a turn over what its forward makes
_TURN_BYTES = 24 << 20  # a turn larger than this is no faster


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
        growth = _all_bytes(flow) / max(_all_bytes(self.search.flow), 1)
        room = self.room(lengths) - margin_bytes
        found = []
        laws = zip(self.choices, self._sized(flow, lengths), self.loop_peaks, strict=True)
        for choice, now, (base, slope) in laws:
            unit = slope * now.turn_bytes / max(choice.candidate.turn_bytes, 1.0)
            chunk = int((room - base * growth) / unit) if unit else now.units
            if chunk < 1 or base * growth > room:
                return None
            found.append(min(chunk, _useful(now)))
        return tuple(found)

    def _for(self, flat: Sequence[Any], lengths: Mapping[Any, int]) -> Program:
        room, margin = self.room(lengths), 0
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


def make_training_program(
    search: Search,
    budget_bytes: int,
    flat: Sequence[Any],
    speeds: Speeds,
    *,
    tries: int = 8,
) -> TrainingProgram:
    """The cheapest loops that keep forward and backward under a budget, certified on fake tensors.

    Args:
        budget_bytes: for everything but inputs, parameters and buffers: what is kept, what is
            computed, and gradients, those of parameters among them.
        flat: the graph's inputs; those that need a gradient in training say ``requires_grad``.
        tries: programs that are certified.

    Raises:
        MemoryBudgetError: there is no way; ``floor_bytes`` says what was reached.
        TraceError: the graph has a step that cannot be trained in parts.
    """
    require_trainable(search)
    paths = _Paths(search, flat, budget_bytes, speeds)
    return replace(_Fit(search, paths, budget_bytes, flat).run(tries), speeds=speeds)


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


def saved_by_steps(search: Search, flat: Sequence[Any]) -> list[dict[Any, int]]:
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
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    keep.append(value)
                    key = value.untyped_storage()._cdata
                    if n.op == "placeholder":
                        names.setdefault(key, None)
                    elif running[0] >= 0:
                        names.setdefault(key, flow.steps[running[0]].root)
            return result

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = fake_inputs(list(flat), mode)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.inference_mode(mode=False), mode, torch.enable_grad(), hooks:
        Followed(fx.GraphModule(nn.Module(), graph)).run(*fakes)
    return [
        {names.get(key, key): size for key, size in each.items() if names.get(key, key) is not None}
        for each in found
    ]


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
        self, search: Search, flat: Sequence[Any], budget_bytes: int, speeds: Speeds
    ) -> None:
        self.search, self.flow, self.speeds = search, search.flow, speeds
        self.budget_bytes = budget_bytes
        self.saved = saved_by_steps(search, flat)
        self.root_bytes = {s.node: s.nbytes for s in self.flow.steps if s.nbytes}
        self.first = self._first_uses()
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
                size = kept[candidate.start]
                room = self.budget_bytes - size
                if candidate.ahead_bytes > self.budget_bytes or room <= 0:
                    continue
                choice = self._choice(candidate, room)
                if choice is not None:
                    edge = _Edge(end, size, choice.cost_s, choice)
                    self.edges[candidate.start].append(edge)

    def _choice(self, candidate: Candidate, room: int) -> Choice | None:
        unit = max(candidate.turn_bytes * _TURN_FACTOR, 1.0)
        chunk = int(min(room // 2, _TURN_BYTES * _TURN_FACTOR) // unit)
        if chunk < 1:
            if unit > room:
                return None
            chunk = 1
        chunk = min(chunk, candidate.units)
        return Choice(candidate, chunk, self._cost_s(candidate, chunk))

    def _cost_s(self, c: Candidate, chunk: int) -> float:
        """Seconds beyond what the steps take where nothing is computed again."""
        speeds = self.speeds
        turns = -(-c.units // chunk)
        made = c.turn_bytes * c.units
        again = c.product_flops / speeds.flops_per_s
        slower = 4 * c.thin_flops / chunk * speeds.rows / speeds.flops_per_s
        moved = (made + 2 * c.copied_bytes + c.repeated_bytes) / speeds.bytes_per_s
        each = speeds.turn_s * 4 + c.steps * speeds.step_s * 5
        weights = turns * c.reread_bytes * 3 / (speeds.bytes_per_s * 2)
        return again + slower + moved + turns * each + weights

    def cheapest(self, price_s: float, banned: set[Any]) -> tuple[Choice, ...] | None:
        """The way of least seconds plus price times kept bytes."""
        marks = self.search.marks
        best: dict[int, tuple[float, int, Choice | None]] = {marks[0]: (0.0, marks[0], None)}
        for mark in marks[:-1]:
            if mark not in best:
                continue
            base = best[mark][0]
            for edge in self.edges[mark]:
                if edge.choice is not None and edge.choice.candidate.key in banned:
                    continue
                cost = base + edge.cost_s + price_s * edge.kept_bytes
                if edge.end not in best or cost < best[edge.end][0]:
                    best[edge.end] = (cost, mark, edge.choice)
        if marks[-1] not in best:
            return None
        choices: list[Choice] = []
        place = marks[-1]
        while place != marks[0]:
            _, place, taken = best[place]
            if taken is not None:
                choices.append(taken)
        return tuple(choices[::-1])


def _kept_by_loops(paths: _Paths, state: Walk, starts: Sequence[int]) -> dict[int, int]:
    """Bytes kept by the regions that end where this walk began, by their starts."""
    kept, found, wanted = _KeptByLoop(paths, state), {}, set(starts)
    for index in range(state.end - 1, min(wanted) - 1, -1):
        kept.take(paths.flow.steps[index])
        if index in wanted:
            found[index] = kept.total(index)
    return found


@dataclass(eq=False)
class _KeptByLoop:
    """What a region keeps, as its window grows back from its end.

    Attributes:
        before: storages that it keeps and that are made before the window as it is.
        inside: storages that its loop makes, which nobody keeps.
        made_bytes: of what it keeps and makes itself, ahead of the loop.
    """

    paths: _Paths
    state: Walk
    before: dict[Any, int] = field(default_factory=dict)
    inside: set[Any] = field(default_factory=set)
    made_bytes: int = 0

    def take(self, step: Step) -> None:
        """Widen the window by the step before it."""
        status = self.state.status.get(step.index, "unused")
        in_loop = status in {"loop", "both"}
        if step.node in self.paths.root_bytes:
            size = self.before.pop(step.node, 0)
            if status != "loop":
                self.made_bytes += size
            if in_loop:
                self.inside.add(step.node)
        if in_loop:
            for root in self.paths.roots(step):
                self.before.setdefault(root, self.paths.root_bytes[root])
        if status in {"ahead", "both"}:
            self._take_saved(step)

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


def certify_training(emitted: Emitted, flat: Sequence[Any], chunks: Sequence[int]) -> Certificate:
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
        self, search: Search, paths: _Paths, budget_bytes: int, flat: Sequence[Any]
    ) -> None:
        self.search, self.paths, self.flat = search, paths, list(flat)
        self.budget_bytes = budget_bytes
        self.banned: set[Any] = set()
        self.least_bytes = 1 << 62

    def run(self, tries: int) -> TrainingProgram:
        """The cheapest that fits among the paths, by bisection over the price."""
        options = self._options()
        low, high = 0, len(options) - 1
        best: TrainingProgram | None = None
        while low <= high and tries:
            tries -= 1
            middle = (low + high) // 2
            try:
                program = self._fitted(options[middle])
            except EmissionError:
                options = self._options()
                low, high = min(low, len(options) - 1), min(high, len(options) - 1)
                continue
            if program is None:
                low = middle + 1
            else:
                best, high = program, middle - 1
        if best is None:
            raise self._out_of_reach()
        return best

    def _options(self) -> list[tuple[Choice, ...]]:
        """Distinct paths, those that keep most first."""
        found: list[tuple[Choice, ...]] = []
        for price in (0.0, *_PRICES_S_PER_BYTE):
            path = self.paths.cheapest(price, self.banned)
            if path is not None and (not found or path != found[-1]):
                found.append(path)
        return found

    def _fitted(self, choices: tuple[Choice, ...]) -> TrainingProgram | None:
        try:
            regions = [region_of(choice.candidate) for choice in choices]
            emitted = emit(self.search.flow, regions, reuse=False)
        except EmissionError as error:
            self.banned.add(choices[error.place].candidate.key)
            raise
        least = self._certify(emitted, (1,) * len(choices))
        if least.timeline.peak_bytes > self.budget_bytes:
            return None
        return self._grown(choices, emitted, least)

    def _grown(
        self, choices: tuple[Choice, ...], emitted: Emitted, least: Certificate
    ) -> TrainingProgram:
        """The same loops with the largest chunks that are of use and fit."""
        wanted = [_useful(choice.candidate) for choice in choices]
        fits = [(1, peak) for peak in least.loops]
        chunks, certificate = tuple(wanted), least
        laws = [(float(peak), 0.0) for peak in least.loops]
        for _ in range(_ROUNDS):
            found = self._certify(emitted, chunks)
            laws = [
                _law(fit, (chunk, peak)) if chunk > fit[0] else law
                for fit, chunk, peak, law in zip(fits, chunks, found.loops, laws, strict=True)
            ]
            if found.timeline.peak_bytes <= self.budget_bytes:
                certificate = found
                break
            chunks = tuple(
                chunk
                if peak <= self.budget_bytes
                else max(1, min(chunk - 1, int((self.budget_bytes - law[0]) / max(law[1], 1.0))))
                for chunk, peak, law in zip(chunks, found.loops, laws, strict=True)
            )
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

    def _certify(self, emitted: Emitted, chunks: Sequence[int]) -> Certificate:
        found = certify_training(emitted, self.flat, chunks)
        self.least_bytes = min(self.least_bytes, found.timeline.peak_bytes)
        return found

    def _out_of_reach(self) -> MemoryBudgetError:
        least = self.least_bytes if self.least_bytes < 1 << 62 else 0
        error = MemoryBudgetError(
            f"{self.search.traced.name} cannot be trained in {format_bytes(self.budget_bytes)}: "
            f"the least that loops brought a forward and a backward to is {format_bytes(least)}, "
            "gradients of parameters included"
        )
        error.floor_bytes = least
        return error


def _useful(candidate: Candidate) -> int:
    """The chunk size beyond which turns only take more memory; equal turns."""
    unit = max(candidate.turn_bytes, 1.0)
    most = max(1, min(candidate.units, int(_TURN_BYTES // unit)))
    return -(-candidate.units // -(-candidate.units // most))


def _law(less: tuple[int, int], more: tuple[int, int]) -> tuple[float, float]:
    """Bytes at chunk size 0 and per unit, from two chunk sizes and their peaks."""
    slope = max(0.0, (more[1] - less[1]) / (more[0] - less[0]))
    return less[1] - slope * less[0], slope
