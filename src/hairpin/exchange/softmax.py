"""Softmax attention whose keys and values cross the ranks: every schedule, forward and backward.

Queries stay. A schedule is a list of levels, outermost first; each level is a *ring*, in which the
blocks of its places pass by one after another, each sent on while it is used, or a *gather*, in
which all places' blocks are fetched at once behind the use of the own one::

    ring          [ring of all]                     Liu et al. 2023, Ring Attention
    double ring   [ring across, ring inside]        outer hops hide behind a whole inner round
    all-gather    [gather of all]                   Wang et al. 2023, LSS: one gather forward, one
                                                    reduce-scatter backward
    hierarchical  [ring across, gather inside]

Blocks merge by their log-sum-exp. In the backward, gradients of a block travel one step behind it
and end at its owner: as many steps as in the forward, in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.transport import Wait
from hairpin.exchange.block import attend, attend_backward, hidden, masked, window_of
from hairpin.exchange.dropout import Scores, kept
from hairpin.exchange.mask import Mask
from hairpin.exchange.places import Places
from hairpin.exchange.port import Block, State, wide
from hairpin.exchange.tiles import Tile, cut


@dataclass(frozen=True)
class Level:
    """One level of a schedule: how blocks cross some places."""

    kind: Literal["ring", "gather"]
    places: Places


@dataclass(frozen=True)
class Call:
    """What one attention needs to know beside its tensors.

    Attributes:
        levels: of the schedule, outermost first; none where one rank holds all keys.
        queries: positions of this rank's queries, ascending.
        keys: of each member of the axis, positions of its keys, ascending.
        own: index of this rank in ``keys``.
        key_length: keys in the whole sequence.
        mask: which keys count.
        scale: what scores are multiplied by.
        heads: global indices of this rank's query heads.
        sizes: query heads, queries and keys in all.
        key_heads: local key/value head of each query head, where not ``i // (h / g)``.
        dropout, seed: of the weights.
        known: tiles that have been cut already, by owner.
    """

    levels: tuple[Level, ...]
    queries: Tensor
    keys: dict[int, Tensor]
    own: int
    key_length: int
    mask: Mask
    scale: float
    heads: tuple[int, ...]
    sizes: tuple[int, int, int]
    key_heads: tuple[int, ...] | None = None
    dropout: float = 0.0
    seed: int = 0
    known: dict[int, list[Tile]] = field(default_factory=dict)

    def tiles(self, owner: int) -> list[Tile]:
        """Tiles of this rank's queries with ``owner``'s keys."""
        if not self.heads:  # fewer heads than places: this one has none
            return []
        if owner not in self.known:
            self.known[owner] = cut(self.queries, self.keys[owner], self.mask, self.key_length)
        return self.known[owner]


@dataclass(frozen=True)
class Operands:
    """The tensors of one attention, as this rank holds them.

    Attributes:
        q: ``[b, h, q, d]``; k: ``[b, g, k, d]``; v: ``[b, g, k, e]``.
        bias: added to the scores, ``[b or 1, h or 1, q, all keys]``, keys by position.
        key_mask: True where a key counts, ``[b, all keys]`` by position.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    key_mask: Tensor | None = None

    def block(self, tile: Tile, owner: int, call: Call, *, learns: bool = False) -> Block:
        """What one tile has beside its queries, keys and values."""
        keys, state = call.keys[owner][tile.keys], wide(self.q.dtype)
        added = masked(tile, state, self.q.device)
        if self.bias is not None:
            added = _plus(added, _columns(self.bias[..., tile.rows, :], keys).to(state))
        if self.key_mask is not None:
            seen = _columns(self.key_mask, keys)
            if not (seen.device.type == "cpu" and bool(seen.all())):
                added = _plus(added, hidden(~seen, state)[:, None, None, :])
        causal = tile.kind == "causal"
        if causal and added is not None:  # kernels take the one or the other
            rows = torch.ones(len(keys), len(keys), dtype=torch.bool, device=self.q.device)
            added, causal = _plus(added, hidden(rows.triu(1), state)), False
        keep = self._keep(call, call.queries[tile.rows], keys) if call.dropout else None
        window = window_of(tile) if self.bias is None and self.key_mask is None else None
        return Block(call.scale, causal, added, learns, call.key_heads, call.dropout, keep, window)

    def _keep(self, call: Call, queries: Tensor, keys: Tensor) -> Callable[[slice], Tensor]:
        heads, batch = torch.tensor(call.heads), self.q.shape[0]

        def keep(rows: slice) -> Tensor:
            places = Scores(batch, heads, queries[rows], keys, call.sizes)
            return kept(call.dropout, call.seed, places).to(self.q.device, wide(self.q.dtype))

        return keep


