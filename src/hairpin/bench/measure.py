"""Ranks on a wire: joining them, and timing and counting what they do, aligned by barriers."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import hairpin
from hairpin.bench.network import Wire
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.run.device import usable_cores

TIMEOUT_S = 120.0

Step = Callable[[], None]


def join(wire: Wire) -> Mesh:
    """Called by a launched rank: go to its end of the wire and join the others on axis ``sp``.

    The ranks meet through a store that they reach over the machine's own loopback, before they
    leave it, so that meeting costs no bytes on the wire.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    wire.enter(rank)
    if world > 1:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    return init_mesh(timeout_s=TIMEOUT_S, device_type="cpu", sp=world)


@dataclass(frozen=True)
class Sample:
    """One step on one rank. ``wire_bytes`` is None where no interface counts this rank alone."""

    time_s: float
    payload_bytes: int
    wire_bytes: int | None


def sample(step: Step, mesh: Mesh, wire: Wire) -> Sample:
    """Run a step that all ranks begin together; count until all have ended it."""
    _barrier(mesh)
    traffic, on_wire = mesh.traffic.snapshot(), wire.bytes_sent()
    start_s = time.perf_counter()
    step()
    time_s = time.perf_counter() - start_s
    _barrier(mesh)
    after = wire.bytes_sent()
    wire_bytes = None if on_wire is None or after is None else after - on_wire
    return Sample(time_s, mesh.traffic.since(traffic).bytes_sent, wire_bytes)


def interleave(
    steps: Mapping[str, Step], mesh: Mesh, wire: Wire, *, rounds: int
) -> dict[str, list[Sample]]:
    """``rounds`` samples of every step in turn, so that drift of the machine hits all alike.

    Each round begins with another step, so that none always follows the same one.
    """
    names = list(steps)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(sample(steps[name], mesh, wire))
    return samples


@dataclass(frozen=True)
class Figures:
    """One step over all ranks and rounds.

    Attributes:
        time_s: median over rounds of the slowest rank's time.
        times_s: the slowest rank's time, by round.
        payload_bytes: sent per step, by rank, as the program counts it.
        wire_bytes: median over rounds of bytes on the wire per step, headers and acknowledgements
            included, by rank; None where no interface counts them.
    """

    time_s: float
    times_s: list[float]
    payload_bytes: list[int]
    wire_bytes: list[float] | None


def combine(ranks: Sequence[Sequence[Sample]]) -> Figures:
    """Figures of one step from the samples of all ranks."""
    times_s = [max(s.time_s for s in turn) for turn in zip(*ranks, strict=True)]
    on_wire = [[s.wire_bytes for s in samples if s.wire_bytes is not None] for samples in ranks]
    return Figures(
        time_s=median(times_s),
        times_s=times_s,
        payload_bytes=[samples[0].payload_bytes for samples in ranks],
        wire_bytes=[median(counts) for counts in on_wire] if all(on_wire) else None,
    )


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine; call it before measuring, for the load."""
    return {
        "hairpin": hairpin.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": usable_cores(),
        "load_before": os.getloadavg()[0],
    }


def foreign_load() -> str | None:
    """A warning where other programs keep the machine busy; None where it is quiet."""
    load, cores = os.getloadavg()[0], usable_cores()
    if load < cores / 2:
        return None
    return (
        f"the machine is busy (load {load:.1f} on {cores} cores): bytes are exact all the same, "
        "times are noise"
    )


def _barrier(mesh: Mesh) -> None:
    if mesh.world > 1:
        dist.barrier()
