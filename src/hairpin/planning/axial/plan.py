"""How a folding model is split: data, made by hand or chosen."""

import itertools
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar, cast, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.topology import Tier, Topology
from hairpin.errors import PlanError
from hairpin.planning.axial.choose import (
    Candidate,
    Lengths,
    Manner,
    block_of,
    candidates,
    fastest,
    table,
    transfers,
)
from hairpin.planning.axial.cost import Speeds
from hairpin.planning.axial.stacks import evoformer_stacks
from hairpin.planning.axial.way import LineProduct, Passing, Product
from hairpin.units import parse_bytes

_LINK = Tier(1e-5, 50e9)  # of the order of GPUs in one host
_PIECES = (1, 4)  # that are tried

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AxialPlan:
    """Dynamic axial parallelism of a folding model over one mesh axis, or over a grid of two.

    Attributes:
        axis: of the mesh; or two of them, the grid's rows and its columns.
        degree: its ranks; or of each.
        product: how triangle products cross the ranks: ``"gather"`` the right operand (Cheng et al.
            2022), ``"ring"``: its parts pass by, or ``"channels"``: each rank computes some
            channels of all pairs. On a grid: ``"grid"``, parts pass by in both directions.
        passing: how pair biases and the outer product's operand do: ``"gather"`` or ``"ring"``.
        pieces: row attention, and a product by channels, are computed in so many pieces, each sent
            while the next is computed.
        chunks: what the rows of a rank need not meet for is computed in so many parts, one after
            another, and in training once more in the backward: less memory.
        candidates: what each way would take for a block, the fastest first; none if one was asked
            for.

    Raises:
        PlanError: a way that does not exist, or not on so many axes.
    """

    axis: str | tuple[str, str] = "sp"
    degree: int | tuple[int, int] = 1
    product: Product = "gather"
    passing: Passing = "gather"
    pieces: int = 1
    chunks: int = 1
    candidates: tuple[Candidate, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, kinds in (("product", get_args(Product)), ("passing", get_args(Passing))):
            if getattr(self, name) not in kinds:
                raise PlanError(f"{name}={getattr(self, name)!r}: write one of {', '.join(kinds)}")
        if isinstance(self.axis, str):
            self._check_line()
        else:
            self._check_grid()
        if len(_several(self.degree)) != len(self.axes):
            raise PlanError(
                f"degree={self.degree!r} for axis={self.axis!r}; give one for each axis"
            )
        numbers: list[tuple[str, Any]] = [("degree", degree) for degree in self.degrees.values()]
        numbers += [("pieces", self.pieces), ("chunks", self.chunks)]
        for name, number in numbers:
            if not isinstance(number, int) or number < 1:
                raise PlanError(f"{name}={number!r}; give a whole number of at least 1")

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes, one or two."""
        return _several(self.axis)

    @property
    def degrees(self) -> dict[str, int]:
        """Ranks along each axis."""
        return dict(zip(self.axes, _several(self.degree), strict=True))

    @property
    def ranks(self) -> int:
        """Ranks over which a model is split."""
        return prod(self.degrees.values())

    def _check_line(self) -> None:
        if self.product == "grid":
            raise PlanError(
                f"product='grid' on axis {self.axis!r} alone: a grid has two axes, such as "
                "axis=('rows', 'columns')"
            )

    def _check_grid(self) -> None:
        if not isinstance(self.axis, tuple):
            raise PlanError(f"axis={self.axis!r}: give a name, or a tuple of two names for a grid")
        if len(self.axes) != 2 or len(set(self.axes)) != 2:
            raise PlanError(
                f"axis={self.axis!r}: name one axis, or two different ones for a grid, such as "
                "axis=('rows', 'columns')"
            )
        if self.pieces != 1:
            raise PlanError(
                f"pieces={self.pieces} on the grid {self.axis}: only on one axis is work done in "
                "pieces; leave it out"
            )
        if self.product != "grid":
            raise PlanError(
                f"product={self.product!r} on the grid {self.axis}: two axes have one way, "
                "product='grid'; leave it out of plan_axial, or plan over one axis"
            )

    def explain(self) -> str:
        """The plan for people: of a chosen one, what each way takes and what hides behind what."""
        head = (
            f"dynamic axial parallelism over {self.degree} ranks of axis {self.axis!r}: triangle "
            f"products by {self.product}, biases by {self.passing}, in {self.pieces} pieces and "
            f"{self.chunks} chunks"
        )
        if not self.candidates:
            return head
        parts = [head, "one Evoformer block on one rank:", table(self.candidates)]
        chosen = [candidate for candidate in self.candidates if self._is(candidate)]
        if chosen:  # it is none of them where a way was changed afterwards
            parts += ["its exchanges:", transfers(chosen[0])]
        return "\n\n".join(parts)

    def _is(self, candidate: Candidate) -> bool:
        return candidate.manner == Manner(self.product, self.passing, self.pieces, self.chunks)


def _several(one_or_more: T | tuple[T, ...]) -> tuple[T, ...]:
    return one_or_more if isinstance(one_or_more, tuple) else (one_or_more,)


def plan_axial(
    mesh: Mesh | DeviceMesh,
    model: nn.Module | None = None,
    *,
    axis: str | tuple[str, str] = "sp",
    product: Product | None = None,
    passing: Passing | None = None,
    pieces: int | None = None,
    chunks: int | None = None,
    sequences: int | None = None,
    residues: int | None = None,
    topology: Topology | None = None,
    memory: int | str | None = None,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AxialPlan:
    """Plan the split of a folding model over the ranks of a mesh axis, or of two as a grid.

    With a model, every way is rehearsed on shapes and the fastest that fits is chosen. Without one,
    ``product``, ``passing``, ``pieces`` and ``chunks`` say how; gathered and at once if left out.

    Args:
        mesh: live, or a description.
        model: an AlphaFold, or a part of one with Evoformer blocks.
        axis: of the mesh; or two of them, the grid's rows and its columns.
        product: how triangle products cross the ranks, see :class:`AxialPlan`; ``"grid"`` on two
            axes.
        passing: how pair biases do.
        pieces: in how many pieces work is done that a large transfer follows.
        chunks: in how many parts rows are computed that need not meet.
        sequences: of the MSA; residues: of the protein. Both are needed with a model.
        topology: the ranks' links and speeds, from ``hp.Topology.measure`` or by hand; links of
            50 GB/s and the topology's default speeds if left out.
        memory: bytes, or text such as ``"2GiB"``, that one block may hold on a rank.
        backward: plan for training.
        dtype: of the representations.

    Raises:
        MemoryBudgetError: no way holds as little as ``memory``.
        PlanError: a way that does not exist, a model without blocks, or lengths left out.
        MeshError: no such axis.
    """
    axis = axis if isinstance(axis, str) else cast("tuple[str, str]", tuple(axis))
    sizes = tuple(as_mesh(mesh).size(one) for one in _several(axis))
    default: Product = "gather" if isinstance(axis, str) else "grid"
    asked = AxialPlan(
        axis=axis,
        degree=sizes[0] if isinstance(axis, str) else cast("tuple[int, int]", sizes),
        product=default if product is None else product,
        passing="gather" if passing is None else passing,
        pieces=1 if pieces is None else pieces,
        chunks=1 if chunks is None else chunks,
    )
    if model is None:
        if (sequences, residues, topology, memory) != (None,) * 4 or backward:
            raise PlanError(
                "sequences, residues, topology, memory and backward choose a way for a model: give "
                "the model"
            )
        return asked
    if sequences is None or residues is None:
        raise PlanError("a way is chosen for a size: give sequences=... and residues=...")
    if sequences < 1 or residues < 1:
        raise PlanError(f"{sequences=}, {residues=}; there is at least one of each")
    topology = Topology.flat(asked.ranks, _LINK) if topology is None else topology
    if topology.ranks != asked.ranks:
        raise PlanError(
            f"the topology is of {topology.ranks} ranks and axis {axis!r} has {asked.ranks}; "
            "measure it on this axis"
        )
    found = candidates(
        block_of(model, evoformer_stacks(model)),
        _ways(asked, product=product, passing=passing, pieces=pieces, chunks=chunks),
        Lengths(asked.degree, sequences, residues, dtype, backward),
        Speeds.of(topology),
        None if memory is None else parse_bytes(memory),
        more_chunks=chunks is None,
    )
    best = fastest(found, memory).manner
    return replace(
        asked,
        product=best.product,
        passing=best.passing,
        pieces=best.pieces,
        chunks=best.chunks,
        candidates=found,
    )


def _ways(asked: AxialPlan, **given: Any) -> list[Manner]:
    """All ways of what was not given.

    Where biases pass by, pieces make a difference to products by channels alone.
    """
    is_line = isinstance(asked.axis, str)
    kinds = {
        "product": get_args(LineProduct) if is_line else ("grid",),
        "passing": get_args(Passing),
        "pieces": _PIECES if is_line else (1,),
        "chunks": (1,),
    }
    several = [kinds[name] if choice is None else (choice,) for name, choice in given.items()]
    ways = [Manner(*way) for way in itertools.product(*several)]
    return [
        way
        for way in ways
        if way.passing == "gather" or way.product == "channels" or way.pieces == ways[0].pieces
    ]
