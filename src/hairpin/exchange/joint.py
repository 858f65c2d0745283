"""Two streams that attend jointly: one split over the ranks, the other whole on every rank.

Text beside the patches of a film, or class tokens beside an image: in each attention all queries
see all keys of both (MM-DiT, Esser et al. 2024, arXiv 2403.03206). The short stream is not split.
Its queries meet each rank's keys there, and their states, not the keys, cross the ranks. Where the
split turns to the heads, each place takes the short stream's part of its heads.

Dims: b batch, h heads, g key/value heads, s positions of this rank, w of the whole stream, d, e.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.eager import eager
from hairpin.errors import SequenceError
from hairpin.exchange.api import call_of
from hairpin.exchange.block import attend, attend_backward
from hairpin.exchange.call import Call, Operands
from hairpin.exchange.heads import HeadSplit, all_heads, from_heads, to_heads
from hairpin.exchange.mask import Mask
from hairpin.exchange.places import Places
from hairpin.exchange.port import Block, Qkv, State
from hairpin.exchange.softmax import attend_blocks, gradients, merge
from hairpin.exchange.split import SequenceSplit, require_sequence


@eager
def joint_attention(
    split_qkv: Qkv, whole_qkv: Qkv, split: SequenceSplit, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both streams, every key counting.

    Args:
        split_qkv: q ``[b, h, s, d]``, k ``[b, g, s, d]``, v ``[b, g, s, e]`` at
            ``split.positions``.
        whole_qkv: q ``[b, h, w, d]``, k ``[b, g, w, d]``, v ``[b, g, w, e]``, equal on all ranks.
        split: with any schedule but ``"rsa"``.
        scale: ``d ** -0.5`` if left out.

    Returns:
        ``[b, h, s, e]`` of this rank's positions and ``[b, h, w, e]``, equal on all ranks. The
        gradients of the whole stream are this rank's term, as docs/gradients.md has it.

    Raises:
        SequenceError: shapes that do not fit, or schedule ``"rsa"``.
    """
    if split.schedule == "rsa":
        raise SequenceError(
            "joint attention merges states, which schedule 'rsa' does not have; plan with "
            "method='ring', 'ulysses', 'usp' or their relatives"
        )
    for name, x in zip("qkv", split_qkv, strict=True):
        require_sequence(x, len(split.positions), what=name, split=split)
    for name, one, other in zip("qkv", split_qkv, whole_qkv, strict=True):
        if other.dim() != 4 or one.shape[:2] + one.shape[3:] != other.shape[:2] + other.shape[3:]:
            raise SequenceError(
                f"{name} is {tuple(one.shape)} of the split stream and {tuple(other.shape)} of the "
                "whole one; they share all but the positions"
            )
    call = call_of(split, split, Mask(), split_qkv[0])
    if scale is not None:
        call = replace(call, scale=scale)
    if split.heads == 1:
        mine, whole = _Joint.apply(*split_qkv, *whole_qkv, call)
        return mine, whole
    heads = _head_split(split_qkv, split)
    place = heads.places.rank
    call = replace(call, heads=tuple(heads.heads_of(place)), key_heads=heads.pairing())
    theirs = [x[:, slice_of(heads, place)] for x, slice_of in zip(whole_qkv, _SLICES, strict=True)]
    mine, whole = _Joint.apply(*to_heads(split_qkv, heads), *theirs, call)
    return from_heads(mine, heads), all_heads(whole, heads)


def _head_split(qkv: Qkv, split: SequenceSplit) -> HeadSplit:
    places = split.heads_places()
    rows = tuple(len(split.positions_of(member)) for member in places.members)
    return HeadSplit(places, qkv[0].shape[1], qkv[1].shape[1], rows, rows)


def _of_queries(heads: HeadSplit, place: int) -> slice:
    mine = heads.heads_of(place)
    return slice(mine.start, mine.stop)


def _of_keys(heads: HeadSplit, place: int) -> slice:
    theirs = heads.key_heads_of(place)
    return slice(theirs.start, theirs.stop)


