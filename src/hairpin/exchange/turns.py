"""Turns: keys and values cross the ranks in several rounds, so that what passes by takes less room.

A turn is a whole round of some key/value heads with their query heads, or, with more turns than
heads, of one head and a part of every place's keys. Each rank then holds what passes by in buffers
that are so much smaller. As many bytes are sent, in more messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hairpin.exchange.call import Call, Operands, Part
from hairpin.layout import shard_offset, shard_size, shard_sizes


@dataclass(frozen=True)
class Turn:
    """One round.

    Attributes:
        heads, groups: query heads and key/value heads of this rank that take part.
        strips: (in the turn, in all keys of this rank): which keys take part.
        operands: those heads' tensors, views; their k and v hold all keys of this rank.
        call: what is known of them.
    """

    heads: slice
    groups: slice
    strips: tuple[tuple[slice, slice], ...]
    operands: Operands
    call: Call


def cut_in_turns(operands: Operands, call: Call) -> list[Turn]:
    """The turns of an attention, one head's after another's; one where nothing passes by."""
    by_heads, by_keys = ways(call.turns if call.levels else 1, operands.k.shape[1])
    parts = _parts(call, by_keys)
    return [
        Turn(heads, groups, part.strips, some, replace(of_heads, keys=part.keys, known=part.known))
        for heads, groups in _groups(operands, call, by_heads)
        for some, of_heads in [_some_heads(operands, call, heads, groups)]
        for part in parts
    ]


def ways(turns: int, groups: int) -> tuple[int, int]:
    """How many turns cut the key/value heads, and how many their keys: ``turns`` or some more."""
    by_heads = max(1, min(turns, groups))
    return by_heads, -(-turns // by_heads)


def _groups(operands: Operands, call: Call, count: int) -> Iterator[tuple[slice, slice]]:
    """(query heads, key/value heads) of each of ``count`` groups."""
    sizes = shard_sizes(operands.k.shape[1], count)
    pairs = torch.tensor(_pairs(operands, call), dtype=torch.long)
    for first, stop in pairwise([0, *accumulate(sizes)]):
        heads = [int(torch.searchsorted(pairs, bound)) for bound in (first, stop)]
        yield slice(*heads), slice(first, stop)


def _pairs(operands: Operands, call: Call) -> tuple[int, ...]:
    """Key/value head of each query head, ascending."""
    heads, groups = operands.q.shape[1], operands.k.shape[1]
    if call.key_heads is not None:
        return call.key_heads
    return tuple(i // (heads // groups) for i in range(heads)) if groups else ()


def _some_heads(
    operands: Operands, call: Call, heads: slice, groups: slice
) -> tuple[Operands, Call]:
    q, k, v = operands.q[:, heads], operands.k[:, groups], operands.v[:, groups]
    bias = operands.bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    pairs = tuple(pair - groups.start for pair in _pairs(operands, call)[heads])
    share = q.shape[1] // max(1, k.shape[1])
    usual = pairs == tuple(i // max(1, share) for i in range(len(pairs)))
    some = replace(call, heads=call.heads[heads], key_heads=None if usual else pairs)
    return Operands(q, k, v, bias, operands.key_mask), some


def _parts(call: Call, count: int) -> list[Part]:
    """All places' keys in ``count`` parts; each takes some of every run, so work stays balanced."""
    if count == 1:
        own = slice(0, len(call.keys[call.own]))
        return [Part(call.keys, ((own, own),), call.known)]
    if count not in call.parts:
        with torch.inference_mode(False):  # they are kept, and training uses them too
            call.parts[count] = [_part(call, count, i) for i in range(count)]
    return call.parts[count]


def _part(call: Call, count: int, index: int) -> Part:
    held = {owner: _slices(len(keys), call.runs, count, index) for owner, keys in call.keys.items()}
    own = held[call.own]
    bounds = pairwise([0, *accumulate(x.stop - x.start for x in own)])
    strips = tuple((slice(*at), of_own) for at, of_own in zip(bounds, own, strict=True))
    keys = {owner: _taken(call.keys[owner], slices) for owner, slices in held.items()}
    return Part(keys, strips)


def _slices(length: int, runs: int, count: int, index: int) -> list[slice]:
    """Part ``index`` of ``count`` of each of some runs that make up a length."""
    found = []
    for run in range(runs):
        size = shard_size(length, runs, run)
        start = shard_offset(length, runs, run) + shard_offset(size, count, index)
        found.append(slice(start, start + shard_size(size, count, index)))
    return found


def _taken(x: Tensor, slices: list[slice]) -> Tensor:
    return torch.cat([x[of_run] for of_run in slices])
