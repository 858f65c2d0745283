"""Loops as data: what a plan says about them, in a file and for people."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from hairpin.graph.autocast import autocast_now
from hairpin.graph.memory import Flow
from hairpin.planning.loops.choose import Choice
from hairpin.planning.loops.program import Program
from hairpin.planning.loops.regions import axis_span
from hairpin.planning.loops.rewrite import Rewrite, rewrite_from
from hairpin.planning.loops.training import TrainingProgram
from hairpin.units import format_bytes, format_time


@dataclass(frozen=True)
class LoopRegion:
    """One loop of a block.

    Attributes:
        first, last: names of the first and last step of its window.
        start, end: their places in the graph, end not included.
        seed, axis, scale: the step whose result is cut, along which of its axes, in what units.
        tensor: name of that result, with its shape; ``dim`` is the dim cut, None where parts of
            the result are added up.
        units: length of the dim in the example.
        chunk: of it that one turn takes.
        steps: operations in one turn.
        fixed_bytes: alive during the loop whatever the chunk.
        unit_bytes: alive per unit of the chunk.
        cost_s: predicted seconds beyond the same operations without a loop.
        inner: loops inside a turn, by the steps of its own graph.
    """

    first: str
    last: str
    start: int
    end: int
    seed: int
    axis: int
    scale: int
    tensor: str
    shape: tuple[int, ...]
    dim: int | None
    units: int
    chunk: int
    steps: int
    fixed_bytes: int
    unit_bytes: int
    cost_s: float
    inner: tuple["LoopRegion", ...] = ()

    @property
    def turns(self) -> int:
        """Turns of the loop in the example."""
        return -(-self.units // self.chunk)


@dataclass(frozen=True)
class BlockLoops:
    """The loops of one distinct block.

    Attributes:
        modules: paths of the modules that are this block, ``""`` for the model itself.
        block: class name.
        graph: digest of its graph; loops fit no other.
        training: mode it was traced in.
        backward: whether the budget covers a backward too.
        budget_bytes: what one call may hold; ``entry_bytes`` is alive when it begins.
        peak_bytes: what it holds, certified; ``whole_peak_bytes`` without loops.
        margin_bytes: how much the certificate found beyond the search's estimate.
        rewrites: what brings the graph into the order that the loops are of.
        autocast: setting of torch.autocast that it was planned under.
        lengths: the open lengths of the graph in the example.
        kept: for training, what is held between forward and backward, and during the backward
            (:class:`~hairpin.planning.loops.training.Kept`).
        loop_peaks: for training, of each loop the law of its peak: bytes at chunk size 0, and per
            unit.
    """

    modules: tuple[str, ...]
    block: str
    graph: str
    training: bool
    backward: bool
    budget_bytes: int
    entry_bytes: int
    peak_bytes: int
    whole_peak_bytes: int
    margin_bytes: int
    loops: tuple[LoopRegion, ...]
    rewrites: tuple[Rewrite, ...] = ()
    autocast: str = ""
    lengths: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    loop_peaks: tuple[tuple[float, float], ...] = ()


def block_loops(program: Program, modules: Sequence[str], whole_peak_bytes: int) -> BlockLoops:
    """A program as data."""
    return BlockLoops(
        modules=tuple(modules),
        block=program.traced.name,
        graph=program.traced.digest,
        training=program.traced.training,
        backward=program.backward,
        budget_bytes=program.budget_bytes,
        entry_bytes=program.entry_bytes,
        peak_bytes=program.peak_bytes,
        whole_peak_bytes=whole_peak_bytes,
        margin_bytes=program.margin_bytes,
        loops=tuple(
            _loop(program.search.flow, replace(choice, chunk=chunk))
            for choice, chunk in zip(program.choices, program.chunks, strict=True)
        ),
        rewrites=program.search.rewrites,
        autocast=autocast_now(),
        lengths=tuple(program.example.values()),
        kept=astuple(program.kept) if isinstance(program, TrainingProgram) else (),
        loop_peaks=program.loop_peaks if isinstance(program, TrainingProgram) else (),
    )


def _loop(flow: Flow, choice: Choice) -> LoopRegion:
    found = choice.candidate
    step = flow.steps[found.seed.step]
    axis = step.axes[found.seed.axis]
    shape = step.operation.outputs[0] if step.operation is not None else ()
    return LoopRegion(
        first=flow.steps[found.start].node.name,
        last=flow.steps[found.end - 1].node.name,
        start=found.start,
        end=found.end,
        seed=found.seed.step,
        axis=found.seed.axis,
        scale=found.seed.scale,
        tensor=step.node.name,
        shape=tuple(shape),
        dim=None if axis.sums else axis_span(axis).dim,
        units=found.units,
        chunk=choice.chunk,
        steps=found.steps,
        fixed_bytes=found.fixed_bytes,
        unit_bytes=round(found.unit_bytes),
        cost_s=choice.cost_s,
        inner=_inner(choice),
    )


def _inner(choice: Choice) -> tuple[LoopRegion, ...]:
    inside = choice.candidate.inside
    return () if inside is None else tuple(_loop(inside.flow, each) for each in choice.inner)


def explain_loops(blocks: Sequence[BlockLoops]) -> list[tuple[str, ...]]:
    """A table for people: every loop with its dim, chunk, bytes and cost."""
    rows: list[tuple[str, ...]] = [
        ("module", "loop over", "of", "chunk", "turns", "steps", "holds", "costs")
    ]
    for block in blocks:
        name = names_of(block)
        found = [row for loop in block.loops for row in _rows(loop)]
        names = [name] + [""] * (len(found) - 1)
        rows += [(name, *row) for name, row in zip(names, found, strict=False)]
    return rows


def _rows(loop: LoopRegion, mark: str = "") -> list[tuple[str, ...]]:
    """What is said of a loop and, below it, of those inside."""
    over = "sum" if loop.dim is None else f"dim {loop.dim}"
    holds = loop.fixed_bytes + loop.unit_bytes * loop.chunk
    own = (
        f"{mark}{over} of {loop.tensor} {list(loop.shape)}",
        str(loop.units),
        str(loop.chunk),
        str(loop.turns),
        f"{loop.first} .. {loop.last} ({loop.steps})",
        format_bytes(holds),
        format_time(loop.cost_s),
    )
    return [own, *(row for each in loop.inner for row in _rows(each, f"{mark}inside: "))]


def names_of(block: BlockLoops) -> str:
    """The modules of a block, in few words."""
    first = block.modules[0] or block.block
    more = len(block.modules) - 1
    return f"{first} and {more} more" if more else first


def loops_from(data: Sequence[Mapping[str, Any]]) -> tuple[BlockLoops, ...]:
    """Loops from what a TOML file holds."""
    return tuple(
        BlockLoops(
            **{
                **block,
                "modules": tuple(block["modules"]),
                "loops": tuple(_loop_from(loop) for loop in block["loops"]),
                "lengths": tuple(block.get("lengths", ())),
                "kept": tuple(block.get("kept", ())),
                "loop_peaks": tuple((at, by) for at, by in block.get("loop_peaks", ())),
                "rewrites": tuple(rewrite_from(each) for each in block.get("rewrites", ())),
            }
        )
        for block in data
    )


def _loop_from(data: Mapping[str, Any]) -> LoopRegion:
    inner = tuple(_loop_from(each) for each in data.get("inner", ()))
    return LoopRegion(**{"dim": None, **data, "shape": tuple(data["shape"]), "inner": inner})
