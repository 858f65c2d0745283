"""Bytes that a rank holds at the peak of attention over a split sequence, forward and backward.

One layer: inputs, output, gradients, and all that is held meanwhile, with the scratch of torch's
fused kernel on one thread of a CPU, where the method is not Ring Self-Attention.
"""

from dataclasses import dataclass
from math import ceil

from hairpin.exchange.order import Kind, Order
from hairpin.exchange.split import Schedule
from hairpin.exchange.turns import ways
from hairpin.layout import shard_offset, shard_size
from hairpin.planning.sequence.work import AttentionShape

_STATE_BYTES = 4  # of an element of a float32 state, as wide as the inputs at least
_SCRATCH_KEYS = 512  # torch's kernel takes blocks of so many keys
_SCRATCH_ROWS = ((768, 256), (192, 64), (0, 32))  # and of so many rows, from so many queries on


@dataclass(frozen=True, kw_only=True)
class Way:
    """How attention crosses the ranks, as far as memory goes.

    Attributes:
        heads: ranks that switch between sequence and heads, u.
        places: places around the ring, r.
        schedule, inner, order, turns: as of :class:`~hairpin.SequenceSplit`.
    """

    heads: int
    places: int
    schedule: Schedule
    inner: int
    order: Kind
    turns: int


def held_bytes(shape: AttentionShape, way: Way) -> int:
    """What the rank with the longest part and the most heads holds at most."""
    return _Held(shape, way).peak_bytes()


