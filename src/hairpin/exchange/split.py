"""How one long sequence is split over one mesh axis, and which way its attention crosses it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.errors import SequenceError
from hairpin.exchange.call import Call, Level
from hairpin.exchange.order import Order
from hairpin.exchange.places import Places

Schedule = Literal["ring", "double_ring", "all_gather", "hierarchical", "rsa"]


@dataclass(frozen=True)
class SequenceSplit:
    """A sequence split over the P ranks of a mesh axis: P / u ring places by u heads places.

    ``heads=1`` is ring attention or one of its relatives, ``heads=P`` is DeepSpeed-Ulysses, between
    them lies USP. The positions of a ring place follow ``order``; its heads places share them out.

    Attributes:
        mesh: live, or a description for planning.
        axis: of the mesh.
        order: which positions a ring place holds.
        heads: u, places that turn the split from the sequence to the heads among themselves.
        schedule: how keys and values cross the ring places. ``"double_ring"``: ``inner`` ring
            places at a time; ``"hierarchical"``: gathered among ``inner``, a ring across;
            ``"rsa"``: Li et al. 2021, whole rows of scores, for comparison.
        heads_inside: whether the heads places are neighbours along the axis (u of them, then the
            next u), or the ring places are.
        inner: size of the inner rings or gathers.
        turns: rounds in which keys and values cross the ring places: some of their heads at a
            time, or some of one head's keys where that makes more turns than heads. What passes
            by takes so much less room; as many bytes are sent, in more messages. At least so many
            are taken; one where nothing crosses.

    Raises:
        SequenceError: degrees that do not divide, or an unknown schedule.
        MeshError: no such axis.
    """

    mesh: Mesh
    axis: str
    order: Order
    heads: int = 1
    schedule: Schedule = "ring"
    heads_inside: bool = True
    inner: int = 1
    turns: int = 1

    def __post_init__(self) -> None:
        ranks = self.mesh.size(self.axis)
        if self.schedule not in get_args(Schedule):
            raise SequenceError(
                f"schedule {self.schedule!r}: write one of {', '.join(get_args(Schedule))}"
            )
        if self.heads < 1 or ranks % self.heads:
            raise SequenceError(
                f"heads={self.heads} does not divide the {ranks} ranks of axis {self.axis!r}; "
                f"give a divisor of {ranks}"
            )
        if self.inner < 1 or self.ring % self.inner:
            raise SequenceError(
                f"inner={self.inner} does not divide the {self.ring} ring places; give a divisor "
                f"of {self.ring}"
            )
        if self.schedule == "rsa" and self.heads > 1:
            raise SequenceError("schedule 'rsa' keeps all heads on every rank; give heads=1")
        if self.turns < 1 or (self.schedule == "rsa" and self.turns > 1):
            raise SequenceError(
                f"turns={self.turns} of schedule {self.schedule!r}: give 1 or more, and 1 for "
                "'rsa', which holds whole rows of scores"
            )

    @property
    def ring(self) -> int:
        """Ring places."""
        return self.mesh.size(self.axis) // self.heads

    @property
    def rank(self) -> int:
        """This rank's place along the axis."""
        return self.mesh.rank(self.axis)

    def place(self, rank: int) -> tuple[int, int]:
        """(ring place, heads place) of a rank of the axis."""
        if self.heads_inside:
            return rank // self.heads, rank % self.heads
        return rank % self.ring, rank // self.ring

    def at(self, ring: int, heads: int) -> int:
        """The rank of a ring place and heads place."""
        return ring * self.heads + heads if self.heads_inside else heads * self.ring + ring

    @cached_property
    def calls(self) -> dict[Any, Call]:
        """What is known of calls by their keys and mask; a layer's cutting serves all layers."""
        return {}

    @cached_property
    def positions(self) -> Tensor:
        """Global positions that this rank holds, int64, ascending."""
        return self.positions_of(self.rank)

    def positions_of(self, rank: int) -> Tensor:
        """Global positions that a rank of the axis holds."""
        ring, heads = self.place(rank)
        with torch.inference_mode(False):  # they are kept, and training uses them too
            of_ring = self.order.positions(self.ring, ring)
            return of_ring.tensor_split(self.heads)[heads]

    def heads_places(self) -> Places:
        """The places that turn the split with this rank."""
        ring, _ = self.place(self.rank)
        members = tuple(self.at(ring, heads) for heads in range(self.heads))
        return Places(Link(self.mesh, self.axis), members)

    def levels(self) -> tuple[Level, ...]:
        """How keys and values reach this rank, outermost level first."""
        if self.ring == 1:
            return ()
        kind: Literal["ring", "gather"] = "gather" if self.schedule == "all_gather" else "ring"
        if self.schedule not in ("double_ring", "hierarchical") or self.inner in (1, self.ring):
            if self.schedule == "hierarchical" and self.inner == self.ring:
                kind = "gather"
            return (Level(kind, self._ring_places(0, 1, self.ring)),)
        ring, _ = self.place(self.rank)
        inside, group = ring % self.inner, ring // self.inner
        across = self._ring_places(inside, self.inner, self.ring // self.inner)
        within = self._ring_places(group * self.inner, 1, self.inner)
        kind = "gather" if self.schedule == "hierarchical" else "ring"
        return Level("ring", across), Level(kind, within)

    def _ring_places(self, start: int, step: int, count: int) -> Places:
        _, heads = self.place(self.rank)
        members = (self.at(start + step * i, heads) for i in range(count))
        return Places(Link(self.mesh, self.axis), tuple(members))


def require_sequence(x: Tensor, expected: int, *, what: str, split: SequenceSplit) -> None:
    """Raise unless ``x[b, h, s, d]`` holds this rank's positions.

    Raises:
        SequenceError: naming both lengths.
    """
    if x.dim() != 4 or x.shape[2] != expected:
        raise SequenceError(
            f"{what} has shape {tuple(x.shape)}; rank {split.rank} of "
            f"{split.mesh.size(split.axis)} on axis {split.axis!r} holds {expected} of "
            f"{split.order.length} positions, so it must be [batch, heads, {expected}, channels]"
        )
