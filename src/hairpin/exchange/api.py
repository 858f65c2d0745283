"""``hp.attention``: softmax attention along a sequence that is split over ranks."""

from dataclasses import replace

import torch
from torch import Tensor

from hairpin.comm.eager import eager
from hairpin.errors import SequenceError
from hairpin.exchange.call import Call, Operands
from hairpin.exchange.heads import HeadSplit, from_heads, to_heads
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.rsa import ring_self_attention
from hairpin.exchange.softmax import attend_across
from hairpin.exchange.split import SequenceSplit, require_sequence
from hairpin.exchange.whole import whole_columns, whole_rows

_KNOWN_CALLS = 16  # that a split keeps: masks of that many kinds of layers


@eager
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: SequenceSplit,
    *,
    mask: Mask | None = None,
    keys: Order | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``softmax(q k^T scale + bias) v`` of this rank's queries over the keys of all ranks.

    Differentiable once in q, k, v and bias. On one rank it is the same computation in one block.

    Args:
        q: queries ``[b, h, q, d]``, at ``split.positions``.
        k: keys ``[b, g, k, d]`` and ``v``: values ``[b, g, k, e]``; h is a multiple of g.
        mask: which keys count, by position; all if left out.
        keys: how the keys are dealt to ring places where they are another sequence than the
            queries (cross-attention).
        bias: added to the scores of this rank's queries with *all* keys by position:
            ``[b or 1, h or 1, q, all keys]``.
        key_mask: True where a key of this rank counts, ``[b, k]``.
        scale: ``d ** -0.5`` if left out.
        dropout: probability that a weight is dropped, by global position: the same weights on any
            number of ranks.
        seed: of the dropout; the same on every rank, another in every call.

    Returns:
        ``[b, h, q, e]``; 0 for a query that sees no key.

    Raises:
        SequenceError: shapes, mask or bias that do not fit the split.
        CommError: a rank is gone, did not answer, or was given other shapes.
    """
    keys_split = split if keys is None else replace(split, order=keys)
    mask = Mask() if mask is None else mask
    operands = Operands(q, k, v, bias, key_mask)
    _check(operands, split, keys_split, mask)
    if not 0.0 <= dropout < 1.0:
        raise SequenceError(f"dropout={dropout}; a probability is at least 0 and below 1")
    if key_mask is not None:
        operands = replace(operands, key_mask=whole_columns(key_mask, keys_split))
    call = call_of(split, keys_split, mask, q)
    call = replace(call, dropout=dropout, seed=seed)
    if scale is not None:
        call = replace(call, scale=scale)
    if split.schedule == "rsa":
        return ring_self_attention(operands, call)
    if split.heads == 1:
        return attend_across(operands, call)
    heads = _head_split(operands, split, keys_split)
    mine = tuple(heads.heads_of(heads.places.rank))
    call = replace(call, heads=mine, key_heads=heads.pairing())
    return from_heads(attend_across(_turned(operands, heads), call), heads)


def call_of(split: SequenceSplit, keys_split: SequenceSplit, mask: Mask, q: Tensor) -> Call:
    """What is known beside the tensors, all heads on every rank."""
    known = split.calls.get((keys_split.order, mask))
    if known is None:
        if len(split.calls) >= _KNOWN_CALLS:
            split.calls.clear()
        with torch.inference_mode(False):  # it is kept, and training uses it too
            known = split.calls[keys_split.order, mask] = _first_call(split, keys_split, mask)
    sizes = (q.shape[1], split.order.length, keys_split.order.length)
    scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    return replace(known, scale=scale, heads=tuple(range(q.shape[1])), sizes=sizes)


def _first_call(split: SequenceSplit, keys_split: SequenceSplit, mask: Mask) -> Call:
    ring, heads = split.place(split.rank)
    return Call(
        levels=split.levels(),
        queries=split.order.positions(split.ring, ring),
        keys={
            split.at(place, heads): keys_split.order.positions(split.ring, place)
            for place in range(split.ring)
        },
        own=split.rank,
        key_length=keys_split.order.length,
        mask=mask,
        scale=1.0,
        heads=(),
        sizes=(0, 0, 0),
        turns=split.turns,
        runs=2 if keys_split.order.kind == "zigzag" else 1,
    )


def _head_split(operands: Operands, split: SequenceSplit, keys_split: SequenceSplit) -> HeadSplit:
    places = split.heads_places()
    queries, keys = (
        tuple(len(which.positions_of(member)) for member in places.members)
        for which in (split, keys_split)
    )
    return HeadSplit(places, operands.q.shape[1], operands.k.shape[1], queries, keys)


def _turned(operands: Operands, heads: HeadSplit) -> Operands:
    """Operands with all positions of the heads places and some heads."""
    q, k, v = to_heads((operands.q, operands.k, operands.v), heads)
    bias = operands.bias
    bias = None if bias is None else whole_rows(bias, heads)
    return Operands(q, k, v, bias, operands.key_mask)


def _check(operands: Operands, split: SequenceSplit, keys_split: SequenceSplit, mask: Mask) -> None:
    """Everything that can be wrong, before anything is sent: alike on every rank."""
    q, k, v = operands.q, operands.k, operands.v
    require_sequence(q, len(split.positions), what="q", split=split)
    for name, x in (("k", k), ("v", v)):
        require_sequence(x, len(keys_split.positions), what=name, split=keys_split)
    _check_heads(q, k, v)
    mask.require_length(split.order.length, keys_split.order.length)
    if operands.bias is not None:
        _check_bias(operands.bias, q, (len(split.positions), keys_split.order.length))
    seen = operands.key_mask
    if seen is not None and (seen.shape != (k.shape[0], k.shape[2]) or seen.dtype != torch.bool):
        raise SequenceError(
            f"key_mask has shape {tuple(seen.shape)} and dtype {seen.dtype}; it is True where a "
            f"key of this rank counts: bool [{k.shape[0]}, {k.shape[2]}]"
        )


def _check_bias(bias: Tensor, q: Tensor, wanted: tuple[int, int]) -> None:
    fits = bias.dim() == 4 and tuple(bias.shape[2:]) == wanted
    if not fits or bias.shape[0] not in (1, q.shape[0]) or bias.shape[1] not in (1, q.shape[1]):
        raise SequenceError(
            f"bias has shape {tuple(bias.shape)}; it holds this rank's queries and all keys by "
            f"position: [{q.shape[0]} or 1, {q.shape[1]} or 1, {wanted[0]}, {wanted[1]}]"
        )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise SequenceError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: q and k share batch and "
            "channels, k and v all but the channels"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise SequenceError(
            f"{q.shape[1]} query heads over {k.shape[1]} key/value heads; the first must be a "
            "multiple of the second"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.dtype.is_floating_point:
        raise SequenceError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give all in one floating-point dtype"
        )
