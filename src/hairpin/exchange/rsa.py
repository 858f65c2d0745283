"""Ring Self-Attention as published (Li et al. 2021, arXiv 2105.13120), for comparison.

Two rings: keys pass by until a rank holds whole rows of scores, then values pass by. So scores take
memory in proportion to the sequence, and gradients need four rings. The gradients here are the true
ones (those of the published code are 1/P of them).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.errors import SequenceError
from hairpin.exchange.block import hidden
from hairpin.exchange.call import Call, Operands
from hairpin.exchange.places import Places
from hairpin.exchange.port import wide


def ring_self_attention(operands: Operands, call: Call) -> Tensor:
    """Attention of this rank's queries to all keys, ``[b, h, q, e]``, scores held whole.

    Raises:
        SequenceError: a bias, which the published algorithm does not have, or dropout.
    """
    if operands.bias is not None or call.dropout:
        raise SequenceError("schedule 'rsa' takes no bias and no dropout; use schedule='ring'")
    q, k, v = operands.q, operands.k, operands.v
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    result: Tensor = _Rsa.apply(q, k, v, operands.key_mask, call)
    return result


class _Rsa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, k, v, key_mask, call = args
        state = wide(q.dtype)
        q_, k_, v_ = (x.to(state) for x in (q, k, v))
        scores = q_.new_full((*q.shape[:3], call.key_length), -torch.inf)
        for owner, keys in _passing(k_, call):
            scores[..., call.keys[owner]] = q_ @ keys.transpose(-1, -2) * call.scale
        scores += hidden(~_seen(call, key_mask, q), state)
        weights = torch.nan_to_num(scores.softmax(-1), nan=0.0)  # rows that see no key
        out: Tensor = q_.new_zeros(*q.shape[:3], v.shape[3])
        for owner, values in _passing(v_, call):
            out += weights[..., call.keys[owner]] @ values
        ctx.call = call
        ctx.save_for_backward(q, k, v, weights)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        call = ctx.call
        grad = grads[0].to(weights.dtype)
        q_, k_, v_ = (x.to(weights.dtype) for x in (q, k, v))
        of_weights = torch.zeros_like(weights)
        for owner, values in _passing(v_, call):
            of_weights[..., call.keys[owner]] = grad @ values.transpose(-1, -2)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores *= call.scale
        grad_q = torch.zeros_like(q_)
        for owner, keys in _passing(k_, call):
            grad_q += of_scores[..., call.keys[owner]] @ keys
        whole_k = of_scores.transpose(-1, -2) @ q_
        whole_v = weights.transpose(-1, -2) @ grad
        grad_k, grad_v = (_summed(x, call) for x in (whole_k, whole_v))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _seen(call: Call, key_mask: Tensor | None, q: Tensor) -> Tensor:
    seen = call.mask.sees(call.queries, call.key_length).to(q.device)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def _passing(x: Tensor, call: Call) -> Any:
    """(owner, block) round the ring; as published, each hop is awaited before its block is used."""
    yield call.own, x
    if not call.levels:
        return
    places = call.levels[0].places
    block = x.contiguous()
    for step in range(1, places.size):
        owner = places.members[(places.rank - step) % places.size]
        room = block.new_empty(*x.shape[:2], len(call.keys[owner]), x.shape[3])
        places.shift(block, room, what="ring step")()
        block = room
        yield owner, block


def _summed(whole: Tensor, call: Call) -> Tensor:
    """This rank's part of the sum over ranks: the published full all-reduce, then a slice."""
    if call.levels:
        places: Places = call.levels[0].places
        whole = whole.contiguous()
        places.link.sum(whole, what="gradients of all keys")()
    return whole[:, :, call.keys[call.own]]
