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
and end at its owner: as many steps as in the forward, in float32. All of it
may be done in several turns (:mod:`hairpin.exchange.turns`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.exchange.block import attend, attend_backward
from hairpin.exchange.call import Call, Operands
from hairpin.exchange.passing import Shapes, Walk, settle, visit
from hairpin.exchange.port import State, wide
from hairpin.exchange.sums import Sum
from hairpin.exchange.tiles import Tile
from hairpin.exchange.turns import Turn, cut_in_turns


def attend_across(operands: Operands, call: Call) -> Tensor:
    """Attention of this rank's queries to all ranks' keys: ``[b, h, q, e]``."""
    o = operands
    result: Tensor = _Across.apply(o.q, o.k, o.v, o.bias, o.key_mask, call)
    return result


def attend_blocks(operands: Operands, call: Call) -> tuple[State, list[Tensor]]:
    """Output and log-sum-exp over all ranks' keys, and the blocks that gathers have fetched."""
    q, v = operands.q, operands.v
    make = partial(_no_keys, q, v)
    turns = cut_in_turns(operands, call)
    if len(turns) == 1:
        merged = _Merged(q.shape[2], make)
        fetched = _attend_turn(turns[0], merged)
        return merged.state(), fetched
    out, lse = make()
    fetched = []
    for _, of_heads in groupby(turns, lambda turn: turn.heads.start):
        first, *more = of_heads
        merged = _Merged(q.shape[2], make, (out[:, first.heads], lse[:, first.heads]))
        for turn in (first, *more):
            fetched += _attend_turn(turn, merged)
    return (out, lse), fetched


def _attend_turn(turn: Turn, merged: "_Merged") -> list[Tensor]:
    """Merge the attention to all places' keys in; gives the blocks that one gather has fetched."""
    o, call = turn.operands, turn.call
    if not call.levels:
        merged.attend(o, call.own, call)
        return []
    shapes = Shapes.of(o.k, o.v, call)
    keeps = [level.kind for level in call.levels] == ["gather"]  # it serves the backward too
    fetched: list[Tensor] = []

    def use(owner: int, block: Tensor) -> None:
        if keeps and owner != call.own:
            fetched.append(block)
        keys, values = shapes.unpacked(block, owner)
        merged.attend(replace(o, k=keys, v=values), owner, call)

    visit(call.levels, call.own, shapes.packed(turn), shapes, use)
    return fetched


class _Merged:
    """Output and log-sum-exp of some heads' queries, over the keys that have been met.

    Args:
        make: makes a state that has met no keys.
        home: such a state to write to; None: a first one of all rows is kept as it comes.
    """

    def __init__(self, rows: int, make: Callable[[], State], home: State | None = None) -> None:
        self.whole, self.make, self.home = slice(0, rows), make, home
        self.met = np.zeros(rows, dtype=bool)  # rows that have seen keys

    def state(self) -> State:
        """The state so far."""
        if self.home is None:
            self.home = self.make()
        return self.home

    def attend(self, operands: Operands, owner: int, call: Call) -> None:
        """Attend to ``owner``'s keys, which are those of the operands."""
        for tile in call.tiles(owner):
            self.add(tile.rows, attend(operands.tile(tile), operands.block(tile, owner, call)))

    def add(self, rows: slice, new: State) -> None:
        """Merge the state of some rows over keys that they have not met."""
        if self.home is None and rows == self.whole:
            self.home = new
        else:
            out, lse = (x[:, :, rows] for x in self.state())
            if self.met[rows].any():
                merge(out, lse, *new)
            else:
                out.copy_(new[0])
                lse.copy_(new[1])
        self.met[rows] = True


def gradients(
    operands: Operands,
    call: Call,
    grad: Tensor,
    state: State,
    *,
    learns: bool = False,
    fetched: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of this rank's q, k, v and bias, as wide as a state or as the operands.

    Args:
        grad: of the output of this rank's queries.
        state: their output and log-sum-exp over all keys.
        learns: whether the bias wants a gradient.
        fetched: blocks that the forward has gathered.
    """
    turns = cut_in_turns(operands, call)
    q, k, v = operands.q, operands.k, operands.v
    of_bias = _bias_zeros(operands) if learns else None
    of_q, of_keys = _sum(q), _sum(k, v)
    homes = (*_zeros(q), *_zeros(k, v)) if len(turns) > 1 else None
    each, late = len(fetched) // len(turns), list[Callable[[], None]]()
    for i, turn in enumerate(turns):
        sums = (of_q, of_keys) if homes is None else _at_home(turn, homes)
        terms = _Terms(turn, *_sliced(turn, grad, state, of_bias), *sums)
        terms.walk(fetched[i * each : (i + 1) * each], late)
    settle(late)
    total = (*of_q.total(), *of_keys.total()) if homes is None else homes
    return total[0], total[1], total[2], of_bias


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3])
        (out, lse), fetched = attend_blocks(Operands(q, k, v, *tensors[3:]), call)
        ctx.call = call
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, *tensors[3:], out, lse, *fetched)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, key_mask, out, lse, *fetched = ctx.saved_tensors
        operands = Operands(q, k, v, bias, key_mask)
        learns = bias is not None and ctx.needs_input_grad[3]
        options = {"learns": learns, "fetched": fetched}
        of_q, of_k, of_v, of_bias = gradients(operands, ctx.call, grad, (out, lse), **options)
        of_q = of_q.to(q.dtype)  # one after the other: the wide one is let go
        of_k = of_k.to(k.dtype)
        of_v = of_v.to(v.dtype)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_q, of_k, of_v, of_bias, None, None


@dataclass(frozen=True)
class _Terms:
    """Gradients by this rank's queries in one turn.

    Attributes:
        grad, state, of_bias: of the turn's heads; ``of_bias`` is added to.
        of_q, of_own: sums of those of q, and of this rank's own keys and values.
    """

    turn: Turn
    grad: Tensor
    state: State
    of_bias: Tensor | None
    of_q: Sum
    of_own: Sum

    def walk(self, fetched: Sequence[Tensor], late: list[Callable[[], None]]) -> None:
        """Add up the gradients of the turn; what arrives last is left in ``late``."""
        o, call = self.turn.operands, self.turn.call
        if not call.levels:
            self._of_keys(o, call.own)
            return
        shapes = Shapes.of(o.k, o.v, call)

        def term(owner: int, block: Tensor) -> Sum:
            keys, values = shapes.unpacked(block, owner)
            return self._of_keys(replace(o, k=keys, v=values), owner)

        pack = partial(shapes.packed, self.turn)
        Walk(shapes, term, fetched, late).begin(call.levels, call.own, pack)

    def _of_keys(self, operands: Operands, owner: int) -> Sum:
        """The gradient of ``owner``'s keys and values, which are those of the operands."""
        own = owner == self.turn.call.own
        total = self.of_own if own else _sum(operands.k, operands.v)
        for tile in self.turn.call.tiles(owner):
            self._add_tile(operands, tile, owner, total)
        return total

    def _add_tile(self, operands: Operands, tile: Tile, owner: int, of_keys: Sum) -> None:
        call, rows = self.turn.call, tile.rows
        out, lse = (x[:, :, rows] for x in self.state)
        block = operands.block(tile, owner, call, learns=self.of_bias is not None)
        terms = attend_backward(self.grad[:, :, rows], operands.tile(tile), (out, lse), block)
        self.of_q.add(rows, terms[:1])
        of_keys.add(tile.keys, terms[1:3])
        if self.of_bias is not None:
            assert terms[3] is not None
            at = call.keys[owner][tile.keys].to(self.of_bias.device)
            part = self.of_bias[..., rows, :]
            part.index_add_(-1, at, terms[3].sum_to_size(*part.shape[:-1], len(at)))


def _sliced(
    turn: Turn, grad: Tensor, state: State, of_bias: Tensor | None
) -> tuple[Tensor, State, Tensor | None]:
    """What a turn's heads have of the output's gradient, the state and the bias's gradient."""
    heads = turn.heads
    if of_bias is not None and of_bias.shape[1] > 1:
        of_bias = of_bias[:, heads]
    return grad[:, heads], (state[0][:, heads], state[1][:, heads]), of_bias


def _at_home(turn: Turn, homes: tuple[Tensor, ...]) -> tuple[Sum, Sum]:
    """Sums of a turn's q and of its own keys and values that go straight into whole tensors."""
    q, k, v = homes[0][:, turn.heads], homes[1][:, turn.groups], homes[2][:, turn.groups]
    strips = [(at, (k[:, :, held], v[:, :, held])) for at, held in turn.strips]
    rows, keys = q.shape[2], strips[-1][0].stop
    return Sum(rows, tuple, [(slice(0, rows), (q,))]), Sum(keys, tuple, strips)


def _sum(*tensors: Tensor) -> Sum:
    """Of the gradients of some tensors of the same positions."""
    return Sum(tensors[0].shape[2], partial(_zeros, *tensors))


def _zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums that begin, laid out as the tensors are."""
    return tuple(torch.zeros_like(x, dtype=wide(x.dtype)) for x in tensors)


def _bias_zeros(operands: Operands) -> Tensor:
    assert operands.bias is not None
    return operands.bias.new_zeros(operands.bias.shape, dtype=wide(operands.bias.dtype))


def _no_keys(q: Tensor, v: Tensor) -> State:
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide(q.dtype))
    return out, q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))


def merge(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """Turn attention over some keys into that over more, in place."""
    share = torch.where(torch.isneginf(new_lse), 0.0, (new_lse - lse).sigmoid())
    out.lerp_(new, share.unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)
