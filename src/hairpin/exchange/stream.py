"""Taking a rank's positions out of a whole sequence, and putting the whole together again."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.eager import eager
from hairpin.comm.transport import Link
from hairpin.comm.verbs import Grad
from hairpin.errors import SequenceError
from hairpin.exchange.split import SequenceSplit


def take(x: Tensor, split: SequenceSplit, dim: int) -> Tensor:
    """This rank's positions of a tensor that every rank holds whole. Sends nothing.

    Raises:
        SequenceError: ``dim`` has another length than the sequence.
    """
    if x.shape[dim] != split.order.length:
        raise SequenceError(
            f"a tensor of shape {tuple(x.shape)} was to be split along dim {dim}, which has "
            f"{x.shape[dim]} positions where the plan's sequence has {split.order.length}; plan "
            f"again with length={x.shape[dim]}"
        )
    return x.index_select(dim, split.positions.to(x.device))


@eager
def put_together(x: Tensor, split: SequenceSplit, dim: int, *, grad: Grad) -> Tensor:
    """The whole sequence on every rank, positions ascending. Sends M (P-1)/P bytes per rank.

    Args:
        x: this rank's positions along ``dim``.
        grad: as for ``hp.gather``: whether ranks go on alike from the result, or differently.

    Raises:
        SequenceError: ``x`` does not hold this rank's positions.
    """
    if x.shape[dim] != len(split.positions):
        raise SequenceError(
            f"a tensor of shape {tuple(x.shape)} has {x.shape[dim]} positions along dim {dim}; "
            f"rank {split.rank} of axis {split.axis!r} holds {len(split.positions)} of "
            f"{split.order.length}"
        )
    if split.mesh.size(split.axis) == 1:
        return x
    result: Tensor = _PutTogether.apply(x, split, dim % x.dim(), grad)
    return result


class _PutTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: SequenceSplit, dim: int, grad: Grad) -> Tensor:
        ctx.split, ctx.dim, ctx.grad = split, dim, grad
        held = _held(split)
        link = Link(split.mesh, split.axis)
        mine = x.contiguous()
        rooms = [
            mine if rank == link.rank else _of_length(mine, dim, len(positions))
            for rank, positions in enumerate(held)
        ]
        link.exchange([mine] * link.size, rooms, what="a sequence is put together")()
        order = torch.cat(held).argsort().to(x.device)
        return torch.cat(rooms, dim).index_select(dim, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        split, dim = ctx.split, ctx.dim
        link = Link(split.mesh, split.axis)
        if ctx.grad == "replicated":
            mine = grads[0].index_select(dim, split.positions.to(grads[0].device))
            return mine * link.size, None, None, None
        sends = [
            grads[0].index_select(dim, held.to(grads[0].device)).contiguous()
            for held in _held(split)
        ]
        rooms = [torch.empty_like(sends[link.rank]) for _ in sends]
        rooms[link.rank] = sends[link.rank]
        link.exchange(sends, rooms, what="gradients of a sequence put together")()
        return torch.stack(rooms).sum(0), None, None, None


def _held(split: SequenceSplit) -> list[Tensor]:
    return [split.positions_of(rank) for rank in range(split.mesh.size(split.axis))]


def _of_length(like: Tensor, dim: int, length: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = length
    return like.new_empty(shape)
