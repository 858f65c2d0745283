"""Affine states and their prefix over ranks: what linear attention passes on instead of keys.

Each rank has one affine map of a state, ``S -> decay S + state``. Rank r wants what its
predecessors make of a zero state::

    incoming[r] = sum over j < r of (product over j < i < r of decay[i]) state[j]

The cotangents of ``incoming`` need the same sum from the other end, so the backward is the same
exchange with the ranks reversed. The gradient of a decay is the incoming state, kept from the
forward, times that sum (LASP, Sun et al. 2024, arXiv 2404.02882). Nothing here depends on how many
positions a rank holds; a rank without any has decay 1 and state 0.

Bytes that rank r of P sends for M bytes of states and D of decays (:func:`bytes_sent`)::

    chain       M to the next rank; P - 1 hops, one after the other (LASP)
    all_gather  (M + D)(P - 1 - r): every rank to all that come after it, at once (LASP-2)
    log_scan    M + D in each of ceil(log2 P) rounds (Hillis and Steele 1986)

The backward sends the same from the other end. LASP-2 (arXiv 2502.07563) gathers every state on
every rank; here a state goes only where it is used, so that forward and backward of a rank together
send (M + D)(P - 1).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from hairpin.comm.eager import eager
from hairpin.comm.pending import Pending
from hairpin.errors import LayoutError

Schedule = Literal["chain", "all_gather", "log_scan"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Land = Callable[[], Tensor]


class Places(Protocol):
    """Ranks in a row, as this one sees them: a link of a mesh axis, or some places of one."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Which one this is."""
        ...

    def exchange(
        self, sends: Sequence[Tensor], receives: Sequence[Tensor], *, what: str
    ) -> Callable[[], None]:
        """Start sending and receiving one tensor per place; empty ones do not travel."""
        ...


@eager
def start_prefix(
    state: Tensor,
    decay: Tensor | None,
    places: Places,
    *,
    schedule: Schedule = "all_gather",
    backward: bool = False,
) -> Pending:
    """Start the exchange that gives this rank what its predecessors hand on.

    Differentiable at every order. In the backward pass, too, work between ``wait`` and this call
    hides the transfer. Await several in the order in which they were started.

    Args:
        state: this rank's term, ``[..., d, e]``, of one shape on all ranks.
        decay: what this rank multiplies an earlier state by, in the dtype of ``state`` and of any
            shape that broadcasts to it; None for 1 on all ranks.
        schedule: ``"chain"``, ``"all_gather"`` or ``"log_scan"``.
        backward: the state comes from the ranks after this one, not from those before.

    Returns:
        Pending; ``wait()`` gives ``incoming``, of the shape of ``state``: zero on the first rank.

    Raises:
        LayoutError: an unknown schedule, or a decay that does not fit the state.
    """
    check_schedule(schedule)
    if decay is not None and not _fits(decay, state):
        raise LayoutError(
            f"a decay of shape {tuple(decay.shape)}, {decay.dtype} cannot multiply a state of "
            f"shape {tuple(state.shape)}, {state.dtype}; give it the state's dtype and a shape "
            "that broadcasts to the state's"
        )
    flight = _Flight(places, schedule, backward=backward)
    token = cast(Tensor, _Start.apply(state, decay, flight))
    return Pending(lambda: cast(Tensor, _Finish.apply(token, decay, flight)))


def check_schedule(schedule: str) -> None:
    """Refuse an unknown schedule.

    Raises:
        LayoutError: names the schedules there are.
    """
    if schedule not in SCHEDULES:
        raise LayoutError(f"schedule={schedule!r}: write one of {', '.join(map(repr, SCHEDULES))}")


def bytes_sent(schedule: Schedule, size: int, rank: int, state_bytes: int, decay_bytes: int) -> int:
    """Bytes that place ``rank`` of ``size`` sends in the forward of one prefix.

    In the backward, place ``rank`` sends what place ``size - 1 - rank`` does in the forward.
    """
    behind = size - 1 - rank
    if schedule == "chain":
        return state_bytes if behind else 0
    if schedule == "all_gather":
        return (state_bytes + decay_bytes) * behind
    return (state_bytes + decay_bytes) * sum(step <= behind for step in _steps(size))


def _fits(decay: Tensor, state: Tensor) -> bool:
    if decay.dtype != state.dtype or decay.dim() > state.dim():
        return False
    ends = zip(reversed(decay.shape), reversed(state.shape), strict=False)
    return all(n in (1, m) for n, m in ends)


# -------------------------------------------------------------------------------- differentiation


class _Flight:
    """A prefix under way: how it goes, how it lands, and what its backward hands on."""

    def __init__(self, places: Places, schedule: Schedule, *, backward: bool) -> None:
        self.places, self.schedule, self.backward = places, schedule, backward
        self.land: Land | None = None
        self.reverse: tuple[_Flight, Tensor, Tensor | None] | None = None

    def start(self, state: Tensor, decay: Tensor | None) -> None:
        row = _Row(self.places, backward=self.backward)
        begin = {"chain": _chain, "all_gather": _all_gather, "log_scan": _log_scan}[self.schedule]
        self.land = begin(row, state.contiguous(), decay)

    def reversed(self) -> "_Flight":
        return _Flight(self.places, self.schedule, backward=not self.backward)


