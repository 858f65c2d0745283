"""Axial parallelism of one Evoformer block: bytes, memory and time, against its plan and peers.

A block of AlphaFold's widths runs forward and backward on every rank, in all of our manners, by
FastFold's order and by tensor parallelism. Kernels are played (:mod:`hairpin.bench.played`):
with fewer cores than ranks, real work would delay the transfers that it should hide. The speed of
the device is chosen so that the way that sends least computes as long as it transfers.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from hairpin.bench.axial_counted import HEADS, all_methods, memory, published_bytes
from hairpin.bench.axial_peers import Adder
from hairpin.bench.axial_scaling import predict_published
from hairpin.bench.axial_ways import (
    AXIS,
    Links,
    Method,
    Rehearsal,
    Size,
    Trial,
    build_block,
    fastfold,
    linked,
    ours,
    rehearsed,
    tensor_parallel,
    triangles,
)
from hairpin.bench.measure import Sample, combine, join, machine, sample
from hairpin.bench.network import Wire, open_network, why_not
from hairpin.bench.played import PlayedDevice
from hairpin.comm.mesh import Mesh
from hairpin.comm.topology import Tier
from hairpin.planning.axial.choose import Manner
from hairpin.planning.axial.cost import Rehearsed, Speeds, most_hidden_s, predict
from hairpin.run.launch import launch, warm
from hairpin.run.profile import peak_cpu_bytes
from hairpin.units import parse_rate

PARTS = ("bytes", "memory", "time", "triangles", "scaling")
_DIRECTIONS = ("forward", "backward")
_TIMED = (
    Manner("gather"),
    Manner("ring"),
    Manner("channels"),
    Manner("ring", "ring"),
    Manner("channels", "ring"),
    Manner("ring", "gather", 4),
    Manner("channels", "gather", 4),
)
_TRIANGLES = (Manner("gather"), Manner("ring"), Manner("channels"), Manner("channels", pieces=4))
_LIVE_PEAKS = (Manner("gather"), Manner("ring", "ring"), Manner("channels", "ring"))

Samples = dict[str, dict[str, list[Sample]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        parts: names in ``PARTS``.
        ranks: of timed runs and measured memory.
        counted: numbers of ranks whose bytes are counted on the wire.
        rate: of each rank's link in timed runs.
        rehearsed: sizes whose memory is counted, each with numbers of ranks.
        flops_per_byte: of the device that is played: how many operations of matrix products it
            does in the time of touching a byte. The default is an A100's in float32.
        timed: manners whose blocks are timed and whose bytes are counted on the wire.
        published: path of the published figures, for ``scaling``.
    """

    parts: Sequence[str] = PARTS
    ranks: int = 4
    counted: Sequence[int] = (2, 4)
    rate: str = "200mbit"
    size: Size = field(default_factory=Size)
    rehearsed: Sequence[tuple[Size, Sequence[int]]] = (
        (Size(), (2, 4, 8, 16)),
        (Size(512, 2048), (64, 512)),
    )
    rounds: int = 3
    flops_per_byte: float = 12.5
    timed: Sequence[Manner] = _TIMED
    published: str = "../shared/data/published_results.csv"


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what was asked for. Gives plain data; ``say`` is told what goes on.

    Where no network can be emulated, ranks run over the loopback, whose rate is not limited and
    whose bytes are not counted; ``say`` and the result's ``"wire"`` tell so.

    Raises:
        UnitError: a rate that cannot be read.
    """
    result: dict[str, Any] = {
        "benchmark": "axial",
        "machine": machine(),
        "settings": asdict(settings),
    }
    rate = parse_rate(settings.rate)
    warm()
    with open_network(1) as wire:
        result["wire"] = wire.note
        say(wire.note)
    # Rehearsals have backwards, after which a process cannot be forked: they get one of their own.
    if "bytes" in settings.parts:
        result["bytes"] = [_bytes(settings, degree, say) for degree in settings.counted]
    if "memory" in settings.parts:
        result["memory"] = launch(memory, 1, settings.rehearsed, all_methods(), say=say)[0]
        result["memory_measured"] = _memory_measured(settings, say)
    limited = rate if why_not() is None else None
    if "time" in settings.parts:
        methods = [*map(ours, settings.timed), fastfold()]
        methods += [tensor_parallel()] if settings.ranks <= HEADS else []
        result["time"] = _timed(settings, methods, limited, say, what="the block")
    if "triangles" in settings.parts:
        result["triangles"] = {
            part: _timed(
                settings,
                [triangles(manner)[part] for manner in _TRIANGLES],
                limited,
                say,
                what=f"triangle {part}",
            )
            for part in ("products", "modules")
        }
    if "scaling" in settings.parts:
        result["scaling"] = launch(predict_published, 1, settings.published, say=say)[0]
    return result


# ---------------------------------------------------------------------------------------- bytes


def _bytes(settings: Settings, degree: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Payload and wire bytes of every way, against the plan's and the published scheme's."""
    methods = [*map(ours, settings.timed), fastfold()]
    methods += [tensor_parallel()] if degree <= HEADS else []
    say(f"bytes of {len(methods)} ways on {degree} ranks")
    plans = launch(_plans, 1, methods, settings.size, degree)[0]
    with open_network(degree) as wire:
        ranks = launch(_count_rank, degree, wire, methods, settings.size)
    published = published_bytes(settings.size, degree)
    rows = []
    for method in methods:
        row: dict[str, Any] = {"method": method.name}
        for part in _DIRECTIONS:
            figures = combine([rank[method.name][part] for rank in ranks])
            planned = [plan.parts[part].sent_bytes for plan in plans[method.name]]
            wire_bytes = figures.wire_bytes
            row[part] = {
                "payload_bytes": figures.payload_bytes,
                "planned_bytes": planned,
                "wire_bytes": wire_bytes,
                "exact": figures.payload_bytes == planned,
                "wire_over_plan": wire_bytes and sum(wire_bytes) / sum(planned),
                "over_published": max(planned) / published,
            }
        rows.append(row)
    return {"ranks": degree, "published_forward_bytes": published, "methods": rows}


