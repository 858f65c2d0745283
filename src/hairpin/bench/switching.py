"""The switch itself: bytes on the wire, the transport against the built-in, overlap, DTensor."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from hairpin.bench.measure import Sample, Step, combine, interleave, join, machine
from hairpin.bench.network import Wire, open_network
from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.comm.verbs import switch
from hairpin.layout import Layout, shard_sizes
from hairpin.run.launch import launch
from hairpin.units import parse_rate

SHAPES = ((16, 64), (17, 65), (1, 64), (5, 1))
_WARM_UP_ROUNDS = 2
_ELEMENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        rate: of every rank's link.
        whole_bytes: about the size of the tensor that is switched, all ranks together.
        shapes: lengths of the two dims, before and after the split turns.
        rounds: samples of each.
    """

    ranks: int = 4
    rate: str = "200mbit"
    whole_bytes: int = 32 * 10**6
    shapes: Sequence[tuple[int, int]] = SHAPES
    rounds: int = 7


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every part. Gives plain data; ``say`` is told what goes on.

    Raises:
        UnitError: a rate that cannot be read.
    """
    rate_bits_per_s, described = parse_rate(settings.rate), machine()
    with open_network(settings.ranks, rate_bits_per_s=rate_bits_per_s) as wire:
        note = wire.note
        say(note)
        say(f"switches of {', '.join(f'{t} x {s}' for t, s in settings.shapes)} at {settings.rate}")
        ranks = launch(_run_rank, settings.ranks, wire, settings)
    by_shape = [
        _bytes_summary(t, s, settings, [rank["shapes"][t, s] for rank in ranks])
        for t, s in settings.shapes
    ]
    return {
        "benchmark": "switch",
        "machine": described,
        "wire": note,
        "settings": asdict(settings),
        "shapes": by_shape,
        "peers": _peer_summary([rank["peers"] for rank in ranks]),
        "overlap": _overlap_summary([rank["overlap"] for rank in ranks]),
    }


def crossing_bytes(t: int, s: int, rest_bytes: int, ranks: int) -> list[int]:
    """Bytes each rank sends when the split turns from ``t`` to ``s``.

    Rank i sends ``len_t(i) len_s(j)`` times the rest to every other rank j.
    """
    before, after = shard_sizes(t, ranks), shard_sizes(s, ranks)
    return [mine * (s - kept) * rest_bytes for mine, kept in zip(before, after, strict=True)]


def _run_rank(wire: Wire, settings: Settings) -> dict[str, Any]:
    mesh = join(wire)
    shapes: dict[tuple[int, int], list[Sample]] = {}
    for t, s in settings.shapes:
        steps = {"switch": _switch_step(*_layouts(t, s, settings), mesh)}
        interleave(steps, mesh, wire, rounds=_WARM_UP_ROUNDS)
        shapes[t, s] = interleave(steps, mesh, wire, rounds=settings.rounds)["switch"]
    steps = _peer_steps(settings, mesh)
    interleave(steps, mesh, wire, rounds=_WARM_UP_ROUNDS)
    peers = interleave(steps, mesh, wire, rounds=settings.rounds)
    return {"shapes": shapes, "peers": peers, "overlap": _run_overlap(settings, mesh, wire)}


# ------------------------------------------------------------------------------- bytes on the wire


def _channels(t: int, s: int, settings: Settings) -> int:
    """Channels that make the tensor about ``whole_bytes``; a multiple of the number of ranks."""
    per_item = settings.ranks * _ELEMENT_BYTES
    return settings.ranks * max(1, round(settings.whole_bytes / (t * s * per_item)))


def _layouts(t: int, s: int, settings: Settings) -> tuple[Layout, Layout]:
    before = Layout("t/sp s c", t=t, s=s, c=_channels(t, s, settings))
    return before, before.split("s", "sp")


def _even_layouts(settings: Settings) -> tuple[Layout, Layout]:
    """Equal shards, the only kind that torch's one-call all-to-all takes without lists of sizes."""
    return _layouts(4 * settings.ranks, 16 * settings.ranks, settings)


def _switch_step(before: Layout, after: Layout, mesh: Mesh) -> Step:
    x = torch.randn(before.local_shape(mesh))

    def step() -> None:
        switch(x, before, after, mesh)

    return step


