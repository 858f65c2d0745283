"""What attention over a split sequence costs by each method: seconds, bytes sent, bytes held.

A rank's time is the sum over steps of ``max(compute, communication)`` where a transfer runs behind
the work, and of both where it does not. A transfer takes what the busiest link needs (latency and
bandwidth by tier, :class:`~hairpin.comm.topology.Topology`). Work is counted on the tiles that the
kernels really compute, so causal masks, windows, documents and their balance are what they are.

The methods are those of ``hairpin.exchange``: P ranks are r places around a ring of u ranks each,
which switch between sequence and heads. u = P is Ulysses, u = 1 a ring or a gather, else USP.

Bytes a rank sends forward, for s rows, h and g heads of d channels, all even:
(u-1)/u s (2h + 2g) d for the switches, (r-1) u s 2 (g/u) d for keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from hairpin.comm.topology import Message, Topology
from hairpin.errors import PlanError
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Kind
from hairpin.exchange.split import Schedule
from hairpin.exchange.turns import ways
from hairpin.layout import shard_sizes
from hairpin.planning.sequence.memory import (
    Way,
    held_bytes,
    keys_needed,
    place_lengths,
    wide_bytes,
)
from hairpin.planning.sequence.work import Array, AttentionShape, Counts, count_work
from hairpin.units import format_bytes, format_time

_FORWARD_FLOPS, _BACKWARD_FLOPS = 4, 10  # per score and channel
_MERGE_COPIES = 4  # memory traffic of merging a state, in copies of the output
_ADD_COPIES = 2  # of adding up gradients
_PACK_COPIES = 2  # of packing and unpacking what is switched
_MOST_TURNS = 32  # that are tried where memory is short


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the attention, and what it would cost.

    Attributes:
        method: its name for people.
        heads: ranks that switch between sequence and heads, u.
        places: places around the ring, r.
        heads_inside: whether those u ranks are neighbours, or else the r places.
        schedule: how keys and values cross the places.
        inner: places of the inner level of a schedule that has two.
        order: how positions are dealt to places.
        turns: rounds in which keys and values cross the places.
        forward_s, backward_s: predicted.
        forward_bytes, backward_bytes: what the busiest rank sends.
        peak_bytes: what the busiest rank holds, inputs, output and gradients included.
        excluded: why it cannot be taken; None if it can.
    """

    method: str
    heads: int
    places: int
    heads_inside: bool
    schedule: Schedule
    inner: int
    order: Kind
    turns: int = 1
    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_bytes: int = 0
    backward_bytes: int = 0
    peak_bytes: int = 0
    excluded: str | None = None

    @property
    def way(self) -> Way:
        """What decides about memory."""
        return Way(
            heads=self.heads,
            places=self.places,
            schedule=self.schedule,
            inner=self.inner,
            order=self.order,
            turns=self.turns,
        )

    @property
    def time_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def sent_bytes(self) -> int:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


def candidates(
    shape: AttentionShape,
    topology: Topology,
    *,
    memory_bytes: int | None = None,
    schedules: Sequence[Schedule] = ("ring", "double_ring", "all_gather", "hierarchical"),
    orders: Sequence[Kind] | None = None,
) -> list[Candidate]:
    """Every way to run one attention layer over the ranks of ``topology``, the fastest first.

    Those that cannot be come last, with the reason. What holds too much takes turns, as many as it
    needs to fit. Needs no ranks.

    Args:
        memory_bytes: what a rank may hold for this layer; None: as much as it likes.
        orders: how positions may be dealt; the default is what suits the mask.

    Raises:
        PlanError: an unknown schedule.
    """
    for schedule in schedules:
        if schedule not in get_args(Schedule):
            raise PlanError(f"schedule {schedule!r}: write some of {', '.join(get_args(Schedule))}")
    kinds = _orders(shape.mask) if orders is None else tuple(orders)
    counts: dict[tuple[Kind, int], Counts] = {}
    priced = [
        price(
            in_turns(candidate, shape, topology, memory_bytes),
            shape,
            topology,
            memory_bytes=memory_bytes,
            counts=counts,
        )
        for candidate in _enumerate(shape, topology, schedules, kinds)
    ]
    return sorted(priced, key=lambda c: (c.excluded is not None, c.time_s, c.peak_bytes))


