"""Moving regions of tensors between the ranks of one mesh axis, point to point.

Every transfer is a set of regions, one per peer, known on both sides without asking. Receives are
posted before sends: Gloo serialises the two directions of a pair otherwise. A region that is
contiguous is sent from, or received into, the tensor itself.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.rehearsal import RehearsalMesh
from hairpin.errors import CommError
from hairpin.layout import shard_sizes

Wait = Callable[[], None]


@dataclass(frozen=True)
class Link:
    """One mesh axis as this rank sees it: its process group, its place, its peers."""

    mesh: Mesh
    axis: str

    @property
    def size(self) -> int:
        """Ranks along the axis."""
        return self.mesh.size(self.axis)

    @property
    def rank(self) -> int:
        """This rank's place along the axis."""
        return self.mesh.rank(self.axis)

    def peers(self) -> Sequence[int]:
        """All other places along the axis, each rank starting on another one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def exchange(
        self,
        sends: Sequence[Tensor],
        receives: Sequence[Tensor],
        *,
        what: str,
        control: bool = False,
    ) -> Wait:
        """Start sending ``sends[p]`` to each peer p and filling ``receives[p]`` from it.

        Args:
            sends: one tensor per place on the axis; this rank's own is ignored.
            receives: likewise; the tensors are written, contiguous or not.
            what: words for error messages.
            control: count the bytes as control, not as payload.

        Returns:
            a function that waits until all has arrived and all has left.
        """
        if isinstance(self.mesh, RehearsalMesh):
            rooms = [receives[peer] for peer in self.peers()]
            held = [_landing(x) for x in rooms if x.numel() and not x.is_contiguous()]
            return self._rehearsed(self.mesh, sends, held, what=what, control=control)
        tag = _tag(f"{what} {sends[self.rank].dtype}")
        landings: list[tuple[Tensor, Tensor]] = []
        operations: list[dist.P2POp] = []
        group = self.mesh.group(self.axis)
        assert group is not None
        for peer in reversed(self.peers()):
            if receives[peer].numel():
                buffer = receives[peer]
                if not buffer.is_contiguous():
                    buffer = _landing(buffer)
                    landings.append((receives[peer], buffer))
                operations.append(dist.P2POp(dist.irecv, as_bytes(buffer), None, group, tag, peer))
        for peer in self.peers():
            if sends[peer].numel():
                chunk = as_bytes(sends[peer].contiguous())
                operations.append(dist.P2POp(dist.isend, chunk, None, group, tag, peer))
                self._count(chunk.numel(), control=control)
        self.mesh.traffic.collectives += not control
        sent_bytes = sum(sends[peer].nbytes for peer in self.peers())
        noted = self.mesh.note_transfer(what, self.axis, sent_bytes, control=control)
        works = self._post(operations, what)
        ticket = self.mesh.keep(works, operations)

        def wait() -> None:
            noted.awaited_ns = time.time_ns()
            self._wait(works, what)
            noted.done_ns = time.time_ns()
            ticket.release()
            self.mesh.sweep()
            for region, buffer in landings:
                region.copy_(buffer)

        return wait

    def sum(self, x: Tensor, *, what: str) -> Wait:
        """Start adding contiguous ``x`` over all ranks of the axis, in place, in rank order.

        Sends 2 M (N-1)/N bytes: each rank adds up one part and sends it to all.
        """
        parts = list(x.view(-1).split(shard_sizes(x.numel(), self.size)))
        mine = parts[self.rank]
        terms = [torch.empty_like(mine) for _ in parts]
        terms[self.rank].copy_(mine)
        wait = self.exchange(parts, terms, what=what)

        def finish() -> None:
            wait()
            mine.copy_(terms[0])
            for term in terms[1:]:
                mine.add_(term)
            self.exchange([mine] * self.size, parts, what=f"{what}, second half")()

        return finish

    def _rehearsed(
        self,
        mesh: RehearsalMesh,
        sends: Sequence[Tensor],
        held: list[Tensor],
        *,
        what: str,
        control: bool,
    ) -> Wait:
        """Count what would be sent, and hold what would be held meanwhile."""
        parts = [sends[peer].contiguous() for peer in self.peers() if sends[peer].numel()]
        sizes = [part.nbytes for part in parts]
        for size in sizes:
            self._count(size, control=control)
        mesh.traffic.collectives += not control
        awaited = mesh.note(what, sizes)

        def wait() -> None:
            parts.clear()
            held.clear()
            awaited()

        return wait

    def _count(self, sent_bytes: int, *, control: bool) -> None:
        traffic = self.mesh.traffic
        if control:
            traffic.control_bytes += sent_bytes
        else:
            traffic.bytes_sent += sent_bytes
            traffic.messages += 1

    def _post(self, operations: list[dist.P2POp], what: str) -> list[dist.Work]:
        if not operations:
            return []
        try:
            return dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._failure(what, error) from error

    def _wait(self, works: Sequence[dist.Work], what: str) -> None:
        deadline = timedelta(seconds=self.mesh.timeout_s)
        try:
            for work in works:
                work.wait(deadline)
        except RuntimeError as error:
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: RuntimeError) -> CommError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CommError(
            f"rank {self.rank} of {self.size} on mesh axis {self.axis!r}: {what} failed: a peer is "
            f"gone, did not answer within {self.mesh.timeout_s:g} s, or moved other sizes "
            f"({reason}). Look for the first error in the other ranks' output; if ranks are "
            "only slow, raise timeout_s in init_mesh"
        )


def _landing(x: Tensor) -> Tensor:
    """Where something arrives that does not lie in one run."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tag(what: str) -> int:
    """A message tag for one kind of transfer, so that ranks about to do different ones never meet.

    Gloo takes a message of another length without complaint, or aborts the process.
    """
    return zlib.crc32(what.encode()) & 0x7FFFFFFF


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor of any dtype as bytes, so that any back end carries it unchanged."""
    return x.view(-1).view(torch.uint8)