def _bytes_summary(
    t: int, s: int, settings: Settings, ranks: Sequence[Sequence[Sample]]
) -> dict[str, Any]:
    figures = combine(ranks)
    rest_bytes = _channels(t, s, settings) * _ELEMENT_BYTES
    expected = crossing_bytes(t, s, rest_bytes, settings.ranks)
    padded_t, padded_s = (math.ceil(n / settings.ranks) * settings.ranks for n in (t, s))
    padded = crossing_bytes(padded_t, padded_s, rest_bytes, settings.ranks)
    on_wire = figures.wire_bytes
    return {
        "t": t,
        "s": s,
        "rest_bytes": rest_bytes,
        "expected_bytes": expected,
        **asdict(figures),
        "wire_over_expected": None if on_wire is None else sum(on_wire) / sum(expected),
        "padded_over_expected": sum(padded) / sum(expected),
    }


# --------------------------------------------------------------------------------- against peers


def _peer_steps(settings: Settings, mesh: Mesh) -> dict[str, Step]:
    """Our switch, our transport alone, torch's all-to-all alone, and DTensor: the same turn."""
    from torch.distributed.tensor import DTensor, Shard

    before, after = _even_layouts(settings)
    x = torch.randn(before.local_shape(mesh))
    ranks, link = mesh.size("sp"), Link(mesh, "sp")
    sends = list(x.view(ranks, -1).unbind())
    out = torch.empty_like(x)
    receives = list(out.view(ranks, -1).unbind())
    dtensor = DTensor.from_local(x, mesh.device_mesh, [Shard(0)])

    def receive_first() -> None:
        link.exchange(sends, receives, what="all-to-all")()

    def built_in() -> None:
        dist.all_to_all_single(out, x, group=mesh.group("sp"))

    def redistribute() -> None:
        local = dtensor.redistribute(placements=[Shard(1)]).to_local()
        local.view(-1)[:1].item()  # awaits a transfer that may still be under way

    return {
        "switch": _switch_step(before, after, mesh),
        "receive_first": receive_first,
        "all_to_all_single": built_in,
        "dtensor": redistribute,
    }


def _peer_summary(ranks: Sequence[Mapping[str, list[Sample]]]) -> dict[str, Any]:
    figures = {name: combine([rank[name] for rank in ranks]) for name in ranks[0]}
    return {
        "figures": {name: asdict(f) for name, f in figures.items()},
        "all_to_all_single_over_receive_first": figures["all_to_all_single"].time_s
        / figures["receive_first"].time_s,
        "dtensor_over_switch": figures["dtensor"].time_s / figures["switch"].time_s,
    }


# -------------------------------------------------------------------------------------- overlap


def _run_overlap(settings: Settings, mesh: Mesh, wire: Wire) -> dict[str, list[Sample]]:
    """A switch, independent work of about the same length, and both at once."""
    before, after = _even_layouts(settings)
    x = torch.randn(before.local_shape(mesh))
    transfer = _switch_step(before, after, mesh)
    work = _products(_calibrate(transfer, mesh, wire))

    def both() -> None:
        pending = switch(x, before, after, mesh, wait=False)
        work()
        pending.wait()

    steps = {"transfer": transfer, "work": work, "both": both}
    interleave(steps, mesh, wire, rounds=_WARM_UP_ROUNDS)
    return interleave(steps, mesh, wire, rounds=settings.rounds)


def _products(count: int) -> Step:
    """Work: ``count`` products of small matrices."""
    a = torch.randn(256, 256)
    out = torch.empty_like(a)

    def step() -> None:
        for _ in range(count):
            torch.mm(a, a, out=out)

    return step


def _calibrate(transfer: Step, mesh: Mesh, wire: Wire) -> int:
    """How many products last as long as one ``transfer``; equal on all ranks."""
    trial = 200
    samples = interleave({"transfer": transfer, "work": _products(trial)}, mesh, wire, rounds=3)
    slowest = torch.tensor([median(s.time_s for s in samples[name]) for name in samples])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return max(1, round(trial * float(slowest[0] / slowest[1])))


def _overlap_summary(ranks: Sequence[Mapping[str, list[Sample]]]) -> dict[str, Any]:
    times_s = {name: combine([rank[name] for rank in ranks]).time_s for name in ranks[0]}
    return {
        "times_s": times_s,
        "hidden": hidden_fraction(times_s["transfer"], times_s["work"], times_s["both"]),
    }


def hidden_fraction(transfer_s: float, work_s: float, both_s: float) -> float:
    """Of the time that could be hidden, the shorter of the two, how much was."""
    return (transfer_s + work_s - both_s) / min(transfer_s, work_s)