_SLICES = (_of_queries, _of_keys, _of_keys)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, call = args
        q, k, v, whole_q, whole_k, whole_v = (x.contiguous() for x in tensors)
        block = Block(call.scale, heads=call.key_heads)
        (out, lse), _ = attend_blocks(Operands(q, k, v), call)
        whole_out, whole_lse = _across_ranks(_attended((whole_q, k, v), block), call)
        if whole_q.shape[2]:
            merge(out, lse, *_attended((q, whole_k, whole_v), block))
            merge(whole_out, whole_lse, *_attended((whole_q, whole_k, whole_v), block))
        ctx.call = call
        saved = (out, lse, whole_out, whole_lse)
        ctx.save_for_backward(q, k, v, whole_q, whole_k, whole_v, *saved)
        return out.to(q.dtype), whole_out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, whole_q, whole_k, whole_v, out, lse, whole_out, whole_lse = ctx.saved_tensors
        call = ctx.call
        block = Block(call.scale, heads=call.key_heads)
        grad, whole_grad = cotangents
        state, whole_state = (out, lse), (whole_out, whole_lse)
        of_q, of_k, of_v, _ = gradients(Operands(q, k, v), call, grad, state)
        wholes = (whole_q, whole_k, whole_v)
        totals = [x.to(out.dtype) for x in (of_q, of_k, of_v)]
        totals += [torch.zeros_like(x, dtype=out.dtype) for x in wholes]
        if whole_q.shape[2]:
            everyone = _summed(whole_grad.to(out.dtype), call)
            parts = (
                ((0, 4, 5), grad, (q, whole_k, whole_v), state),
                ((3, 1, 2), everyone, (whole_q, k, v), whole_state),
                ((3, 4, 5), whole_grad, (whole_q, whole_k, whole_v), whole_state),
            )
            for places, cotangent, qkv, states in parts:
                if not all(x.shape[1] and x.shape[2] for x in qkv):
                    continue
                terms = attend_backward(cotangent, qkv, states, block)[:3]
                for place, term in zip(places, terms, strict=True):
                    totals[place] += term
        given = (q, k, v, whole_q, whole_k, whole_v)
        return *(x.to(like.dtype) for x, like in zip(totals, given, strict=True)), None


def _attended(qkv: Qkv, block: Block) -> State:
    """A state; of no queries, keys or heads an empty one."""
    q, k, v = qkv
    if q.shape[1] and q.shape[2] and k.shape[2]:
        return attend(qkv, block)
    out = torch.zeros_like(q[..., :1], dtype=torch.promote_types(q.dtype, torch.float32))
    return out.expand(*q.shape[:3], v.shape[3]).clone(), out[..., 0] - torch.inf


def _across_ranks(state: State, call: Call) -> State:
    """The states of all ranks merged, in rank order, so that all have the same bits."""
    places = _places(call)
    if places is None:
        return state
    packed = torch.cat([x.reshape(-1) for x in state])
    rooms = [torch.empty_like(packed) for _ in range(places.size)]
    rooms[places.rank] = packed
    places.exchange([packed] * places.size, rooms, what="states of the whole stream")()
    shapes = [x.shape for x in state]
    parts = [room.split([shape.numel() for shape in shapes]) for room in rooms]
    states = [[x.view(s) for x, s in zip(p, shapes, strict=True)] for p in parts]
    out, lse = (x.clone() for x in states[0])
    for other in states[1:]:
        merge(out, lse, *other)
    return out, lse


def _summed(x: Tensor, call: Call) -> Tensor:
    places = _places(call)
    if places is None:
        return x
    total = x.contiguous().clone()
    if places.size == places.link.size:
        places.link.sum(total, what="gradient of the whole stream")()
        return total
    terms = [torch.empty_like(total) for _ in range(places.size)]
    terms[places.rank] = total
    places.exchange([total] * places.size, terms, what="gradient of the whole stream")()
    return torch.stack(terms).sum(0)


def _places(call: Call) -> Places | None:
    """The ranks that keys cross; None where there is one."""
    if not call.levels:
        return None
    return Places(call.levels[0].places.link, tuple(call.keys))
