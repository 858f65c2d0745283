"""Turning the split of q, k and v from the sequence to the heads, and back: DeepSpeed-Ulysses.

q, k and v travel in one all-to-all. Heads need not divide the places: query heads are balanced, and
a place gets just the key/value heads that its query heads use. So with fewer key/value heads than
places some travel to several, and their gradients come back as a sum.

Dims: b batch, h heads, g key/value heads, s positions, d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.exchange.places import Places
from hairpin.layout import shard_offset, shard_size


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each place computes, and how many positions each brings.

    Attributes:
        places: that turn the split among themselves.
        heads, key_heads: in all, h and g.
        queries, keys: positions of each place before the turn.
    """

    places: Places
    heads: int
    key_heads: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def heads_of(self, place: int) -> range:
        """Query heads of a place."""
        start = shard_offset(self.heads, self.places.size, place)
        return range(start, start + shard_size(self.heads, self.places.size, place))

    def key_heads_of(self, place: int) -> range:
        """Key/value heads that the query heads of a place use."""
        mine, share = self.heads_of(place), self.heads // self.key_heads
        return range(mine.start // share, -(-mine.stop // share)) if len(mine) else range(0)

    def pairing(self) -> tuple[int, ...] | None:
        """Local key/value head of each local query head; None where kernels pair them so anyway."""
        mine, theirs = self.heads_of(self.places.rank), self.key_heads_of(self.places.rank)
        share = self.heads // self.key_heads
        pairs = tuple(head // share - theirs.start for head in mine)
        even = len(theirs) and len(mine) % len(theirs) == 0
        usual = even and pairs == tuple(i // (len(mine) // len(theirs)) for i in range(len(mine)))
        return None if usual or not mine else pairs


Qkv = tuple[Tensor, Tensor, Tensor]


def to_heads(qkv: Qkv, split: HeadSplit) -> Qkv:
    """All positions of some heads, from some positions of all heads."""
    q, k, v = _ToHeads.apply(*qkv, split)
    return q, k, v


def from_heads(x: Tensor, split: HeadSplit) -> Tensor:
    """Some positions of all heads, from all positions of some heads: ``[b, h, s, e]``."""
    result: Tensor = _FromHeads.apply(x, split)
    return result


def all_heads(x: Tensor, split: HeadSplit) -> Tensor:
    """All heads of what every place has some heads of: ``[b, h, w, e]``, the same on all places.

    Its gradient is a place's term of a sum: terms of one head are added up at its place.
    """
    result: Tensor = _AllHeads.apply(x, split)
    return result


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: HeadSplit) -> Qkv:
        ctx.split = split
        return _turn((q, k, v), split)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_turn_back(grads, ctx.split), None


class _FromHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: HeadSplit) -> Tensor:
        ctx.split = split
        nothing = x.new_empty(x.shape[0], 0, x.shape[2], 0)
        return _turn_back((x, nothing, nothing), split, keys=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        nothing = grads[0].new_empty(grads[0].shape[0], ctx.split.key_heads, 0, 0)
        return _turn((grads[0], nothing, nothing), ctx.split, keys=False)[0], None


class _AllHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: HeadSplit) -> Tensor:
        ctx.split = split
        mine = x.contiguous()
        shapes = [
            [(x.shape[0], len(split.heads_of(place)), *x.shape[2:])]
            for place in range(split.places.size)
        ]
        parts = _swap(split.places, [mine.view(-1)] * len(shapes), shapes, what="all heads")
        return torch.cat([part for (part,) in parts], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        split, grad = ctx.split, grads[0]
        held = [split.heads_of(place) for place in range(split.places.size)]
        sends = [grad[:, heads.start : heads.stop] for heads in held]
        mine = sends[split.places.rank]
        shapes = [[tuple(mine.shape)]] * len(sends)
        parts = _swap(split.places, [_packed([x]) for x in sends], shapes, what="all heads' terms")
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return torch.stack([part for (part,) in parts]).sum(0, dtype=dtype).to(grad.dtype), None


def _turn(qkv: Qkv, split: HeadSplit, *, keys: bool = True) -> Qkv:
    """Sequence to heads; without ``keys`` for queries alone."""
    q, k, v = qkv
    places, me = split.places, split.places.rank
    sends = [
        _packed([_heads(x, split, place, which) for which, x in enumerate((q, k, v))])
        for place in range(places.size)
    ]
    counts = [len(split.heads_of(me)), *[len(split.key_heads_of(me)) if keys else 0] * 2]
    lengths = [split.queries, split.keys, split.keys]
    shapes = [
        [
            (x.shape[0], count, rows[place], x.shape[3])
            for x, count, rows in zip((q, k, v), counts, lengths, strict=True)
        ]
        for place in range(places.size)
    ]
    parts = _swap(places, sends, shapes, what=f"sequence to heads {split.heads}/{split.key_heads}")
    whole = [torch.cat([part[which] for part in parts], 2) for which in range(3)]
    return whole[0], whole[1], whole[2]


def _turn_back(qkv: Qkv, split: HeadSplit, *, keys: bool = True) -> Qkv:
    """Heads to sequence; contributions to one key/value head from several places are added up."""
    q, k, v = qkv
    places, me = split.places, split.places.rank
    rows = [list(x.split(list(n), 2)) for x, n in ((q, split.queries),)]
    rows += [list(x.split(list(split.keys), 2)) if keys else [x] * places.size for x in (k, v)]
    sends = [_packed([part[place] for part in rows]) for place in range(places.size)]
    lengths = (split.queries[me], *[split.keys[me] if keys else 0] * 2)
    counts = [
        (len(split.heads_of(p)), *[len(split.key_heads_of(p)) if keys else 0] * 2)
        for p in range(places.size)
    ]
    shapes = [
        [
            (x.shape[0], count, length, x.shape[3])
            for x, count, length in zip((q, k, v), counts[place], lengths, strict=True)
        ]
        for place in range(places.size)
    ]
    parts = _swap(places, sends, shapes, what=f"heads to sequence {split.heads}/{split.key_heads}")
    whole_q = torch.cat([part[0] for part in parts], 1)
    if not keys:
        return whole_q, k, v
    whole_k, whole_v = (_added([part[which] for part in parts], split) for which in (1, 2))
    return whole_q, whole_k, whole_v


def _heads(x: Tensor, split: HeadSplit, place: int, which: int) -> Tensor:
    """The heads of q (0), k (1) or v (2) that a place needs."""
    heads = split.key_heads_of(place) if which else split.heads_of(place)
    return x[:, heads.start : heads.stop] if x.shape[2] and len(heads) else x[:, :0]


def _added(parts: Sequence[Tensor], split: HeadSplit) -> Tensor:
    first = parts[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = first.new_zeros(first.shape[0], split.key_heads, *first.shape[2:], dtype=dtype)
    for place, part in enumerate(parts):
        heads = split.key_heads_of(place)
        total[:, heads.start : heads.stop] += part
    return total.to(first.dtype)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _swap(
    places: Places,
    sends: Sequence[Tensor],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    *,
    what: str,
) -> list[list[Tensor]]:
    """One all-to-all of packed tensors; gives what each place sent, taken apart."""
    sizes = [[torch.Size(shape).numel() for shape in of_place] for of_place in shapes]
    rooms = [sends[0].new_empty(sum(of_place)) for of_place in sizes]
    rooms[places.rank] = sends[places.rank]
    places.exchange(sends, rooms, what=what)()
    return [
        [x.view(shape) for x, shape in zip(room.split(size), of_place, strict=True)]
        for room, size, of_place in zip(rooms, sizes, shapes, strict=True)
    ]
