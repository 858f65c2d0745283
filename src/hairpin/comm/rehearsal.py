"""A mesh on which transfers are counted and not made: one process plays any rank of any number.

On fake tensors the code of a split then runs as it would on that rank: what it sends, holds and
computes can be read off, with no rank and no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from hairpin.comm.mesh import Mesh, Traffic
from hairpin.errors import MeshError


@dataclass(frozen=True)
class Work:
    """Work done so far: operations of matrix products, and bytes that all kernels touch."""

    flops: float = 0.0
    touched_bytes: float = 0.0


@dataclass(frozen=True)
class Sent:
    """One exchange of a rehearsal.

    Attributes:
        what: words for what is moved.
        nbytes: that the played rank sends.
        messages: to single peers.
        started: work done when it was started.
        awaited: work done when its result was needed; None if it never was.
    """

    what: str
    nbytes: int
    messages: int
    started: Work
    awaited: Work | None = None


class RehearsalMesh(Mesh):
    """One rank of a mesh, played: ``RehearsalMesh(3, dp=2, sp=4)`` is its fourth rank.

    Attributes:
        sent: every exchange so far.
        work: says how much has been computed; nothing, unless somebody counts.

    Raises:
        MeshError: there is no such rank.
    """

    def __init__(self, played: int = 0, **degrees: int) -> None:
        super().__init__(**degrees)
        if not 0 <= played < self.world:
            raise MeshError(f"{self} has no rank {played}; play one of 0 to {self.world - 1}")
        self.played = played
        self.sent: list[Sent] = []
        self.work: Callable[[], Work] = Work
        self._counted = Traffic()

    @property
    def is_rehearsal(self) -> bool:
        """Nothing is really moved."""
        return True

    @property
    def is_live(self) -> bool:
        """A rehearsal counts as live: everything on it can be called."""
        return True

    @property
    def global_rank(self) -> int:
        """The rank that is played."""
        return self.played

    @property
    def traffic(self) -> Traffic:
        """What the played rank would have sent."""
        return self._counted

    def rank(self, axis: str) -> int:
        """The played rank's place along ``axis``."""
        degrees = [self.size(name) for name in self.axes]
        stride = prod(degrees[self.axes.index(axis) + 1 :])
        return self.played // stride % self.size(axis)

    def group(self, axis: str) -> None:
        """There is no process group."""
        self.size(axis)

    def note(self, what: str, sizes: list[int]) -> Callable[[], None]:
        """Note an exchange that is started; call the result where it is awaited."""
        index = len(self.sent)
        self.sent.append(Sent(what, sum(sizes), len(sizes), self.work()))

        def awaited() -> None:
            self.sent[index] = replace(self.sent[index], awaited=self.work())

        return awaited