def in_turns(
    candidate: Candidate, shape: AttentionShape, topology: Topology, memory_bytes: int | None
) -> Candidate:
    """The same candidate in the fewest turns that fit into the memory; as it is if none do."""
    if memory_bytes is None or candidate.heads > shape.heads:
        return candidate
    turns = fewest_turns(shape, candidate.way, memory_bytes)
    taken = replace(candidate, turns=turns or 1)
    return replace(taken, method=name_of(taken, topology))


def fewest_turns(shape: AttentionShape, way: Way, memory_bytes: int) -> int | None:
    """The fewest turns, a power of two, that hold no more; None if there are none."""
    turns = 1
    while held_bytes(shape, replace(way, turns=turns)) > memory_bytes:
        turns *= 2
        if turns > _MOST_TURNS or way.places == 1 or way.schedule == "rsa":
            return None
    return turns


def price(
    candidate: Candidate,
    shape: AttentionShape,
    topology: Topology,
    *,
    memory_bytes: int | None = None,
    counts: dict[tuple[Kind, int], Counts] | None = None,
) -> Candidate:
    """The same candidate with its costs, and the reason where it cannot be taken.

    Args:
        counts: of work, by order and places, where several candidates of one shape are priced:
            what is missing is counted and put in.

    Raises:
        PlanError: the candidate is of another number of ranks.
    """
    if candidate.heads * candidate.places != topology.ranks:
        raise PlanError(
            f"{candidate.heads} x {candidate.places} places are not the {topology.ranks} ranks of "
            "the topology"
        )
    if candidate.heads > shape.heads:
        reason = f"{shape.heads} heads for {candidate.heads} ranks leave some without work"
        return replace(candidate, excluded=reason)
    bill = _Bill(candidate, shape, topology, {} if counts is None else counts)
    peak_bytes = held_bytes(shape, candidate.way)
    excluded = None
    if memory_bytes is not None and peak_bytes > memory_bytes:
        excluded = f"holds {format_bytes(peak_bytes)} of {format_bytes(memory_bytes)}"
    return replace(
        candidate,
        forward_s=bill.forward_s(),
        backward_s=bill.backward_s(),
        forward_bytes=bill.forward_bytes(),
        backward_bytes=bill.backward_bytes(),
        peak_bytes=peak_bytes,
        excluded=excluded,
    )


