"""Some of the places along a mesh axis, as a smaller axis of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hairpin.comm.transport import Link, Wait


@dataclass(frozen=True)
class Places:
    """Places ``members`` of a link, this rank among them. Makes no process group.

    Attributes:
        link: the whole axis.
        members: indices along the axis, in the order of this smaller axis.
    """

    link: Link
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many places."""
        return len(self.members)

    @property
    def rank(self) -> int:
        """This rank's index among the members."""
        return self.members.index(self.link.rank)

    def exchange(self, sends: Sequence[Tensor], receives: Sequence[Tensor], *, what: str) -> Wait:
        """Start sending ``sends[i]`` to member i and filling ``receives[i]`` from it."""
        nothing = sends[0].new_empty(0)
        all_sends, all_receives = [nothing] * self.link.size, [nothing] * self.link.size
        for member, send, receive in zip(self.members, sends, receives, strict=True):
            all_sends[member], all_receives[member] = send, receive
        return self.link.exchange(all_sends, all_receives, what=what)

    def shift(self, x: Tensor, into: Tensor, *, what: str) -> Wait:
        """Start sending ``x`` to the next member and filling ``into`` from the one before."""
        nothing = x.new_empty(0)
        sends, receives = [nothing] * self.size, [nothing] * self.size
        sends[(self.rank + 1) % self.size] = x
        receives[(self.rank - 1) % self.size] = into
        return self.exchange(sends, receives, what=what)