class _Start(torch.autograd.Function):
    """Begin a prefix. Gives an empty token that carries the graph to ``_Finish``."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, decay: Tensor | None, flight: _Flight) -> Tensor:
        ctx.flight, ctx.decay_shape = flight, None if decay is None else decay.shape
        flight.start(state, decay)
        return state.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (reverse, incoming, decay), ctx.flight.reverse = ctx.flight.reverse, None
        total = cast(Tensor, _Finish.apply(cotangents[0], decay, reverse))
        grad_decay = None
        if decay is not None and ctx.needs_input_grad[1]:
            grad_decay = (incoming * total).sum_to_size(ctx.decay_shape)
        return total, grad_decay, None


class _Finish(torch.autograd.Function):
    """Await a prefix that ``_Start`` began."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, decay: Tensor | None, flight: _Flight) -> Tensor:
        assert flight.land is not None
        incoming, flight.land = flight.land(), None
        ctx.flight = flight
        ctx.save_for_backward(incoming, decay)
        return incoming

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        incoming, decay = ctx.saved_tensors
        reverse = ctx.flight.reversed()
        ctx.flight.reverse = reverse, incoming, decay
        return cast(Tensor, _Start.apply(cotangents[0], decay, reverse)), None, None


# --------------------------------------------------------------------------------------- schedules


class _Row:
    """Places in the order in which a state visits them: from the first, or from the last."""

    def __init__(self, places: Places, *, backward: bool) -> None:
        self.places, self.is_backward = places, backward
        self.size = places.size
        self.rank = self._turned(places.rank)

    def exchange(
        self, sends: dict[int, Tensor], receives: dict[int, Tensor], *, what: str
    ) -> Callable[[], None]:
        """Start sending to, and receiving from, places counted in the order of the row."""
        if not sends and not receives:
            return lambda: None
        some = next(iter((*sends.values(), *receives.values())))
        empty, order = some.new_empty(0), [self._turned(p) for p in range(self.size)]
        way = "backward" if self.is_backward else "forward"
        return self.places.exchange(
            [sends.get(place, empty) for place in order],
            [receives.get(place, empty) for place in order],
            what=f"{what} of states, {way}",
        )

    def _turned(self, place: int) -> int:
        return self.size - 1 - place if self.is_backward else place


def _chain(row: _Row, state: Tensor, decay: Tensor | None) -> Land:
    """Receive from the rank before; what leaves for the next waits until that is here."""
    incoming = torch.zeros_like(state)
    is_first, is_last = row.rank == 0, row.rank == row.size - 1
    wait_sent: Callable[[], None] | None = None
    if is_first and not is_last:
        wait_sent = row.exchange({1: state}, {}, what="chain")
    wait = row.exchange({}, {} if is_first else {row.rank - 1: incoming}, what="chain")

    def land() -> Tensor:
        wait()
        if wait_sent is not None:
            wait_sent()
        elif not is_last:
            outgoing = _advance(incoming, state, decay)
            row.exchange({row.rank + 1: outgoing}, {}, what="chain")()
        return incoming

    return land


def _all_gather(row: _Row, state: Tensor, decay: Tensor | None) -> Land:
    """Every state, and what decays, to all ranks that come after."""
    sent = _pack(state, decay)
    received = [torch.empty_like(sent) for _ in range(row.rank)]
    later = dict.fromkeys(range(row.rank + 1, row.size), sent)
    wait = row.exchange(later, dict(enumerate(received)), what="gather")

    def land() -> Tensor:
        wait()
        incoming = torch.zeros_like(state)
        for message in received:
            incoming = _advance(incoming, *_unpack(message, state, decay))
        return incoming

    return land


def _log_scan(row: _Row, state: Tensor, decay: Tensor | None) -> Land:
    """Double the ranks that a state covers in each round; only the first is hidden by other work.

    After k rounds ``whole`` covers the 2^k ranks that end with this one, ``incoming`` all of them
    but this one.
    """
    whole, whole_decay = state, decay
    incoming, through = torch.zeros_like(state), None if decay is None else torch.ones_like(decay)

    def begin(step: int) -> tuple[Callable[[], None], Tensor | None]:
        sent = _pack(whole, whole_decay)
        theirs = torch.empty_like(sent) if row.rank >= step else None
        receives = {} if theirs is None else {row.rank - step: theirs}
        sends = {row.rank + step: sent} if row.rank + step < row.size else {}
        return row.exchange(sends, receives, what=f"scan by {step}"), theirs

    steps = _steps(row.size)
    first = begin(steps[0]) if steps else None

    def land() -> Tensor:
        nonlocal whole, whole_decay, incoming, through
        for step in steps:
            wait, received = first if step == 1 and first is not None else begin(step)
            wait()
            if received is None:
                continue
            theirs, their_decay = _unpack(received, state, decay)
            incoming = _advance(theirs, incoming, through)
            whole = _advance(theirs, whole, whole_decay)
            if their_decay is not None and through is not None and whole_decay is not None:
                through, whole_decay = through * their_decay, whole_decay * their_decay
        return incoming

    return land


def _steps(size: int) -> list[int]:
    """1, 2, 4... below ``size``."""
    return [1 << k for k in range((size - 1).bit_length())]


def _advance(before: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    """``decay before + state``."""
    return before + state if decay is None else decay * before + state


def _pack(state: Tensor, decay: Tensor | None) -> Tensor:
    """One message: a small one more would cost a rank as much waiting as a large one."""
    return state if decay is None else torch.cat([state.reshape(-1), decay.reshape(-1)])


def _unpack(message: Tensor, state: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The state and decay in a message of the shapes of these."""
    if decay is None:
        return message.view(state.shape), None
    first, last = message.split([state.numel(), decay.numel()])
    return first.view(state.shape), last.view(decay.shape)