def _plans(methods: Sequence[Method], size: Size, degree: int) -> dict[str, list[Rehearsal]]:
    block = build_block(device="meta")
    uneven = size.sequences % degree or size.residues % degree  # else all ranks do the same
    found = {}
    for m in methods:
        played = range(degree if uneven else 1)
        each = [rehearsed(m, size, degree, rank=rank, block=block) for rank in played]
        found[m.name] = each if uneven else each * degree
    return found


def _count_rank(wire: Wire, methods: Sequence[Method], size: Size) -> dict[str, Any]:
    """One sample of every way, by a device that takes no time."""
    mesh, block = join(wire), build_block()
    found: dict[str, Any] = {}
    with PlayedDevice(math.inf, math.inf):
        for method in methods:
            trial = Trial(method, block, mesh, size)
            found[method.name] = {
                part: [sample(getattr(trial, part), mesh, wire)] for part in _DIRECTIONS
            }
    return found


# --------------------------------------------------------------------------------------- memory


def _memory_measured(settings: Settings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peaks of real runs beside the rehearsed ones."""
    methods = [*map(ours, _LIVE_PEAKS), fastfold()]
    say(f"memory of {len(methods)} ways, measured on {settings.ranks} ranks that compute")
    with open_network(settings.ranks) as wire:
        ranks = launch(_peaks_of_rank, settings.ranks, wire, methods, settings.size)
    return [
        {
            "method": method.name,
            "ranks": settings.ranks,
            **{
                name: {
                    "measured_bytes": [rank[method.name][name][0] for rank in ranks],
                    "planned_bytes": [rank[method.name][name][1] for rank in ranks],
                }
                for name in ("forward", "step")
            },
        }
        for method in methods
    ]


def _peaks_of_rank(
    wire: Wire, methods: Sequence[Method], size: Size
) -> dict[str, dict[str, tuple[int, int]]]:
    mesh, block = join(wire), build_block()
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for method in methods:
        trial = Trial(method, block, mesh, size)

        def forward(trial: Trial = trial) -> None:
            with torch.no_grad():
                trial.forward()
            trial.out = ()

        def step(trial: Trial = trial) -> None:
            trial.forward()
            trial.backward()

        found[method.name] = {}
        for name, run in (("forward", forward), ("step", step)):
            run()  # gradients of parameters and random ones are there, and are not counted
            trial.forget()
            measured = peak_cpu_bytes(run)
            trial.forget()
            planned = rehearsed(
                method,
                size,
                mesh.size(AXIS),
                rank=mesh.rank(AXIS),
                backward=name == "step",
                block=build_block(device="meta").requires_grad_(name == "step"),
            )
            found[method.name][name] = measured, planned.peak_bytes
    return found


# ----------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class _Balance:
    """A device that is as fast as its links, for the way that sends least."""

    flops_per_s: float
    touched_per_s: float
    link_bytes_per_s: float

    def speeds(self) -> Speeds:
        """For the cost model: no latency, and what headers leave of the rate."""
        link = Tier(0.0, self.link_bytes_per_s)
        return Speeds(self.flops_per_s, self.touched_per_s, link, link)


_HEADERS = 1.006  # of what is sent, measured in `hairpin bench switch`
_UNLIMITED_S = 0.5  # of work, where no link can be limited


def _timed(
    settings: Settings,
    methods: Sequence[Method],
    rate: float | None,
    say: Callable[[str], None],
    *,
    what: str,
) -> dict[str, Any]:
    """Every way as it is, with each transfer awaited where it starts, and without any."""
    plans = launch(_first_plans, 1, methods, settings.size, settings.ranks)[0]
    balance = _balanced(plans, rate, settings.flops_per_byte)
    say(
        f"{what}: a device of {balance.flops_per_s / 1e9:.1f} GFLOP/s that touches "
        f"{balance.touched_per_s / 1e9:.2f} GB/s is played, on links of {settings.rate}"
    )
    with open_network(settings.ranks, rate_bits_per_s=rate) as wire:
        ranks = launch(_time_rank, settings.ranks, wire, methods, balance, settings)
    rows = [_row(method.name, plans[method.name], balance, ranks) for method in methods]
    alone_s = min(row["none_s"] for row in rows)
    errors = [row["predicted_over_measured"] for row in rows if row["predicted_over_measured"]]
    return {
        "flops_per_s": balance.flops_per_s,
        "touched_per_s": balance.touched_per_s,
        "rate_bits_per_s": rate,
        "all_reduce": ranks[0]["all_reduce"],
        "methods": [{**row, "over_work": row["time_s"] / alone_s} for row in rows],
        "median_time_error": median(abs(e - 1) for e in errors),
        "worst_time_error": max(abs(e - 1) for e in errors),
    }


def _first_plans(methods: Sequence[Method], size: Size, degree: int) -> dict[str, Rehearsal]:
    block = build_block(device="meta")
    return {m.name: rehearsed(m, size, degree, block=block) for m in methods}


def _balanced(
    plans: Mapping[str, Rehearsal], rate: float | None, flops_per_byte: float
) -> _Balance:
    least = min(plans.values(), key=lambda plan: plan.sent_bytes)
    link = math.inf if rate is None else rate / 8 / _HEADERS
    seconds = _UNLIMITED_S if rate is None else least.sent_bytes / link
    touched_per_s = (least.done.flops / flops_per_byte + least.done.touched_bytes) / seconds
    return _Balance(flops_per_byte * touched_per_s, touched_per_s, link)


def _time_rank(
    wire: Wire, methods: Sequence[Method], balance: _Balance, settings: Settings
) -> dict[str, Any]:
    mesh, block = join(wire), build_block()
    way = methods[0].way(mesh, settings.size)
    all_reduce = _all_reduces(Adder(way), Adder(way, gloo=True), settings.size, mesh)
    gloo = all_reduce["gloo_s"] < all_reduce["ours_s"]
    trials = {
        m.name: Trial(
            tensor_parallel(gloo=gloo) if m.name == tensor_parallel().name else m,
            block,
            mesh,
            settings.size,
        )
        for m in methods
    }
    runs: list[tuple[str, Links]] = [(name, links) for name in trials for links in _links_of(name)]
    device = PlayedDevice(math.inf, math.inf)
    with device:
        for name, trial in trials.items():  # shapes are learnt, and nothing waited for
            with linked(_links_of(name)[-1]):
                trial.forward()
                trial.backward()
    samples: dict[str, Samples] = {
        name: {links: {part: [] for part in _DIRECTIONS} for links in _links_of(name)}
        for name in trials
    }
    with device:
        for turn in range(settings.rounds):
            first = turn * len(runs) // settings.rounds
            for name, links in runs[first:] + runs[:first]:
                with linked(links):
                    for part in _DIRECTIONS:
                        device.play(balance.flops_per_s, balance.touched_per_s)
                        taken = sample(getattr(trials[name], part), mesh, wire)
                        samples[name][links][part].append(taken)
    return {"samples": samples, "all_reduce": all_reduce}


def _links_of(name: str) -> tuple[Links, ...]:
    """Tensor parallelism awaits all but the sums of its backward where they start."""
    only_as_it_is = name == tensor_parallel().name
    return ("as they are",) if only_as_it_is else ("as they are", "at once", "none")


def _all_reduces(own: Adder, gloo: Adder, size: Size, mesh: Mesh) -> dict[str, float]:
    """Least of two times of adding up an MSA representation, the slowest rank's."""
    x = torch.zeros(size.sequences, size.residues, size.c_m)
    found = {}
    for name, adder in (("ours_s", own), ("gloo_s", gloo)):
        times_s = []
        for _ in range(2):
            if mesh.world > 1:
                dist.barrier()
            start_s = time.perf_counter()
            adder.start(x)()
            slowest = torch.tensor(time.perf_counter() - start_s)
            if mesh.world > 1:
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times_s.append(float(slowest))
        found[name] = min(times_s)
    return found


def _row(
    name: str, plan: Rehearsal, balance: _Balance, ranks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    taken = [rank["samples"][name] for rank in ranks]
    parts = {}
    for part in _DIRECTIONS:
        figures = {links: combine([rank[links][part] for rank in taken]) for links in taken[0]}
        times_s = {links: found.time_s for links, found in figures.items()}
        parts[part] = {
            **_overlap(times_s, plan.parts[part], balance.speeds()),
            "times_s": {links: found.times_s for links, found in figures.items()},
            "payload_bytes": figures["as they are"].payload_bytes,
            "wire_bytes": figures["as they are"].wire_bytes,
        }

    def both(key: str) -> float:
        return float(sum(part[key] for part in parts.values()))

    time_s, predicted_s = both("time_s"), both("predicted_s")
    return {
        "method": name,
        **parts,
        "time_s": time_s,
        "none_s": both("none_s"),
        "at_once_s": both("at_once_s"),
        "predicted_s": predicted_s,
        "predicted_over_measured": predicted_s / time_s,
        "hidden": _share(both("at_once_s") - time_s, both("at_once_s") - both("none_s")),
        "hidden_of_hideable": _share(both("at_once_s") - time_s, both("hideable_s")),
    }


def _overlap(times_s: Mapping[str, float], plan: Rehearsed, speeds: Speeds) -> dict[str, Any]:
    """What of the transfers is hidden, measured, and could be, by the plan.

    Hideable is what the work between the starts of transfers and their uses could hide on the one
    link that they share; a transfer whose result is needed at once has none.
    """
    laid_out = predict(plan, speeds)
    time_s = times_s["as they are"]
    serial_s = laid_out.compute_s + sum(laid_out.takes_s)
    at_once_s = times_s.get("at once", serial_s)
    none_s = times_s.get("none", laid_out.compute_s)
    could_s = most_hidden_s(plan, speeds)
    return {
        "time_s": time_s,
        "at_once_s": at_once_s,
        "none_s": none_s,
        "predicted_s": laid_out.time_s,
        "predicted_at_once_s": serial_s,
        "predicted_none_s": laid_out.compute_s,
        "hideable_s": could_s,
        "hidden": _share(at_once_s - time_s, at_once_s - none_s),
        "hidden_of_hideable": _share(at_once_s - time_s, could_s),
        "hidden_of_shorter": _share(at_once_s - time_s, min(none_s, at_once_s - none_s)),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