def attend_across(operands: Operands, call: Call) -> Tensor:
    """Attention of this rank's queries to all ranks' keys: ``[b, h, q, e]``."""
    o = operands
    result: Tensor = _Across.apply(o.q, o.k, o.v, o.bias, o.key_mask, call)
    return result


def attend_blocks(operands: Operands, call: Call) -> tuple[State, list[Tensor]]:
    """Output and log-sum-exp over all ranks' keys, and the blocks that one gather has fetched."""
    q, k, v = operands.q, operands.k, operands.v
    shapes = _Shapes.of(k, v, call)
    out: Tensor = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide(q.dtype))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))
    fetched: list[Tensor] = []
    met = np.zeros(q.shape[2], dtype=bool)  # rows that have seen keys
    for owner, packed in _blocks(call.levels, call.own, shapes.packed(k, v), shapes):
        if [level.kind for level in call.levels] == ["gather"] and owner != call.own:
            fetched.append(packed)  # one gather serves the backward too
        keys, values = shapes.unpacked(packed, owner)
        for tile in call.tiles(owner):
            rows = tile.rows
            qkv = (q[:, :, rows], keys[:, :, tile.keys], values[:, :, tile.keys])
            state = attend(qkv, operands.block(tile, owner, call))
            if met[rows].any():
                merge(out[:, :, rows], lse[:, :, rows], *state)
            else:
                out[:, :, rows], lse[:, :, rows] = state
            met[rows] = True
    return (out, lse), fetched