def explain(found: Sequence[Candidate]) -> str:
    """A table for people, a candidate a line."""
    rows = [("method", "u x r", "order", "forward", "backward", "sent", "held", "")]
    for c in found:
        costs = (
            format_time(c.forward_s),
            format_time(c.backward_s),
            format_bytes(c.sent_bytes),
            format_bytes(c.peak_bytes),
        )
        note = "" if c.excluded is None else f"no: {c.excluded}"
        shown = costs if c.peak_bytes else ("",) * 4
        rows.append((c.method, f"{c.heads} x {c.places}", c.order, *shown, note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def name_of(candidate: Candidate, topology: Topology) -> str:
    """What people call a way to run attention."""
    u, r, schedule = candidate.heads, candidate.places, candidate.schedule
    if r == 1:
        return "ulysses" if u > 1 else "alone"
    words = schedule.replace("_", " ")
    if candidate.turns > 1:
        words += f" in {candidate.turns} turns"
    if u == 1:
        return words
    inside = "heads" if candidate.heads_inside else words
    return f"usp {u} x {r}, {words}" + (f", {inside} inside" if topology.hosts > 1 else "")


# ---------------------------------------------------------------------------------- enumeration


def _orders(mask: Mask) -> tuple[Kind, ...]:
    if mask.documents is not None:
        return ("contiguous", "zigzag", "documents")
    return ("contiguous", "zigzag") if mask.causal else ("contiguous",)


def _enumerate(
    shape: AttentionShape,
    topology: Topology,
    schedules: Sequence[Schedule],
    orders: Sequence[Kind],
) -> Iterator[Candidate]:
    ranks = topology.ranks
    for u in (n for n in range(1, ranks + 1) if ranks % n == 0):
        r = ranks // u
        sides = (True, False) if 1 < u < ranks and topology.hosts > 1 else (True,)
        for heads_inside in sides:
            for schedule, inner in _schedules(topology, u, schedules, heads_inside=heads_inside):
                for order in orders if r > 1 else orders[:1]:
                    blank = Candidate(
                        method="",
                        heads=u,
                        places=r,
                        heads_inside=heads_inside,
                        schedule=schedule,
                        inner=inner,
                        order=order,
                    )
                    yield replace(blank, method=name_of(blank, topology))


def _schedules(
    topology: Topology, u: int, schedules: Sequence[Schedule], *, heads_inside: bool
) -> Iterator[tuple[Schedule, int]]:
    """(schedule, places of its inner level)."""
    r = topology.ranks // u
    if r == 1:
        yield "ring", 1
        return
    inner = _places_per_host(topology, u, heads_inside=heads_inside)
    for schedule in schedules:
        if schedule in {"ring", "all_gather"} or (schedule == "rsa" and u == 1):
            yield schedule, 1
        elif schedule != "rsa" and 1 < inner < r:
            yield schedule, inner


def _places_per_host(topology: Topology, u: int, *, heads_inside: bool) -> int:
    """Neighbouring places of the ring that share a host, where all hosts have as many."""
    each = topology.ranks_per_host
    r = topology.ranks // u
    if each is None:
        return 1
    if heads_inside:
        return each // u if each % u == 0 else 1
    return each if r % each == 0 else 1


# ------------------------------------------------------------------------------------- pricing


@dataclass(frozen=True)
class _Seconds:
    """Seconds of each pair of places ``[place of queries, places between it and the keys']``."""

    seconds: Array
    places: tuple[int, ...]

    def at(self, step: int) -> float:
        """The busiest place's step around the whole ring."""
        return float(self.seconds[:, step].max())

    def between(self, across: int, step: int, inner: int) -> float:
        """The busiest place's step around the inner ring, so many hosts away."""
        r = self.seconds.shape[1]
        times = []
        for row, place in enumerate(self.places):
            host, seat = divmod(place, inner)
            owner = ((host - across) % (r // inner)) * inner + (seat - step) % inner
            times.append(float(self.seconds[row, (place - owner) % r]))
        return max(times)


class _Bill:
    """The costs of one candidate."""

    def __init__(
        self,
        candidate: Candidate,
        shape: AttentionShape,
        topology: Topology,
        counts: dict[tuple[Kind, int], Counts],
    ) -> None:
        self.c, self.shape, self.topology, self.counts = candidate, shape, topology, counts
        self.u, self.r = candidate.heads, candidate.places
        self.query_heads = shard_sizes(shape.heads, self.u)
        self.key_heads = [
            len(keys_needed(shape.heads, shape.key_heads, self.u, j)) for j in range(self.u)
        ]
        self.rows, self.columns = place_lengths(shape, candidate.order, self.r)
        self.wide_bytes = wide_bytes(shape)
        self.by_heads, self.by_keys = ways(candidate.turns, max(self.key_heads))
        self.turns = self.by_heads * self.by_keys

    def rank_of(self, place: int, head: int) -> int:
        """The rank that is ``head`` of the u at ``place``."""
        return place * self.u + head if self.c.heads_inside else head * self.r + place

    # ------------------------------------------------------------------------------------- time

    def forward_s(self) -> float:
        """Switch in, the schedule, switch out."""
        within = self._walk_s(self.work_s[0], self._hop_s(self.shape.element_bytes), None)
        return self._switch_s(self._into()) + within + self._switch_s(self._out_of())

    def backward_s(self) -> float:
        """Switch in the gradient of the output, the schedule, switch out those of q, k and v."""
        keys, grads = self._hop_s(self.shape.element_bytes), self._hop_s(self.wide_bytes)
        within = self._walk_s(self.work_s[1], keys, grads)
        return (
            self._switch_s(_turned(self._out_of())) + within + self._switch_s(_turned(self._into()))
        )

    def _switch_s(self, messages: Sequence[Message]) -> float:
        if self.u == 1:
            return 0.0
        sent = max(_sent(messages, self.topology.ranks))
        copies_s = _PACK_COPIES * sent / self.topology.copy_bytes_per_s
        return self.topology.transfer_s(messages) + copies_s

    def _walk_s(
        self, work_s: _Seconds, keys: dict[str, float], grads: dict[str, float] | None
    ) -> float:
        """The schedule's levels; ``grads`` are the hops of gradients in the backward."""
        r, schedule = self.r, self.c.schedule
        if schedule == "rsa":
            return self._rsa_s(work_s, backward=grads is not None)
        if schedule == "ring":
            return _ring_s(
                [work_s.at(step) for step in range(r)],
                keys["all"],
                None if grads is None else grads["all"],
                self.turns,
            )
        if schedule == "all_gather":
            rest_s = sum(work_s.at(step) for step in range(1, r))
            if grads is not None:  # what was gathered is still there
                return self.turns * (work_s.at(0) + rest_s + grads["gather"])
            return self.turns * (max(work_s.at(0), keys["gather"]) + rest_s)
        inner = self.c.inner
        rounds = []
        for across in range(r // inner):
            steps = [work_s.between(across, step, inner) for step in range(inner)]
            if schedule == "double_ring":
                rounds.append(
                    _ring_s(steps, keys["inside"], None if grads is None else grads["inside"])
                )
            else:
                gathered_s = max(steps[0], keys["inside gather"]) + sum(steps[1:])
                rounds.append(gathered_s + (grads["inside gather"] if grads else 0.0))
        across_s = None if grads is None else grads["across"]
        return _ring_s(rounds, keys["across"], across_s, self.turns)

    def _rsa_s(self, work_s: _Seconds, *, backward: bool) -> float:
        """Two rings without overlap; in the backward also two sums over all ranks of all keys."""
        compute_s = sum(work_s.at(step) for step in range(self.r))
        part = self._rsa_bytes(max(self.columns))
        ring = [(p, (p + 1) % self.r, part) for p in range(self.r)]
        everyone = [(a, b, part) for a in range(self.r) for b in range(self.r) if a != b]
        rings_s = 2 * (self.r - 1) * self.topology.transfer_s(ring)
        sums_s = 4 * self.topology.transfer_s(everyone) if backward else 0.0
        return compute_s + rings_s + sums_s

    def _rsa_bytes(self, columns: int) -> int:
        """Keys, or values, of some positions: one head of them for each query head, as states."""
        s = self.shape
        return s.batch * columns * s.heads * s.head_dim * self.wide_bytes

    def _hop_s(self, element_bytes: int) -> dict[str, float]:
        """Seconds of each kind of transfer of keys and values between places."""
        blocks = [
            -(-self._block_bytes(head, element_bytes) // self.turns) for head in range(self.u)
        ]
        names = {
            "ring": ("all",),
            "rsa": (),
            "all_gather": ("gather",),
            "double_ring": ("inside", "across"),
            "hierarchical": ("inside gather", "across"),
        }[self.c.schedule]
        return {name: self._pairs_s(name, blocks) for name in names}

    def _pairs_s(self, name: str, blocks: Sequence[int]) -> float:
        if self.r == 1:
            return 0.0
        pairs = list(_partners(name, self.r, self.c.inner))
        return self.topology.transfer_s(
            (self.rank_of(a, head), self.rank_of(b, head), blocks[head])
            for a, b in pairs
            for head in range(self.u)
        )

    def _block_bytes(self, head: int, element_bytes: int) -> int:
        """The longest place's keys and values for one of the u ranks."""
        return self._key_bytes(max(self.columns), head, element_bytes)

    def _key_bytes(self, columns: int, head: int, element_bytes: int) -> int:
        s = self.shape
        return s.batch * columns * self.key_heads[head] * 2 * s.head_dim * element_bytes

    @cached_property
    def work_s(self) -> tuple[_Seconds, _Seconds]:
        """Seconds of computing each pair of places in a turn, forward and backward.

        On the busiest head.
        """
        s, t = self.shape, self.topology
        counts = self._counted()
        heads, groups = max(self.query_heads), max(self.key_heads)
        flops = s.batch * heads * s.head_dim * counts.scores / self.turns
        rows_bytes = s.batch * heads * s.head_dim * self.wide_bytes * counts.rows / self.by_heads
        keys_bytes = (
            s.batch * groups * 2 * s.head_dim * self.wide_bytes * counts.columns / self.turns
        )
        forward = (
            counts.calls * t.forward.overhead_s
            + _FORWARD_FLOPS * flops / t.forward.flops_per_s
            + _MERGE_COPIES * rows_bytes / t.copy_bytes_per_s
        )
        backward = (
            counts.calls * t.backward.overhead_s
            + _BACKWARD_FLOPS * flops / t.backward.flops_per_s
            + _ADD_COPIES * (rows_bytes + keys_bytes) / t.copy_bytes_per_s
        )
        return _Seconds(forward, counts.places), _Seconds(backward, counts.places)

    def _counted(self) -> Counts:
        if self.c.schedule == "rsa" and self.r > 1:  # it skips nothing
            return count_work("contiguous", replace(self.shape, mask=Mask()), self.r)
        key = self.c.order, self.r
        if key not in self.counts:
            self.counts[key] = count_work(self.c.order, self.shape, self.r)
        return self.counts[key]

    # ------------------------------------------------------------------------------------ bytes

    def forward_bytes(self) -> int:
        """What the busiest rank sends: switches and keys."""
        return max(self._sent(self._into(), self._out_of(), grads=False))

    def backward_bytes(self) -> int:
        """What the busiest rank sends: switches back, keys again where needed, gradients."""
        return max(self._sent(_turned(self._into()), _turned(self._out_of()), grads=True))

    def _sent(self, *switches: Sequence[Message], grads: bool) -> list[int]:
        totals = [0] * self.topology.ranks
        for messages in switches:
            totals = [a + b for a, b in zip(totals, _sent(messages, len(totals)), strict=True)]
        for place in range(self.r):
            for head in range(self.u):
                totals[self.rank_of(place, head)] += self._sent_around(place, head, grads=grads)
        return totals

    def _sent_around(self, place: int, head: int, *, grads: bool) -> int:
        """Bytes of keys, values and their gradients that one rank sends to other places."""
        around = [self.columns[(place - n) % self.r] for n in range(self.r)]  # as they pass by
        if self.c.schedule == "rsa":
            return self._sent_by_rsa(place, around, grads=grads)
        sent, gradients = self._rows_sent(place, around, grads=grads)
        narrow, wide = self.shape.element_bytes, self.wide_bytes
        return self._key_bytes(sent, head, narrow) + grads * self._key_bytes(gradients, head, wide)

    def _rows_sent(self, place: int, around: Sequence[int], *, grads: bool) -> tuple[int, int]:
        """Positions whose keys a place sends on, and positions whose gradients."""
        r, inner = self.r, self.c.inner
        if self.c.schedule == "all_gather":  # what was gathered serves the backward too
            return 0 if grads else (r - 1) * around[0], sum(around[1:])
        if self.c.schedule == "ring":
            return sum(around[:-1]), sum(around[1:])
        sent = gradients = 0
        hosts, (host, seat) = r // inner, divmod(place, inner)
        for across in range(hosts):
            there = [self.columns[((host - across) % hosts) * inner + i] for i in range(inner)]
            passing = [there[(seat - step) % inner] for step in range(inner)]
            ring = self.c.schedule == "double_ring"
            sent += sum(passing[:-1]) if ring else (inner - 1) * passing[0]
            sent += passing[0] if across + 1 < hosts else 0
            gradients += sum(passing[1:]) + (passing[0] if across else 0)
        return sent, gradients

    def _sent_by_rsa(self, place: int, around: Sequence[int], *, grads: bool) -> int:
        """Two rings, and in the backward two sums of all keys' gradients over all ranks."""
        passed = 2 * sum(self._rsa_bytes(n) for n in around[:-1])
        if not grads:
            return passed
        whole = self._rsa_bytes(self.shape.key_length) // self.wide_bytes  # cut anywhere
        parts = [self.wide_bytes * n for n in shard_sizes(whole, self.r)]
        return passed + 2 * (sum(parts) - parts[place] + (self.r - 1) * parts[place])

    def _into(self) -> list[Message]:
        """q, k and v from rows of all heads to all rows of some heads."""
        s = self.shape
        unit = s.batch * s.head_dim * s.element_bytes
        return [
            (source, target, unit * (rows * self.query_heads[b] + columns * 2 * self.key_heads[b]))
            for source, target, _, b, rows, columns in self._switches()
        ]

    def _out_of(self) -> list[Message]:
        """The output back, from all rows of some heads to rows of all heads."""
        s = self.shape
        unit = s.batch * s.head_dim * s.element_bytes
        return [
            (target, source, unit * rows * self.query_heads[b])
            for source, target, _, b, rows, _ in self._switches()
        ]

    def _switches(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(rank with rows, rank with heads, their indices among the u, rows, keys)."""
        for place in range(self.r):
            rows = shard_sizes(self.rows[place], self.u)
            columns = shard_sizes(self.columns[place], self.u)
            for a in range(self.u):
                for b in range(self.u):
                    if a != b:
                        ranks = self.rank_of(place, a), self.rank_of(place, b)
                        yield *ranks, a, b, rows[a], columns[a]


def _partners(name: str, places: int, inner: int) -> Iterator[tuple[int, int]]:
    """(from, to) of every transfer between places of one kind."""
    for place in range(places):
        host, seat = divmod(place, inner)
        if name == "all":
            yield place, (place + 1) % places
        elif name == "gather":
            yield from ((place, other) for other in range(places) if other != place)
        elif name == "inside":
            yield place, host * inner + (seat + 1) % inner
        elif name == "inside gather":
            yield from ((place, host * inner + o) for o in range(inner) if o != seat)
        else:
            yield place, (place + inner) % places


def _ring_s(
    steps_s: Sequence[float], hop_s: float, grad_hop_s: float | None, turns: int = 1
) -> float:
    """A ring's steps, each behind the hop of the next block and of the last one's gradient.

    Gradients begin to travel after the second step and end after the last: behind the first step of
    the next turn if there is one.
    """
    total_s, last = 0.0, len(steps_s) - 1
    for step, work_s in enumerate(steps_s):
        moved_s = hop_s if step < last else 0.0
        if grad_hop_s is not None and step > 1:
            moved_s += grad_hop_s
        total_s += turns * max(work_s, moved_s)
    if grad_hop_s is not None and last:
        hidden_s = max(steps_s[0], hop_s + grad_hop_s) - max(steps_s[0], hop_s)
        total_s += (turns - 1) * hidden_s + grad_hop_s
    return total_s


def _turned(messages: Sequence[Message]) -> list[Message]:
    return [(target, source, nbytes) for source, target, nbytes in messages]


def _sent(messages: Sequence[Message], ranks: int) -> list[int]:
    totals = [0] * ranks
    for source, _, nbytes in messages:
        totals[source] += nbytes
    return totals
