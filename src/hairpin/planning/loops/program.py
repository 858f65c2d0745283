"""One block's graph with loops, and the chunk sizes that keep it under a budget at any lengths."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from hairpin.errors import MemoryBudgetError
from hairpin.graph.export import Port, Traced, packed_outputs
from hairpin.graph.leaf import BlockCall, state
from hairpin.graph.lengths import compiled, hint
from hairpin.graph.memory import Flow, flow_of
from hairpin.graph.meter import Meter, Timeline, measure
from hairpin.planning.loops.choose import (
    Choice,
    best_chunk,
    cheapest,
)
from hairpin.planning.loops.emit import EmissionError, Emitted, Region, body_of, emit
from hairpin.planning.loops.loop import Loop
from hairpin.planning.loops.regions import (
    Candidate,
    Seed,
    Walk,
    seed_length,
    sized,
    walk,
)
from hairpin.planning.loops.rewrite import rewritten
from hairpin.planning.loops.search import Search
from hairpin.planning.speeds import Speeds
from hairpin.units import format_bytes

_TRIES = 8  # certificates asked for before a budget counts as out of reach
_CORRECTIONS = 3  # certificates that may correct the chunk sizes at new lengths
_MOST_BANNED = 100  # regions that turned out not to be writable as a loop


@dataclass(eq=False)
class Program:
    """A graph with loops for one budget.

    Attributes:
        chunks: of each loop, at the example's lengths.
        margin_bytes: how much more than the search's estimate the certificate found.
        peak_bytes: of one run at the example's lengths, certified.
        certificate: bytes along that run, counted on fake tensors; None for a plan from a file.
        backward: whether the budget covers a backward too.
        entry_bytes: of the model's budget, already alive when the block begins; with other lengths
            taken to grow as the block's inputs do.
        stamps: path of each block of this kind -> its settings when it was planned.
        speeds: of the machine, which the choice of loops and chunks weighed.
        planned: the lengths of the example, where the graph was traced again at others.
    """

    search: Search
    choices: tuple[Choice, ...]
    emitted: Emitted
    budget_bytes: int
    chunks: tuple[int, ...]
    margin_bytes: int
    peak_bytes: int
    certificate: Timeline | None = None
    backward: bool = False
    entry_bytes: int = 0
    stamps: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=Speeds)
    planned: Mapping[Any, int] = field(default_factory=dict)
    _others: dict[tuple[int, ...], "Program"] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> "Program":
        """A copy of a model shares its programs: they hold no weights."""
        return self

    @property
    def traced(self) -> Traced:
        """The graph."""
        return self.search.traced

    @property
    def example(self) -> Mapping[Any, int]:
        """The open lengths that the chunks are for."""
        return self.planned or self.traced.example

    def run(self, block: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The block's own result, computed in parts."""
        flat = self.traced.flat_inputs(block, forward, args, kwargs)
        return self.run_flat(block, flat)

    def run_flat(self, block: nn.Module, flat: Sequence[Any]) -> Any:
        """The same from the graph's own inputs."""
        program = self.at(flat)
        values = program.emitted.module(*flat, *program.chunks)
        return packed_outputs(self.traced, self._written(block, flat, values))

    def _written(self, block: nn.Module, flat: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Write new values of arguments and buffers into them; the outputs, which may be those."""
        nodes: list[Any] = list(self.traced.output.args[0])  # type: ignore[arg-type]
        kept = list(values)
        for port, node, value in zip(self.traced.outputs, nodes, values, strict=True):
            if port.kind == "returned":
                continue
            target = self._target(block, flat, port)
            target.copy_(value)
            kept = [
                target if other is node else now for other, now in zip(nodes, kept, strict=True)
            ]
        return kept

    def _target(self, block: nn.Module, flat: Sequence[Any], port: Port) -> Tensor:
        if port.kind == "state":
            return state(block, port.name)
        place = next(
            i
            for i, given in enumerate(self.traced.inputs)
            if given.kind == "given" and given.name == port.name
        )
        found: Tensor = flat[place]
        return found

    def code(self) -> str:
        """The graph as Python, and the body of each loop, for people to read."""
        parts = [_readable(self.emitted.module)]
        parts += _code_of_loops(self.emitted.module, self.choices)
        return "\n".join(parts)

    def compile_bodies(self) -> None:
        """Hand the body of each loop to ``torch.compile``; the loop itself stays Python."""
        for loop in self.emitted.module.modules():
            if isinstance(loop, Loop) and not any(isinstance(m, Loop) for m in loop.body.modules()):
                loop.body.compile(dynamic=True)

    def at(self, flat: Sequence[Any]) -> "Program":
        """This program with the chunk sizes for the lengths of these inputs, certified for them.

        The first call at new lengths costs a run on fake tensors; later ones cost nothing.

        Raises:
            MemoryBudgetError: no loops keep to the budget at these lengths.
        """
        lengths = self.traced.lengths(flat)
        if self._is_example(lengths):
            return self
        key = tuple(lengths.values())
        if key not in self._others:
            with _disable_current_modes():  # we may be on fake tensors, and counted, ourselves
                self._others[key] = self._for(flat, lengths)
        return self._others[key]

    def _for(self, flat: Sequence[Any], lengths: Mapping[Any, int]) -> "Program":
        room = self.room(lengths)
        if not self.emitted.bound:
            margin = self.margin_bytes
            for _ in range(_CORRECTIONS):
                chunks = self.fit(lengths, margin)
                if chunks is None:
                    break
                peak = certify(self.emitted, flat, chunks, {}).peak_bytes
                if peak <= room:
                    return replace(self, chunks=chunks, peak_bytes=peak)
                margin += peak - room
        made = make_program(Search.at(self.traced, flat), room, flat, self.speeds)
        return replace(made, backward=self.backward, entry_bytes=self.entry_bytes)

    def _is_example(self, lengths: Mapping[Any, int]) -> bool:
        return all(size == lengths[symbol] for symbol, size in self.example.items())

    def room(self, lengths: Mapping[Any, int]) -> int:
        """Bytes that a call may hold at these lengths."""
        if not self.entry_bytes:
            return self.budget_bytes
        here, then = (sum(self._input_bytes(n)) for n in (lengths, self.example))
        memory = self.budget_bytes + self.entry_bytes
        return memory - -(-self.entry_bytes * here // max(then, 1))

    def fit(self, lengths: Mapping[Any, int], margin_bytes: int = 0) -> tuple[int, ...] | None:
        """Largest chunk sizes that fit at these lengths: no search, no new trace.

        None where these loops do not fit, so that other ones are needed.
        """
        room = self.room(lengths) - margin_bytes
        flow = self.search.flow.at(lengths)
        inside: set[int] = set()
        found = []
        for candidate in self._sized(flow, lengths):
            chunk = best_chunk(candidate, room, self.speeds)
            if not chunk:
                return None
            found.append(chunk)
            inside.update(range(candidate.start, candidate.end))
        if any(flow.during(step) > room for step in flow.steps if step.index not in inside):
            return None
        return tuple(found)

    def _sized(self, flow: Flow, lengths: Mapping[Any, int]) -> Iterator[Candidate]:
        """The regions with what they hold at other lengths, that ``flow`` has too."""
        for state_, choice, length in zip(
            self._walks, self.choices, self._units(lengths), strict=True
        ):
            here = replace(state_, flow=flow, length=length)
            yield from sized(here, [choice.candidate.start])

    @cached_property
    def _walks(self) -> list[Walk]:
        """Of each region: where its steps run does not depend on lengths."""
        found = (choice.candidate for choice in self.choices)
        return [walk(self.search.flow, c.end, c.seed) for c in found]

    @cached_property
    def _input_bytes(self) -> Callable[[Mapping[Any, int]], list[int]]:
        nodes = self.traced.placeholders
        ports = zip(nodes, self.traced.inputs, strict=True)
        values = [node.meta["val"] for node, port in ports if port.kind == "given"]
        return compiled([v.numel() * v.element_size() for v in values])

    @cached_property
    def _units(self) -> Callable[[Mapping[Any, int]], list[int]]:
        flow = self.search.flow
        return compiled([seed_length(flow, c.candidate.seed) for c in self.choices])


def make_program(
    search: Search,
    budget_bytes: int,
    flat: Sequence[Any],
    speeds: Speeds,
    inner: Mapping[str, int] | None = None,
) -> Program:
    """The cheapest loops under a budget, their peak certified on fake tensors.

    Where the graph's own order does not allow it, others are tried.

    Args:
        flat: the graph's inputs; fake ones will do.
        inner: path of a block inside the graph -> bytes that it holds while it runs.

    Raises:
        MemoryBudgetError: there is no way; the floor is in the message and in ``floor_bytes``.
    """
    order: Search | None = search
    least: MemoryBudgetError | None = None
    while order is not None:
        try:
            return _program(order, budget_bytes, flat, speeds, inner or {})
        except MemoryBudgetError as error:
            least = min(least or error, error, key=lambda each: each.floor_bytes)
        order = order.better
        while order is not None and order.floor_bytes > budget_bytes and order.better is not None:
            order = order.better
    assert least is not None
    raise least


def _program(
    search: Search,
    budget_bytes: int,
    flat: Sequence[Any],
    speeds: Speeds,
    inner: Mapping[str, int],
) -> Program:
    """The same in one order of the graph."""
    margin, corrections, banned = 0, Counter[Any](), set[Any]()
    tries, least = 0, 0
    while tries < _TRIES and len(banned) < _MOST_BANNED:
        found = [_corrected(c, corrections[c.key]) for c in search.found if c.key not in banned]
        choices = cheapest(search.flow, search.marks, found, budget_bytes - margin, speeds)
        if choices is None:
            break
        try:
            emitted = emit(search.flow, [region_of(choice) for choice in choices])
        except EmissionError as error:
            banned.add(choices[error.place].candidate.key)
            continue
        tries += 1
        chunks = tuple(choice.chunk for choice in choices)
        certificate = certify(emitted, flat, chunks, inner)
        if certificate.peak_bytes <= budget_bytes:
            return Program(
                search,
                tuple(choices),
                emitted,
                budget_bytes,
                chunks,
                margin,
                certificate.peak_bytes,
                certificate,
                speeds=speeds,
            )
        least = min(least or certificate.peak_bytes, certificate.peak_bytes)
        for label, over in _over(certificate, budget_bytes).items():
            place = list(emitted.loops).index(label) if label in emitted.loops else None
            if place is None:
                margin += over
            else:
                corrections[choices[place].candidate.key] += over
    raise _out_of_reach(search, budget_bytes, max(search.floor_bytes, least))


def _corrected(candidate: Candidate, nbytes: int) -> Candidate:
    """A region that holds more than the search took it to."""
    if not nbytes:
        return candidate
    return replace(
        candidate,
        ahead_bytes=candidate.ahead_bytes + nbytes,
        fixed_bytes=candidate.fixed_bytes + nbytes,
    )


def _over(certificate: Timeline, budget_bytes: int) -> dict[str, int]:
    """By how much each loop, and what is outside them (``""``), went over the budget."""
    found: dict[str, int] = {}
    for moment in certificate.moments:
        over = moment.live_bytes - budget_bytes
        if over > 0:
            found[moment.label] = max(found.get(moment.label, 0), over)
    return found


def _code_of_loops(module: nn.Module, choices: Sequence[Choice], within: str = "") -> list[str]:
    """The bodies of a graph's loops, and of those inside them."""
    parts = []
    for number, choice in enumerate(choices, start=1):
        name = f"{within}loop_{number}"
        loop = module.get_submodule(f"loop_{number}")
        assert isinstance(loop, Loop)
        parts += [
            f"# {name}: {choice.candidate.units} units, {choice.chunk} at a time",
            *(f"#   {line}" for line in loop.words()),
            _readable(loop.body),
            *_code_of_loops(loop.body, choice.inner, f"{name}."),
        ]
    return parts


def _readable(module: fx.GraphModule) -> str:
    """The code of a graph without the lines that only release values."""
    lines = [line.partition(";  ")[0].rstrip() for line in module.code.splitlines()]
    return "\n".join(line.replace("torch.ops.aten.", "aten.") for line in lines if line) + "\n"


def restored(traced: Traced, loops: Any, kind: type[Program] = Program, **laws: Any) -> Program:
    """The program that a plan's description of loops stands for: no search, no certificate.

    Args:
        loops: a :class:`~hairpin.planning.loops.data.BlockLoops` for exactly this graph.
        kind: of program; ``laws`` is what it has beyond a plain one.
    """
    traced = rewritten(traced, loops.rewrites)
    flow = flow_of(traced.graph)
    choices = [_chosen_before(flow, loop) for loop in loops.loops]
    emitted = emit(flow, [region_of(choice) for choice in choices], reuse=not loops.backward)
    return kind(
        Search(traced, flow, [], [], lambda order: flow_of(order.graph), loops.rewrites),
        tuple(choices),
        emitted,
        loops.budget_bytes,
        tuple(loop.chunk for loop in loops.loops),
        loops.margin_bytes,
        loops.peak_bytes,
        backward=loops.backward,
        entry_bytes=loops.entry_bytes,
        planned=dict(zip(traced.example, loops.lengths, strict=False)),
        **laws,
    )


def _chosen_before(flow: Flow, loop: Any) -> Choice:
    """The choice that a plan's description of a loop stands for."""
    seed = Seed(loop.seed, loop.axis, loop.scale)
    (candidate,) = sized(walk(flow, loop.end, seed), [loop.start])
    choice = Choice(candidate, loop.chunk, loop.cost_s)
    if not loop.inner:
        return choice
    body = body_of(flow, region_of(choice))
    return replace(choice, inner=tuple(_chosen_before(body, each) for each in loop.inner))


def region_of(choice: Choice) -> Region:
    """What is to be emitted for a choice."""
    found = choice.candidate
    inner = tuple((region_of(each), each.chunk) for each in choice.inner)
    return Region(found.start, found.end, found.seed, inner)


def certify(
    emitted: Emitted, flat: Sequence[Any], chunks: Sequence[int], inner: Mapping[str, int]
) -> Timeline:
    """Bytes along one run of a graph with loops, exact, without running it.

    Args:
        inner: path of a block inside the graph -> bytes that it holds, instead of running it.
    """
    meter = Meter()
    values = [_Counted(x, meter, inner) if isinstance(x, BlockCall) else x for x in flat]
    labelled = _Labelled(emitted, meter)
    return measure(lambda *given: labelled.run(*given, *chunks), values, meter=meter)


class _Labelled(fx.Interpreter):
    """Runs a graph with loops, and tells the meter which loop each step belongs to."""

    def __init__(self, emitted: Emitted, meter: Meter) -> None:
        super().__init__(emitted.module)
        self.meter = meter

    def run_node(self, n: fx.Node) -> Any:
        """One step; those ahead of a loop count as the loop's."""
        self.meter.label = str(n.target) if n.op == "call_module" else n.meta.get("ahead_of", "")
        return super().run_node(n)


class _Counted:
    """Stands in for a block that was certified on its own."""

    def __init__(self, call: BlockCall, meter: Meter, inner: Mapping[str, int]) -> None:
        self.call, self.meter, self.inner = call, meter, inner

    def __call__(self, *tensors: Tensor) -> list[Any]:
        known = self.inner.get(self.call.path)
        if known is None:
            return self.call(*tensors)
        self.meter.bump(known)
        return [_like(out) for out in self.call.call.outputs]


def _like(traced: Any) -> Any:
    """An empty tensor as a traced value was in the example."""
    if not isinstance(traced, Tensor):
        return traced
    shape, strides = ([hint(size) for size in sizes] for sizes in (traced.shape, traced.stride()))
    return torch.empty_strided(shape, strides, dtype=traced.dtype, device=traced.device)


def _out_of_reach(search: Search, budget_bytes: int, floor_bytes: int) -> MemoryBudgetError:
    error = MemoryBudgetError(
        f"{search.traced.name} cannot run in {format_bytes(budget_bytes)}: the least that loops "
        f"can bring it to is about {format_bytes(floor_bytes)}"
    )
    error.floor_bytes = floor_bytes
    return error
