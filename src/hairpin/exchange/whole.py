"""Small things beside q, k and v that have to be known for more positions than a rank holds."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.transport import Link
from hairpin.exchange.heads import HeadSplit
from hairpin.exchange.places import Places
from hairpin.exchange.split import SequenceSplit


def whole_columns(mask: Tensor, split: SequenceSplit) -> Tensor:
    """A mask of this rank's keys ``[b, k]`` as one of all keys by position. One byte a key."""
    ranks = split.mesh.size(split.axis)
    positions = [split.positions_of(rank) for rank in range(ranks)]
    whole = mask.new_empty(mask.shape[0], split.order.length)
    rooms = [mask.new_empty(mask.shape[0], len(held)) for held in positions]
    rooms[split.rank] = mask.contiguous()
    if ranks > 1:
        Link(split.mesh, split.axis).exchange(
            [rooms[split.rank]] * ranks, rooms, what="which keys count"
        )()
    for held, part in zip(positions, rooms, strict=True):
        whole[:, held.to(mask.device)] = part
    return whole


def whole_rows(bias: Tensor, heads: HeadSplit) -> Tensor:
    """The bias of the queries and heads that this rank computes after the turn to heads.

    Args:
        bias: ``[., h or 1, q, all keys]`` of this rank's queries.

    Returns:
        ``[., local h or 1, queries of the heads places, all keys]``.
    """
    result: Tensor = _Rows.apply(bias, heads)
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, heads: HeadSplit) -> Tensor:
        ctx.heads, ctx.shape = heads, bias.shape
        places = heads.places
        sends = [_of_heads(bias, heads, place).contiguous() for place in range(places.size)]
        mine = sends[places.rank]
        rooms = [mine.new_empty(*mine.shape[:2], rows, mine.shape[3]) for rows in heads.queries]
        return torch.cat(_swapped(places, sends, rooms, what="bias to heads"), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        heads: HeadSplit = ctx.heads
        places = heads.places
        sends = [part.contiguous() for part in grads[0].split(list(heads.queries), 2)]
        total = grads[0].new_zeros(ctx.shape)
        parts = [_of_heads(total, heads, place) for place in range(places.size)]
        rooms = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        arrived = _swapped(places, sends, rooms, what="gradient of bias")
        for part, room in zip(parts, arrived, strict=True):
            part.add_(room)
        return total, None


def _of_heads(bias: Tensor, heads: HeadSplit, place: int) -> Tensor:
    """The heads of a place; all of a bias that heads share."""
    mine = heads.heads_of(place)
    return bias if bias.shape[1] == 1 else bias[:, mine.start : mine.stop]


def _swapped(
    places: Places, sends: list[Tensor], rooms: list[Tensor], *, what: str
) -> list[Tensor]:
    rooms[places.rank] = sends[places.rank]
    places.exchange(sends, rooms, what=what)()
    return rooms
