"""Blocks of keys and values on their way past all ranks, and their gradients on the way back.

Nothing is held longer than needed: a block that has been used is released when the next one has
arrived, and a rank's term of a gradient is added to what arrives of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hairpin.exchange.call import Call, Level
from hairpin.exchange.places import Places
from hairpin.exchange.port import wide
from hairpin.exchange.sums import Sum
from hairpin.exchange.turns import Turn

Use = Callable[[int, Tensor], None]
Landing = Callable[[], Tensor]


@dataclass(frozen=True)
class Shapes:
    """Keys and values of one place as one flat buffer, and back."""

    batch: int
    groups: int
    d: int
    e: int
    lengths: dict[int, int]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, call: Call) -> "Shapes":
        """Of keys ``[b, g, ., d]`` and values ``[b, g, ., e]``."""
        lengths = {owner: len(positions) for owner, positions in call.keys.items()}
        return cls(k.shape[0], k.shape[1], k.shape[3], v.shape[3], lengths)

    def packed(self, turn: Turn) -> Tensor:
        """This rank's own block."""
        k, v = turn.operands.k, turn.operands.v
        packed = self.room(k, turn.call.own)
        for into, x in zip(self.unpacked(packed, turn.call.own), (k, v), strict=True):
            for at, held in turn.strips:
                into[:, :, at] = x[:, :, held]
        return packed

    def room(self, like: Tensor, owner: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty buffer for ``owner``'s block."""
        rows = self.batch * self.groups * self.lengths[owner]
        return like.new_empty(rows * (self.d + self.e), dtype=dtype)

    def unpacked(self, packed: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, views."""
        rows = (self.batch, self.groups, self.lengths[owner])
        k, v = packed.split([rows[0] * rows[1] * rows[2] * n for n in (self.d, self.e)])
        return k.view(*rows, self.d), v.view(*rows, self.e)


def visit(levels: Sequence[Level], own: int, block: Tensor, shapes: Shapes, use: Use) -> None:
    """Use every place's block, this rank's first; each is sent on while it is used."""
    if not levels:
        use(own, block)
        return
    level, rest = levels[0], levels[1:]
    if level.kind == "gather":
        for owner, room in _gathered(level.places, own, block, shapes):
            visit(rest, owner, room, shapes, use)
        return
    for owner, following in _steps(level.places, own):
        coming = _next(level.places, block, following, shapes)
        visit(rest, owner, block, shapes, use)
        if coming is not None:
            block = coming()


@dataclass
class Walk:
    """A backward's way through the levels of a schedule.

    Attributes:
        term: gives a block's gradient by this rank alone, from its owner and its keys.
        fetched: other places' blocks where the forward has gathered them, in places' order.
        late: what is still to arrive of a walk before this one.
    """

    shapes: Shapes
    term: Callable[[int, Tensor], Sum]
    fetched: Sequence[Tensor] = ()
    late: list[Callable[[], None]] = field(default_factory=list)

    def gradient(self, levels: Sequence[Level], own: int, block: Tensor) -> Sum:
        """The sum of all ranks' terms of the block that this rank started with."""
        if not levels:
            return self.term(own, block)
        if levels[0].kind == "gather":
            return self._gathered(levels, own, block)
        total, finish = self._around(levels, own, block)
        finish()
        return total

    def begin(self, levels: Sequence[Level], own: int, pack: Callable[[], Tensor]) -> None:
        """Add up ``own``'s gradient, but leave what a ring brings home last in ``late``.

        Args:
            pack: makes the block to start with, which is held no longer than others.
        """
        if levels[0].kind == "gather":
            self.gradient(levels, own, pack())
        else:
            self.late.append(self._around(levels, own, pack())[1])

    def _around(
        self, levels: Sequence[Level], own: int, block: Tensor
    ) -> tuple[Sum, Callable[[], None]]:
        """The sum without what comes home last, and what adds that."""
        places, shapes = levels[0].places, self.shapes
        total: Sum | None = None
        arriving: Landing | None = None
        for owner, following in _steps(places, own):
            coming = _next(places, block, following, shapes)
            mine = self.gradient(levels[1:], owner, block)
            if total is None:
                total = mine
                settle(self.late)
            else:
                sent = self._joined(mine, arriving, owner, block)
                del mine, arriving  # and what was sent before: room for what comes now
                room = shapes.room(sent, own if following is None else following)
                arriving = _passed(places, sent, room, what="gradients of keys pass on")
                del sent, room
            if coming is not None:
                block = coming()
        assert total is not None
        return total, partial(self._come_home, total, own, arriving)

    def _come_home(self, total: Sum, own: int, arriving: Landing | None) -> None:
        if arriving is not None:
            total.add(total.whole, self.shapes.unpacked(arriving(), own))

    def _joined(self, mine: Sum, arriving: Landing | None, owner: int, like: Tensor) -> Tensor:
        """This rank's term and what has arrived of the others', packed."""
        if arriving is not None:
            packed = arriving()
            mine.add_onto(self.shapes.unpacked(packed, owner))
            return packed
        packed = self.shapes.room(like, owner, wide(like.dtype))
        mine.put_into(self.shapes.unpacked(packed, owner))
        return packed

    def _gathered(self, levels: Sequence[Level], own: int, block: Tensor) -> Sum:
        places, shapes = levels[0].places, self.shapes
        owners = _around(places, own)
        blocks = _gathered(places, own, block, shapes)
        if self.fetched:
            others = [owner for owner in owners if owner != own]
            blocks = iter([(own, block), *zip(others, self.fetched, strict=True)])
        nothing = block.new_empty(0, dtype=wide(block.dtype))
        sends, total = dict.fromkeys(owners, nothing), None
        for owner, room in blocks:
            mine = self.gradient(levels[1:], owner, room)
            if total is None:
                total = mine
            else:
                sends[owner] = self._joined(mine, None, owner, room)
            del mine
        rooms = [nothing if o == own else shapes.room(nothing, own) for o in owners]
        places.exchange(list(sends.values()), rooms, what="gradients of gathered keys")()
        assert total is not None
        for room in (room for o, room in zip(owners, rooms, strict=True) if o != own):
            total.add(total.whole, shapes.unpacked(room, own))
        return total


def settle(late: list[Callable[[], None]]) -> None:
    """Wait for what is late, and let go of it."""
    while late:
        late.pop()()


def _next(places: Places, block: Tensor, following: int | None, shapes: Shapes) -> Landing | None:
    """Start passing a block on and taking in the following one."""
    if following is None:
        return None
    return _passed(places, block, shapes.room(block, following), what="keys pass on")


def _passed(places: Places, x: Tensor, room: Tensor, *, what: str) -> Landing:
    wait = places.shift(x, room, what=what)

    def landed() -> Tensor:
        wait()
        return room

    return landed


def _gathered(
    places: Places, own: int, block: Tensor, shapes: Shapes
) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of all members, this rank's first, behind whose use the others arrive."""
    owners = _around(places, own)
    rooms = [block if owner == own else shapes.room(block, owner) for owner in owners]
    wait = places.exchange([block] * places.size, rooms, what="all keys are gathered")
    yield own, block
    wait()
    yield from ((owner, room) for owner, room in zip(owners, rooms, strict=True) if owner != own)


def _around(places: Places, own: int) -> list[int]:
    """Of each member, the place whose block it holds while this rank holds that of ``own``.

    Places of one level lie at equal distances, and a level outside it moves all of them alike.
    """
    here = places.members[places.rank]
    return [(own + member - here) % places.link.size for member in places.members]


def _steps(places: Places, own: int) -> Iterator[tuple[int, int | None]]:
    """(owner of the block in use, of the one after it) backwards round the ring, own first."""
    around = _around(places, own)
    owners = [around[(places.rank - step) % places.size] for step in range(places.size)]
    return zip(owners, [*owners[1:], None], strict=True)
