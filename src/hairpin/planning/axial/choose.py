"""Choosing how a folding model crosses the ranks: the fastest way that fits, by rehearsal."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hairpin.comm.rehearsal import RehearsalMesh
from hairpin.errors import MemoryBudgetError, PlanError
from hairpin.planning.axial.cost import Predicted, Rehearsed, Speeds, predict, rehearse
from hairpin.planning.axial.grid import Grid
from hairpin.planning.axial.msa import arrives_along, evoformer_block
from hairpin.planning.axial.way import Line, Passing, Product, Way
from hairpin.units import format_bytes, format_time

_AXIS = "axis"
_CHUNKS = (1, 4, 16)  # that are tried, where nothing fits in fewer


@dataclass(frozen=True)
class Lengths:
    """What a rehearsal needs to know of a call.

    Attributes:
        degree: ranks; or of a grid's rows and its columns.
        sequences: of the MSA; residues: of the protein.
        dtype: of m and z.
        backward: whether there is one.
    """

    degree: int | tuple[int, int]
    sequences: int
    residues: int
    dtype: torch.dtype = torch.float32
    backward: bool = False


@dataclass(frozen=True)
class Manner:
    """How a block crosses the ranks; see :class:`hairpin.AxialPlan`."""

    product: Product = "gather"
    passing: Passing = "gather"
    pieces: int = 1
    chunks: int = 1


@dataclass(frozen=True)
class Candidate:
    """One manner and what a block of it takes on the busiest rank, which is the first.

    Attributes:
        run: what it sends, holds and computes.
        laid_out: the same in time.
        fits: within the memory that was allowed.
    """

    manner: Manner
    run: Rehearsed
    laid_out: Predicted
    fits: bool = True


class _Block(nn.Module):
    """An Evoformer block as one rank of a rehearsal runs it."""

    def __init__(self, block: Any, way: Way) -> None:
        super().__init__()
        self.block, self.way = block, way

    def forward(self, m: torch.Tensor, z: torch.Tensor, *masks: torch.Tensor) -> Any:
        leaves = arrives_along(self.block)
        return evoformer_block(self.block, m, z, (masks[0], masks[1]), self.way, leaves=leaves)


def candidates(
    block: nn.Module,
    manners: Sequence[Manner],
    lengths: Lengths,
    speeds: Speeds,
    memory_bytes: int | None = None,
    *,
    more_chunks: bool = False,
) -> tuple[Candidate, ...]:
    """What each manner takes: those that fit first, then by time.

    Args:
        more_chunks: where none fits, try them in ever more chunks.
    """
    meta = copy.deepcopy(block).to("meta")
    meta.requires_grad_(lengths.backward)
    found: list[Candidate] = []
    for chunks in _CHUNKS if more_chunks else _CHUNKS[:1]:
        for manner in manners:
            chunked = manner if chunks == 1 else replace(manner, chunks=chunks)
            run = rehearse_block(meta, chunked, lengths)
            fits = memory_bytes is None or run.peak_bytes <= memory_bytes
            found.append(Candidate(chunked, run, predict(run, speeds), fits))
        if any(c.fits for c in found):
            break
    return tuple(sorted(found, key=lambda c: (not c.fits, c.laid_out.time_s)))


def rehearse_block(block: Any, manner: Manner, lengths: Lengths) -> Rehearsed:
    """One Evoformer block, of the meta device, on the first rank."""
    s, r = lengths.sequences, lengths.residues
    way = _way(manner, lengths)
    c_m = block.msa_transition.norm.weight.shape[0]
    c_z = block.pair_stack.pair_transition.norm.weight.shape[0]
    mine = {dim: len(range(n)[way.mine(dim)]) for dim, n in (("s", s), ("r", r))}
    rows, columns = (mine["s"], r) if arrives_along(block) == "s" else (s, mine["r"])
    shapes: list[tuple[int, ...]] = [(rows, columns, c_m), (r, mine["r"], c_z), (s, r), (r, r)]
    args = [torch.empty(shape, dtype=lengths.dtype, device="meta") for shape in shapes]
    for x in args[:2]:
        x.requires_grad_(lengths.backward)
    assert isinstance(way.mesh, RehearsalMesh)
    return rehearse(_Block(block, way), args, way.mesh, backward=lengths.backward)


def _way(manner: Manner, lengths: Lengths) -> Way:
    """On the first rank of a rehearsal."""
    s, r, degree = lengths.sequences, lengths.residues, lengths.degree
    words: dict[str, Any] = {**vars(manner), "lengths": {"s": s, "r": r, "i": r, "j": r}}
    if isinstance(degree, int):
        return Line(mesh=RehearsalMesh(0, **{_AXIS: degree}), axis=_AXIS, **words)
    mesh = RehearsalMesh(0, rows=degree[0], columns=degree[1])
    return Grid(mesh=mesh, rows="rows", columns="columns", **words)


def fastest(found: Sequence[Candidate], memory: int | str | None) -> Candidate:
    """The best of :func:`candidates`.

    Raises:
        MemoryBudgetError: none fits.
    """
    best = found[0]
    if not best.fits:
        least = min(c.run.peak_bytes for c in found)
        raise MemoryBudgetError(
            f"no way of splitting holds one block in {memory}: the least needs "
            f"{format_bytes(least)} a rank; allow more memory, or split over more ranks"
        )
    return best


def block_of(model: nn.Module, stacks: Sequence[Any]) -> nn.Module:
    """A block of the stack with the most Evoformer blocks.

    Raises:
        PlanError: there is none.
    """
    if not stacks:
        raise PlanError(
            f"{type(model).__name__} has no stack of Evoformer blocks to plan for; give an "
            "AlphaFold, or say product= and passing= without a model"
        )
    largest = max(stacks, key=lambda stack: len(stack.blocks))
    return largest.blocks[0]  # type: ignore[no-any-return]


def table(found: Sequence[Candidate]) -> str:
    """The candidates for people, a line each: one block on one rank."""
    head = ("product", "passing", "pieces", "chunks", "time", "waits", "sent", "held", "")
    rows = [
        (
            c.manner.product,
            c.manner.passing,
            str(c.manner.pieces),
            str(c.manner.chunks),
            format_time(c.laid_out.time_s),
            format_time(sum(c.laid_out.exposed_s)),
            format_bytes(c.run.sent_bytes),
            format_bytes(c.run.peak_bytes),
            "" if c.fits else "no: holds too much",
        )
        for c in found
    ]
    return _aligned([head, *rows])


def transfers(c: Candidate) -> str:
    """What a block of a candidate sends, and how much of it hides behind work."""
    head = ("exchange", "sent", "takes", "behind work", "waits")
    out = c.laid_out
    times_s = zip(out.takes_s, out.hideable_s, out.exposed_s, strict=True)
    rows = [
        (sent.what, format_bytes(sent.nbytes), *(format_time(t) for t in times))
        for sent, times in zip(c.run.sent, times_s, strict=True)
    ]
    return _aligned([head, *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
