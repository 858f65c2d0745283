"""What one attention across the ranks is about: its schedule, what is known of it, its tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hairpin.exchange.block import hidden, masked, window_of
from hairpin.exchange.dropout import Scores, kept
from hairpin.exchange.mask import Mask
from hairpin.exchange.places import Places
from hairpin.exchange.port import Block, Qkv, wide
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
        turns: rounds that keys and values are cut into at least (:mod:`hairpin.exchange.turns`).
        runs: of a place's keys, equally many positions each; parts take some of every run.
        known: tiles that have been cut already, by owner.
        parts: of all places' keys that have been made already, by their number.
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
    turns: int = 1
    runs: int = 1
    known: dict[int, list[Tile]] = field(default_factory=dict)
    parts: dict[int, list["Part"]] = field(default_factory=dict)

    def tiles(self, owner: int) -> list[Tile]:
        """Tiles of this rank's queries with ``owner``'s keys."""
        if not self.heads:  # fewer heads than places: this one has none
            return []
        if owner not in self.known:
            with torch.inference_mode(False):  # they are kept, and training uses them too
                self.known[owner] = cut(self.queries, self.keys[owner], self.mask, self.key_length)
        return self.known[owner]


@dataclass(frozen=True)
class Part:
    """A part of all places' keys.

    Attributes:
        keys: of each place, positions of its keys, ascending.
        strips: (in the part, in all keys of this rank): which of its keys those are.
        known: tiles that have been cut already, by owner.
    """

    keys: dict[int, Tensor]
    strips: tuple[tuple[slice, slice], ...]
    known: dict[int, list[Tile]] = field(default_factory=dict)


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

    def tile(self, tile: Tile) -> Qkv:
        """The queries, keys and values of one tile, views."""
        return self.q[:, :, tile.rows], self.k[:, :, tile.keys], self.v[:, :, tile.keys]

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


def _columns(x: Tensor, keys: Tensor) -> Tensor:
    """The columns at some positions; a view where they are one run."""
    if len(keys) and int(keys[-1] - keys[0]) + 1 == len(keys):
        return x.narrow(-1, int(keys[0]), len(keys))
    return x.index_select(-1, keys.to(x.device))


def _plus(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y