class _Held:
    """Sizes are in elements; ``narrow`` and ``wide`` are bytes of an input's and a state's."""

    def __init__(self, shape: AttentionShape, way: Way) -> None:
        self.shape, self.way = shape, way
        self.narrow, self.wide = shape.element_bytes, wide_bytes(shape)
        channels, u = shape.batch * shape.head_dim, way.heads
        rows, columns = (max(lengths) for lengths in place_lengths(shape, way.order, way.places))
        self.rows, self.columns = rows, columns
        self.heads = shard_size(shape.heads, u, 0)
        self.groups = max(len(keys_needed(shape.heads, shape.key_heads, u, j)) for j in range(u))
        self.own_q = ceil(rows / u) * shape.heads * channels
        self.own_kv = ceil(columns / u) * shape.key_heads * 2 * channels
        self.q = rows * self.heads * channels
        self.kv = columns * self.groups * 2 * channels
        self.lse = shape.batch * rows * self.heads
        self.scores = shape.batch * self.heads * rows * shape.key_length
        by_heads, by_keys = ways(way.turns if way.places > 1 else 1, self.groups)
        of_heads = ceil(self.groups / by_heads) / self.groups
        self.turn_q = of_heads * self.q
        self.turn_columns = ceil(columns / by_keys)
        self.turn_kv = of_heads * self.turn_columns / columns * self.kv if columns else 0.0

    def peak_bytes(self) -> int:
        """The larger of what forward, backward and switching hold."""
        given = (2 * self.own_q + self.own_kv) * self.narrow  # q, output, k, v
        switched = (2 * self.q + self.kv) * self.narrow if self.way.heads > 1 else 0
        state = self.lse * self.wide
        if self.narrow < self.wide:
            state += self.q * self.wide
        alone = self.way.places == 1  # then gradients are those that one kernel gives
        grads = (self.q + self.kv) * (self.narrow if alone else self.wide)
        narrowed = 0 if alone or self.narrow == self.wide else self.q * self.narrow
        of_output = self.own_q * self.narrow
        if self.way.heads > 1:
            of_output += self.q * self.narrow
        forward = given + switched + state + self._passing_forward()
        backward = given + switched + self.lse * self.wide + of_output + grads
        meanwhile = max(self._passing_backward() + self._scratch(), narrowed)
        return round(max(forward, backward + meanwhile, self._switching(given)))

    def _two_levels(self, block: float, grad: float, within: float, before: float) -> float:
        """A ring across groups: a block and the next one, and gradients that follow.

        Args:
            within: what a group's round holds.
            before: what it holds until the turn before has ended.
        """
        more = self.way.places // self.way.inner > 2
        rounds = [2 * block + within, (1 + more) * block + (1 + 2 * more) * grad + within]
        if self.way.turns > 1:
            rounds.append(2 * block + 2 * grad + before)
        return max(rounds)

    def _scratch(self) -> float:
        """A block's weights and their gradients; the output's gradient of some heads, copied."""
        rows = next(taken for least, taken in _SCRATCH_ROWS if self.rows >= least)
        weights = 2 * rows * min(_SCRATCH_KEYS, self.turn_columns) * self.wide
        return weights + (self.turn_q * self.narrow if self.turn_q < self.q else 0)

    def _switching(self, given: float) -> float:
        """Turning the gradients back: as they are, packed, received, put together."""
        if self.way.heads == 1:
            return 0.0
        of_output = self.own_q * self.narrow
        return given + of_output + 4 * (self.q + self.kv) * self.narrow

    def _passing_forward(self) -> float:
        """Blocks of keys that pass by, and the output of a kernel."""
        way, r = self.way, self.way.places
        if r == 1:
            return 0.0
        blocks: float = {"ring": 2, "double_ring": 4, "rsa": 2}.get(way.schedule, way.inner + 1)
        if way.schedule == "all_gather":
            kept = (r - 1) * self.kv * self.narrow
            return kept + self.turn_kv * self.narrow + self.turn_q * self.wide
        held = blocks * self.turn_kv * self.narrow + self.turn_q * self.wide
        return held + (self.scores * self.wide if way.schedule == "rsa" else 0)

    def _passing_backward(self) -> float:
        """Blocks of keys that pass by, their gradients, and the terms that a kernel gives."""
        way, r, inner = self.way, self.way.places, self.way.inner
        if r == 1:
            return 0.0
        terms = (self.turn_q + self.turn_kv) * self.narrow
        block, grad = self.turn_kv * self.narrow, self.turn_kv * self.wide
        if way.schedule == "ring":
            if way.turns == 1 and r == 2:  # the one gradient leaves when all is computed
                return max(block + 2 * grad, 2 * block + terms)
            return (2 if r > 3 or way.turns > 1 else 1) * block + 2 * grad + terms
        if way.schedule == "double_ring":
            within = block + max(terms, 2 * grad)
            if inner > 2:
                within = 2 * (block + grad) + terms
            return self._two_levels(block, grad, within, block + terms)
        if way.schedule == "all_gather":
            kept = (r - 1) * self.kv * self.narrow + block
            return kept + (r - 2) * grad + max(terms, r * grad)
        if way.schedule == "hierarchical":
            within = (inner - 1) * block + (inner - 2) * grad + max(terms, inner * grad)
            return self._two_levels(block, grad, within, within)
        return 2 * block + 4 * grad + 3 * self.scores * self.wide  # rsa: whole rows of scores


def wide_bytes(shape: AttentionShape) -> int:
    """Bytes of an element of a state and of gradients on their way."""
    return max(_STATE_BYTES, shape.element_bytes)


def place_lengths(shape: AttentionShape, order: Kind, places: int) -> tuple[list[int], list[int]]:
    """Queries and keys of every place."""
    kind = order if shape.key_length == shape.length else "contiguous"
    return _lengths(order, shape.length, shape, places), _lengths(
        kind, shape.key_length, shape, places
    )


def _lengths(kind: Kind, length: int, shape: AttentionShape, places: int) -> list[int]:
    order = Order(kind, length, shape.mask.documents if kind == "documents" else None)
    return [len(order.positions(places, place)) for place in range(places)]


def keys_needed(heads: int, groups: int, ranks: int, rank: int) -> range:
    """Key/value heads that a rank's share of the query heads needs."""
    size = shard_size(heads, ranks, rank)
    first = shard_offset(heads, ranks, rank)
    each = heads // groups
    return range(first // each, (first + size - 1) // each + 1) if size else range(0)
