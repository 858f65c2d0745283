"""What one rank sends, holds and computes in one block of a split stack, and how long it takes.

Nothing is derived by hand: the block runs on fake tensors as the rank would run it, on a mesh that
counts. Transfers are then laid out in time against the work that runs between their start and the
point that needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hairpin.comm.rehearsal import RehearsalMesh, Sent
from hairpin.comm.rehearsal import Work as Done
from hairpin.comm.topology import Tier, Topology
from hairpin.graph.meter import measure
from hairpin.graph.work import WorkMeter

_PROBE_BYTES = 1 << 24


@dataclass(frozen=True)
class Speeds:
    """What the ranks of an axis compute and send with.

    Attributes:
        flops_per_s: of matrix products.
        touched_per_s: bytes that kernels read and write.
        next_to_next: an exchange in which every rank sends to the next one.
        all_to_all: an exchange in which every rank sends to every other.
    """

    flops_per_s: float
    touched_per_s: float
    next_to_next: Tier
    all_to_all: Tier

    @classmethod
    def of(cls, topology: Topology) -> "Speeds":
        """Those of a topology; what its links share is shared out."""
        n = topology.ranks
        computes = topology.forward.flops_per_s, topology.copy_bytes_per_s
        if n == 1:
            return cls(*computes, topology.inner, topology.inner)
        ring = [(rank, (rank + 1) % n, _PROBE_BYTES) for rank in range(n)]
        pairs = [(p, q, _PROBE_BYTES) for p in range(n) for q in range(n) if p != q]
        latency_s = max(topology.inner.latency_s, topology.outer.latency_s * (topology.hosts > 1))
        tiers = (
            Tier(latency_s, len(some) * _PROBE_BYTES / n / max(topology.transfer_s(some), 1e-30))
            for some in (ring, pairs)
        )
        return cls(*computes, *tiers)

    def work_s(self, done: Done) -> float:
        """Seconds that so much work takes."""
        return done.flops / self.flops_per_s + done.touched_bytes / self.touched_per_s

    def transfer_s(self, sent: Sent) -> float:
        """Seconds that an exchange takes on free links."""
        link = self.next_to_next if sent.messages == 1 else self.all_to_all
        return link.time_s(sent.nbytes, min(sent.messages, 1))


@dataclass(frozen=True)
class Rehearsed:
    """One rank's part of a run.

    Attributes:
        sent: its exchanges, in order.
        peak_bytes: most that is alive at once beyond inputs and parameters.
        done: all its work.
    """

    sent: tuple[Sent, ...]
    peak_bytes: int
    done: Done

    @property
    def sent_bytes(self) -> int:
        """Payload that the rank sends."""
        return sum(sent.nbytes for sent in self.sent)


@dataclass(frozen=True)
class Predicted:
    """A run laid out in time.

    Attributes:
        time_s: with transfers behind work.
        compute_s: of the work alone.
        takes_s: of each exchange, in their order, on free links.
        exposed_s: waited for each exchange.
        hideable_s: of each exchange, what the work behind it could have hidden.
    """

    time_s: float
    compute_s: float
    takes_s: tuple[float, ...]
    exposed_s: tuple[float, ...]
    hideable_s: tuple[float, ...]


def rehearse(
    module: nn.Module,
    args: Sequence[Tensor],
    mesh: RehearsalMesh,
    *,
    backward: bool = False,
    device: torch.device | None = None,
) -> Rehearsed:
    """Run a module whose forward is split over a rehearsal's mesh, and read off what it takes.

    Args:
        args: the played rank's parts, of the meta device, say; those that want gradients say so.
        backward: run a backward as well.
        device: whose kernels' scratch memory is counted; a CPU if left out.
    """
    meter = WorkMeter()
    mesh.work = lambda: Done(meter.flops, meter.touched_bytes)
    first = len(mesh.sent)
    device = torch.device("cpu") if device is None else device
    run = _ForwardAndBackward(module) if backward else module
    timeline = measure(run, args, device=device, meter=meter)
    return Rehearsed(tuple(mesh.sent[first:]), timeline.peak_bytes, mesh.work())


class _ForwardAndBackward(nn.Module):
    """Both in one call: parts that are computed again in the backward need the parameters, too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Any:
        with torch.enable_grad():
            outputs = self.module(*(x.detach().requires_grad_(x.requires_grad) for x in args))
            total = sum(x.sum() for x in tree_leaves(outputs) if isinstance(x, Tensor))
            total.backward()  # type: ignore[union-attr]
        return outputs


def predict(run: Rehearsed, speeds: Speeds) -> Predicted:
    """Lay out a rank's run in time: one transfer after another on its link, each behind work.

    An exchange begins when it is started and the link is free. Where its result is needed before it
    has come, the rank waits.
    """
    takes_s = [speeds.transfer_s(sent) for sent in run.sent]
    arrives_s, exposed_s, hideable_s = ([0.0] * len(run.sent) for _ in range(3))
    waited_s = free_s = 0.0
    for computed_s, index, is_wait in _moments(run, speeds):
        now_s = computed_s + waited_s
        if not is_wait:
            free_s = arrives_s[index] = max(free_s, now_s) + takes_s[index]
            continue
        behind_s = computed_s - speeds.work_s(run.sent[index].started)
        hideable_s[index] = min(takes_s[index], behind_s)
        exposed_s[index] = max(0.0, arrives_s[index] - now_s)
        waited_s += exposed_s[index]
    compute_s = speeds.work_s(run.done)
    return Predicted(
        compute_s + waited_s, compute_s, tuple(takes_s), tuple(exposed_s), tuple(hideable_s)
    )


def most_hidden_s(run: Rehearsed, speeds: Speeds) -> float:
    """The most of all transfers that work can hide, by any order of them on the rank's one link.

    Of the transfers under way the link serves first the one that is needed first, which loses
    least.
    """
    left_s: dict[int, float] = {}
    needed_at_s = {index: at_s for at_s, index, is_wait in _moments(run, speeds) if is_wait}
    hidden_s = before_s = 0.0
    for at_s, index, is_wait in _moments(run, speeds):
        time_s = at_s - before_s
        for other in sorted(left_s, key=lambda other: needed_at_s[other]):
            served_s = min(time_s, left_s[other])
            left_s[other] -= served_s
            time_s -= served_s
            hidden_s += served_s
        before_s = at_s
        if is_wait:
            del left_s[index]
        else:
            left_s[index] = speeds.transfer_s(run.sent[index])
    return hidden_s


def _moments(run: Rehearsed, speeds: Speeds) -> list[tuple[float, int, bool]]:
    """(seconds of work before it, exchange, whether it is awaited there), in order."""
    found = []
    for index, sent in enumerate(run.sent):
        found.append((speeds.work_s(sent.started), index, False))
        awaited = run.done if sent.awaited is None else sent.awaited
        found.append((speeds.work_s(awaited), index, True))
    return sorted(found)