def gradients(
    operands: Operands,
    call: Call,
    grad: Tensor,
    state: State,
    *,
    learns: bool = False,
    fetched: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of this rank's q, k, v and bias, in the dtype of a state.

    Args:
        grad: of the output of this rank's queries.
        state: their output and log-sum-exp over all keys.
        learns: whether the bias wants a gradient.
        fetched: blocks that the forward has gathered.
    """
    k, v = operands.k, operands.v
    shapes = _Shapes.of(k, v, call)
    grads = _Gradients(operands, call, shapes, learns=learns)
    grads.of_output(grad, state)
    walk = _Walk(shapes, grads.of_block, tuple(fetched))
    packed = walk.gradient(call.levels, call.own, shapes.packed(k, v))
    return grads.q, *shapes.unpacked(packed, call.own), grads.bias


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        q, k, v = (x.contiguous() for x in tensors[:3])
        (out, lse), fetched = attend_blocks(Operands(q, k, v, *tensors[3:]), call)
        ctx.call = call
        ctx.save_for_backward(q, k, v, *tensors[3:], out, lse, *fetched)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, key_mask, out, lse, *fetched = ctx.saved_tensors
        operands = Operands(q, k, v, bias, key_mask)
        learns = bias is not None and ctx.needs_input_grad[3]
        options = {"learns": learns, "fetched": fetched}
        of_q, of_k, of_v, of_bias = gradients(operands, ctx.call, grad, (out, lse), **options)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_bias, None, None


class _Gradients:
    """Adds up the gradients of q and bias, and gives those of one block of keys after another."""

    def __init__(self, operands: Operands, call: Call, shapes: "_Shapes", *, learns: bool) -> None:
        self.operands, self.call, self.shapes, self.learns = operands, call, shapes, learns
        q, bias = operands.q, operands.bias
        self.q = q.new_zeros(q.shape, dtype=wide(q.dtype))
        self.bias: Tensor | None = None
        if learns:
            assert bias is not None
            self.bias = bias.new_zeros(bias.shape, dtype=wide(bias.dtype))

    def of_output(self, grad: Tensor, state: State) -> None:
        """Take the output's gradient, and the output and log-sum-exp over all keys."""
        self.grad, self.state = grad, state

    def of_block(self, owner: int, packed: Tensor) -> Tensor:
        """The gradient of ``owner``'s keys and values by this rank's queries, packed."""
        keys, values = self.shapes.unpacked(packed, owner)
        into = packed.new_zeros(packed.shape, dtype=wide(packed.dtype))
        grad_k, grad_v = self.shapes.unpacked(into, owner)
        for tile in self.call.tiles(owner):
            rows, cols = tile.rows, tile.keys
            qkv = (self.operands.q[:, :, rows], keys[:, :, cols], values[:, :, cols])
            out, lse = (x[:, :, rows] for x in self.state)
            block = self.operands.block(tile, owner, self.call, learns=self.learns)
            terms = attend_backward(self.grad[:, :, rows], qkv, (out, lse), block)
            self.q[:, :, rows] += terms[0]
            grad_k[:, :, cols] += terms[1]
            grad_v[:, :, cols] += terms[2]
            if self.bias is not None:
                assert terms[3] is not None
                at = self.call.keys[owner][cols].to(self.bias.device)
                part = self.bias[..., rows, :]
                part.index_add_(-1, at, terms[3].sum_to_size(*part.shape[:-1], len(at)))
        return into


# ------------------------------------------------------------------------------- passing blocks


@dataclass(frozen=True)
class _Shapes:
    """Keys and values of one place as one flat buffer, and back."""

    batch: int
    groups: int
    d: int
    e: int
    lengths: dict[int, int]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, call: Call) -> "_Shapes":
        lengths = {owner: len(positions) for owner, positions in call.keys.items()}
        return cls(k.shape[0], k.shape[1], k.shape[3], v.shape[3], lengths)

    def packed(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k.reshape(-1), v.reshape(-1)])

    def room(self, like: Tensor, owner: int) -> Tensor:
        """An empty buffer for ``owner``'s block."""
        return like.new_empty(self.batch * self.groups * self.lengths[owner] * (self.d + self.e))

    def unpacked(self, packed: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        rows = (self.batch, self.groups, self.lengths[owner])
        k, v = packed.split([rows[0] * rows[1] * rows[2] * n for n in (self.d, self.e)])
        return k.view(*rows, self.d), v.view(*rows, self.e)


def _blocks(
    levels: Sequence[Level], own: int, packed: Tensor, shapes: _Shapes
) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of every place, this rank's first; each sent on before it is used."""
    if not levels:
        yield own, packed
        return
    for owner, block in _pass(levels[0], own, packed, shapes):
        yield from _blocks(levels[1:], owner, block, shapes)


def _pass(level: Level, own: int, packed: Tensor, shapes: _Shapes) -> Iterator[tuple[int, Tensor]]:
    """The blocks of one level: of ``own``, and of those that stand to it as the other places do."""
    if level.kind == "gather":
        yield from _gathered(level.places, own, packed, shapes)
        return
    owners = _owners(level.places, own)
    block = packed
    for owner, following in zip(owners, [*owners[1:], None], strict=True):
        coming: tuple[Tensor, Wait] | None = None
        if following is not None:
            room = shapes.room(block, following)
            coming = room, level.places.shift(block, room, what="keys pass on")
        yield owner, block
        if coming is not None:
            block = _landed(coming)


def _gathered(
    places: Places, own: int, packed: Tensor, shapes: _Shapes
) -> Iterator[tuple[int, Tensor]]:
    owners = _around(places, own)
    rooms = [packed if owner == own else shapes.room(packed, owner) for owner in owners]
    wait = places.exchange([packed] * places.size, rooms, what="all keys are gathered")
    yield own, packed
    wait()
    yield from ((owner, room) for owner, room in zip(owners, rooms, strict=True) if owner != own)


def _around(places: Places, own: int) -> list[int]:
    """Of each member, the place whose block it holds while this rank holds that of ``own``.

    Places of one level lie at equal distances, and a level outside it moves all of them alike.
    """
    here = places.members[places.rank]
    return [(own + member - here) % places.link.size for member in places.members]


def _owners(places: Places, own: int) -> list[int]:
    """Owners of the blocks that pass by, from this rank's own backwards round the ring."""
    around = _around(places, own)
    return [around[(places.rank - step) % places.size] for step in range(places.size)]


@dataclass(frozen=True)
class _Walk:
    """A backward's way through the levels of a schedule.

    Attributes:
        term: gives a block's gradient by this rank alone, from its owner and its keys.
        fetched: other places' blocks where the forward has gathered them, in places' order.
    """

    shapes: _Shapes
    term: Callable[[int, Tensor], Tensor]
    fetched: tuple[Tensor, ...]

    def gradient(self, levels: Sequence[Level], own: int, packed: Tensor) -> Tensor:
        """The sum of all ranks' terms of the block that this rank started with."""
        if not levels:
            return self.term(own, packed)
        if levels[0].kind == "gather":
            return self._gathered(levels, own, packed)
        places = levels[0].places
        owners = _owners(places, own)
        total = packed.new_zeros(0)
        coming: tuple[Tensor, Wait] | None = None
        for step, (owner, block) in enumerate(_pass(levels[0], own, packed, self.shapes)):
            mine = self.gradient(levels[1:], owner, block)
            if step == 0:
                total = mine
                continue
            if coming is not None:
                mine += _landed(coming)
            arriving = own if step + 1 == places.size else owners[step + 1]
            room = self.shapes.room(mine, arriving)
            coming = room, places.shift(mine, room, what="gradients of keys pass on")
        if coming is not None:
            total += _landed(coming)
        return total

    def _gathered(self, levels: Sequence[Level], own: int, packed: Tensor) -> Tensor:
        places = levels[0].places
        owners = _around(places, own)
        blocks: Iterator[tuple[int, Tensor]] = _gathered(places, own, packed, self.shapes)
        if self.fetched:
            others = [owner for owner in owners if owner != own]
            blocks = iter([(own, packed), *zip(others, self.fetched, strict=True)])
        terms = {owner: self.gradient(levels[1:], owner, block) for owner, block in blocks}
        rooms = [self.shapes.room(terms[own], own) for _ in owners]
        sends = [terms[owner] for owner in owners]
        places.exchange(sends, rooms, what="gradients of gathered keys")()
        rooms[places.rank] = terms[own]
        return torch.stack(rooms).sum(0)


def _landed(coming: tuple[Tensor, Wait]) -> Tensor:
    tensor, wait = coming
    wait()
    return tensor


# ------------------------------------------------------------------------------ small helpers


def _columns(x: Tensor, keys: Tensor) -> Tensor:
    """The columns at some positions; a view where they are one run."""
    if len(keys) and int(keys[-1] - keys[0]) + 1 == len(keys):
        return x.narrow(-1, int(keys[0]), len(keys))
    return x.index_select(-1, keys.to(x.device))


def _plus(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


def merge(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """Turn attention over some keys into that over more, in place."""
    share = torch.where(torch.isneginf(new_lse), 0.0, (new_lse - lse).sigmoid())
    out.lerp_(new, share.unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)
