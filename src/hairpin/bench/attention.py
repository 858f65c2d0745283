"""One attention layer over a split sequence: every method on emulated networks, against its cost.

Each method that the planner knows runs forward and backward on the same sequence, with bytes from
the interfaces beside the formula's and seconds beside the predicted ones; so do other libraries.
By default kernels sleep (:mod:`hairpin.bench.virtual`): with fewer cores than ranks, work that is
real delays the transfers it should hide.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hairpin.bench import links
from hairpin.bench.attention_peers import PEERS, Attend, Peer
from hairpin.bench.measure import Sample, combine, join, machine, sample
from hairpin.bench.network import Wire, emulated_rates, network_note, open_network
from hairpin.bench.virtual import virtual_attention
from hairpin.comm.mesh import Mesh
from hairpin.comm.topology import Topology, Work
from hairpin.comm.transport import Link
from hairpin.exchange.api import attention
from hairpin.exchange.call import Level
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.places import Places
from hairpin.exchange.split import Schedule, SequenceSplit
from hairpin.planning.sequence.cost import Candidate, candidates
from hairpin.planning.sequence.plan import split_of
from hairpin.planning.sequence.work import AttentionShape
from hairpin.run.launch import launch, warm
from hairpin.units import parse_rate

AXIS = "sp"
MASKS = {"full": Mask(), "causal": Mask(causal=True)}
SCHEDULES: tuple[Schedule, ...] = ("ring", "double_ring", "all_gather", "hierarchical")
_SMALL_ROWS, _SMALL_ROUNDS = 8, 12  # of the trial that tells what a call costs
_CHECKED_ROWS = 16  # of each rank where results are compared with one process
_COUNTERPARTS = {  # what of ours does the same as a peer: ranks that switch heads, schedule
    "ring-flash-attention": (False, "ring"),
    "torch ring, all-gather": (False, "all_gather"),
    "torch ring, all-to-all": (False, "ring"),
    "yunchang ulysses": (True, "ring"),
}

Samples = dict[str, list[Sample]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        hosts: None: every rank has its own link; else ranks share one of so many uplinks.
        rates: of each rank's link, or each host's.
        inner_rate: of links inside a host.
        groups: numbers of key/value heads, a case each.
        masks: names in ``MASKS``, a case each.
        virtual_flops_per_s: of the device that is played; None: real kernels.
        peers: names in ``PEERS``.
    """

    ranks: int = 4
    hosts: int | None = None
    rates: Sequence[str] = ("200mbit", "1gbit")
    inner_rate: str = "unlimited"
    length: int = 4096
    heads: int = 8
    groups: Sequence[int] = (8, 2)
    head_dim: int = 64
    masks: Sequence[str] = ("full", "causal")
    schedules: Sequence[Schedule] = SCHEDULES
    rounds: int = 3
    virtual_flops_per_s: float | None = 20e9
    peers: Sequence[str] = tuple(PEERS)


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all cases at all rates. Gives plain data; ``say`` is told what goes on.

    Where no network can be emulated, ranks run over the loopback and only ``"unlimited"`` is
    measured; ``say`` and the result's ``"wire"`` tell so.

    Raises:
        UnitError: a rate that cannot be read.
    """
    rates, inner = emulated_rates(settings.rates), parse_rate(settings.inner_rate)
    say(_compute_in_words(settings))
    described, note = machine(), network_note()
    warm("torch.distributed.tensor.experimental._context_parallel._attention")
    say(note)
    runs = []
    for rate, rate_bits_per_s in rates.items():
        say(f"{rate}: {len(settings.groups) * len(settings.masks)} cases")
        with open_network(
            settings.ranks,
            rate_bits_per_s=rate_bits_per_s,
            hosts=settings.hosts,
            inner_rate_bits_per_s=inner if settings.hosts else None,
        ) as wire:
            ranks = launch(_run_rank, settings.ranks, wire, settings)
        runs.append({"rate": rate, "rate_bits_per_s": rate_bits_per_s, **_summary(ranks)})
    return {
        "benchmark": "attention",
        "machine": described,
        "wire": note,
        "compute": _compute_in_words(settings),
        "settings": asdict(settings),
        "runs": runs,
        "accuracy": _accuracy(runs),
    }


def _compute_in_words(settings: Settings) -> str:
    if settings.virtual_flops_per_s is None:
        return "kernels compute for real: with fewer cores than ranks, little can overlap"
    return (
        f"kernels sleep as a device of {settings.virtual_flops_per_s / 1e9:g} GFLOP/s would "
        "compute; merging, packing and transfers are real"
    )


# --------------------------------------------------------------------------------------- a rank


def _run_rank(wire: Wire, settings: Settings) -> dict[str, Any]:
    mesh = join(wire)
    topology = Topology.measure(mesh, AXIS, heads=settings.heads, head_dim=settings.head_dim)
    topology = _with_overheads(topology, mesh, settings)
    cases = [
        _Case(mesh, wire, topology, settings, groups=groups, mask=mask).run()
        for groups in settings.groups
        for mask in settings.masks
    ]
    overlap = _Overlap(mesh, wire, topology, settings).run() if settings.ranks > 1 else None
    return {"topology": asdict(topology), "cases": cases, "overlap": overlap}


def _compute(settings: Settings) -> AbstractContextManager[None]:
    speed = settings.virtual_flops_per_s
    return nullcontext() if speed is None else virtual_attention(speed)


def _with_overheads(topology: Topology, mesh: Mesh, settings: Settings) -> Topology:
    """What a small block takes on all ranks at once, with all that is around the kernel.

    Speeds are those measured, or that of the device that is played.
    """
    order = Order("contiguous", _SMALL_ROWS * settings.ranks)
    split = _LinkedSplit(mesh, AXIS, order, link=_NoLink)
    trial = _Trial(_attend_by(split, Mask()), [(1, 1, _SMALL_ROWS, settings.head_dim)] * 3)
    times_s = torch.zeros(_SMALL_ROUNDS, 2)
    with _compute(settings):
        for row in times_s:
            start_s = time.perf_counter()
            trial.forward()
            middle_s = time.perf_counter()
            trial.backward()
            row[0], row[1] = middle_s - start_s, time.perf_counter() - middle_s
    each_s = times_s.median(0).values / settings.ranks
    if mesh.world > 1:
        dist.all_reduce(each_s, dist.ReduceOp.MAX)
    speeds = [work.flops_per_s for work in (topology.forward, topology.backward)]
    if settings.virtual_flops_per_s is not None:
        speeds = [settings.virtual_flops_per_s] * 2
    forward, backward = (Work(s, n) for s, n in zip(each_s.tolist(), speeds, strict=True))
    return replace(topology, forward=forward, backward=backward)


class _Trial:
    """One way to attend with this rank's part of the inputs."""

    def __init__(self, attend: Attend, shapes: Sequence[tuple[int, ...]]) -> None:
        self.attend = attend
        self.inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
        self.cotangent = torch.randn(shapes[0])
        self.out = self.inputs[0]

    def forward(self) -> None:
        self.out = self.attend(*self.inputs)

    def backward(self) -> None:
        self.out.backward(self.cotangent)


def _time(
    trials: Mapping[str, _Trial], mesh: Mesh, wire: Wire, *, rounds: int
) -> dict[str, Samples]:
    """Samples of forward and backward of all trials in turn, after one round to warm up."""
    samples: dict[str, Samples] = {name: {"forward": [], "backward": []} for name in trials}
    names = list(trials)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            trial = trials[name]
            for part, step in (("forward", trial.forward), ("backward", trial.backward)):
                taken = sample(step, mesh, wire)
                if turn:
                    samples[name][part].append(taken)
    return samples


class _Case:
    """One shape: all of our methods, and the peers."""

    def __init__(
        self,
        mesh: Mesh,
        wire: Wire,
        topology: Topology,
        settings: Settings,
        *,
        groups: int,
        mask: str,
    ) -> None:
        self.mesh, self.wire, self.topology, self.settings = mesh, wire, topology, settings
        self.groups, self.mask = groups, mask
        self.shape = AttentionShape(
            length=settings.length,
            heads=settings.heads,
            groups=groups,
            head_dim=settings.head_dim,
            mask=MASKS[mask],
        )

    def run(self) -> dict[str, Any]:
        found = candidates(self.shape, self.topology, schedules=self.settings.schedules)
        found = [c for c in found if c.excluded is None]
        ours = {f"{c.method}, {c.order}": self._ours(c) for c in found}
        peers, absent, errors = self._peers()
        with _compute(self.settings):
            samples = _time({**ours, **peers}, self.mesh, self.wire, rounds=self.settings.rounds)
        return {
            "groups": self.groups,
            "mask": self.mask,
            "candidates": dict(zip(ours, found, strict=True)),
            "samples": samples,
            "absent": absent,
            "errors": errors,
        }

    def _ours(self, c: Candidate) -> _Trial:
        split = split_of(c, self.mesh, AXIS, self.shape)
        return self._trial(_attend_by(split, self.shape.mask), len(split.positions))

    def _trial(self, attend: Attend, rows: int, *, heads_first: bool = True) -> _Trial:
        d = self.settings.head_dim
        heads = (self.settings.heads, self.groups, self.groups)
        shapes = [(1, h, rows, d) if heads_first else (1, rows, h, d) for h in heads]
        return _Trial(attend, shapes)

    def _peers(self) -> tuple[dict[str, _Trial], dict[str, str], dict[str, float]]:
        """Those that run, why the others do not, and errors on a short sequence."""
        trials: dict[str, _Trial] = {}
        absent: dict[str, str] = {}
        errors: dict[str, float] = {}
        for name in self.settings.peers:
            try:
                peer = PEERS[name](causal=self.mask == "causal")
                errors[name] = self._error(peer)
            except Exception as error:  # noqa: BLE001  # another library may fail as it likes
                absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            rows = self.settings.length // self.mesh.size(AXIS)
            trials[name] = self._trial(peer.attend, rows, heads_first=peer.heads_first)
        return trials, absent, errors

    def _error(self, peer: Peer) -> float:
        """Largest error of output and gradients, relative to the largest value of each."""
        ranks, rank = self.mesh.size(AXIS), self.mesh.rank(AXIS)
        length = _CHECKED_ROWS * ranks
        held = Order(peer.order, length).positions(ranks, rank)
        torch.manual_seed(0)
        heads = (self.settings.heads, self.groups, self.groups, self.settings.heads)
        q, k, v, cotangent = (torch.randn(1, h, length, self.settings.head_dim) for h in heads)
        whole_q, whole_k, whole_v = whole = [x.clone().requires_grad_() for x in (q, k, v)]
        gqa = self.groups != self.settings.heads
        truth = F.scaled_dot_product_attention(
            whole_q, whole_k, whole_v, is_causal=self.mask == "causal", enable_gqa=gqa
        )
        truth.backward(cotangent)

        def mine(x: Tensor) -> Tensor:
            part = x.detach()[:, :, held]
            return (part if peer.heads_first else part.transpose(1, 2)).contiguous()

        inputs = [mine(x).requires_grad_() for x in (q, k, v)]
        out = peer.attend(*inputs)
        out.backward(mine(cotangent))
        pairs = [
            (out.detach(), truth),
            *((x.grad, w.grad) for x, w in zip(inputs, whole, strict=True)),
        ]
        return max(
            float((got - mine(want)).abs().max() / want.detach().abs().max())
            for got, want in pairs
            if got is not None and want is not None
        )


def _attend_by(split: SequenceSplit, mask: Mask) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, split, mask=mask)

    return attend


# --------------------------------------------------------------------------------------- overlap


class _SerialLink(Link):
    """A link whose transfers are awaited where they are started."""

    exchange = links.at_once


class _NoLink(Link):
    """A link that moves nothing: what is left is the work."""

    exchange = links.none


@dataclass(frozen=True)
class _LinkedSplit(SequenceSplit):
    """A split over links of another kind."""

    link: type[Link] = Link

    def levels(self) -> tuple[Level, ...]:
        return tuple(
            Level(level.kind, Places(self.link(self.mesh, self.axis), level.places.members))
            for level in super().levels()
        )


class _Overlap:
    """The ring against the same ring without overlap, where a hop takes as long as a block."""

    def __init__(self, mesh: Mesh, wire: Wire, topology: Topology, settings: Settings) -> None:
        self.mesh, self.wire, self.settings = mesh, wire, settings
        ranks = settings.ranks
        self.rows = settings.length // ranks
        block_bytes = 2 * self.rows * settings.heads * settings.head_dim * 4
        hop_s = topology.transfer_s((r, (r + 1) % ranks, block_bytes) for r in range(ranks))
        self.flops_per_s = 4 * self.rows**2 * settings.heads * settings.head_dim / hop_s

    def run(self) -> dict[str, Any]:
        trials = {
            name: self._trial(link)
            for name, link in (("ring", Link), ("serial", _SerialLink), ("work", _NoLink))
        }
        with virtual_attention(self.flops_per_s):
            samples = _time(trials, self.mesh, self.wire, rounds=self.settings.rounds)
        return {"flops_per_s": self.flops_per_s, "samples": samples}

    def _trial(self, link: type[Link]) -> _Trial:
        order = Order("contiguous", self.rows * self.settings.ranks)
        split = _LinkedSplit(self.mesh, AXIS, order, link=link)
        shape = (1, self.settings.heads, self.rows, self.settings.head_dim)
        return _Trial(_attend_by(split, Mask()), [shape] * 3)


def hidden_part(
    ring_s: float, serial_s: float, work_s: float, ranks: int, *, backward: bool
) -> float:
    """The part of the communication that could hide behind work and does.

    Of P steps all but the last pass keys on; in the backward all but the first two also pass a
    gradient on, and the last gradient goes home when nothing is left to compute.
    """
    hops = [int(step < ranks - 1) + int(backward and step > 1) for step in range(ranks)]
    moved = sum(hops) + int(backward)
    hop_s = max(serial_s - work_s, 0.0) / moved if moved else 0.0
    hideable_s = sum(min(work_s / ranks, n * hop_s) for n in hops)
    return (serial_s - ring_s) / hideable_s if hideable_s else 1.0


# --------------------------------------------------------------------------------------- figures


def _summary(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all cases at one rate."""
    cases = [
        _case_summary([rank["cases"][i] for rank in ranks]) for i in range(len(ranks[0]["cases"]))
    ]
    overlap = ranks[0]["overlap"] and _overlap_summary([rank["overlap"] for rank in ranks])
    return {"topology": ranks[0]["topology"], "cases": cases, "overlap": overlap}


def _case_summary(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = ranks[0]
    figures = {name: _figures(ranks, name) for name in first["samples"]}
    ours = [_method_row(name, c, figures[name]) for name, c in first["candidates"].items()]
    pick, best = ours[0], min(ours, key=lambda row: row["time_s"])
    peers = [
        {
            "peer": name,
            **figures[name],
            "error": max(rank["errors"][name] for rank in ranks),
            "over_same": figures[name]["time_s"] / _same(name, ours),
            "over_pick": figures[name]["time_s"] / pick["time_s"],
        }
        for name in figures
        if name in first["errors"]
    ]
    return {
        "groups": first["groups"],
        "mask": first["mask"],
        "methods": ours,
        "pick": {
            "method": pick["method"],
            "best": best["method"],
            "over_best": pick["time_s"] / best["time_s"],
        },
        "peers": peers,
        "absent": first["absent"],
    }


def _figures(ranks: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    parts = {
        part: asdict(combine([rank["samples"][name][part] for rank in ranks]))
        for part in ("forward", "backward")
    }
    return {**parts, "time_s": sum(figures["time_s"] for figures in parts.values())}


def _method_row(name: str, c: Candidate, figures: Mapping[str, Any]) -> dict[str, Any]:
    predicted = {"forward": c.forward_s, "backward": c.backward_s}
    formula = {"forward": c.forward_bytes, "backward": c.backward_bytes}
    return {
        **asdict(c),
        "method": name,
        **figures,
        "predicted_s": c.time_s,
        "predicted_over_measured": c.time_s / figures["time_s"],
        "predicted_over_measured_by_part": {
            part: predicted[part] / figures[part]["time_s"] for part in predicted
        },
        "payload_as_predicted": {
            part: max(figures[part]["payload_bytes"]) == formula[part] for part in formula
        },
        "wire_over_formula": {
            part: _wire_ratio(figures[part]["wire_bytes"], formula[part]) for part in formula
        },
    }


def _wire_ratio(wire_bytes: Sequence[float] | None, formula: int) -> float | None:
    return max(wire_bytes) / formula if wire_bytes and formula else None


def _same(peer: str, ours: Sequence[Mapping[str, Any]]) -> float:
    """Time of the best of ours that works as a peer does."""
    switches, schedule = _COUNTERPARTS[peer]
    same = [
        float(row["time_s"])
        for row in ours
        if (row["places"] == 1 if switches else row["heads"] == 1 and row["schedule"] == schedule)
    ]
    return min(same)


def _overlap_summary(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"flops_per_s": ranks[0]["flops_per_s"]}
    for part in ("forward", "backward"):
        times = {
            name: combine([rank["samples"][name][part] for rank in ranks]).time_s
            for name in ("ring", "serial", "work")
        }
        found[part] = {
            **{f"{name}_s": time_s for name, time_s in times.items()},
            "serial_over_ring": times["serial"] / times["ring"],
            "hidden": hidden_part(
                times["ring"], times["serial"], times["work"], len(ranks), backward=part[0] == "b"
            ),
        }
    return found


def _accuracy(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well costs were predicted, and what following them costs, over all cases."""
    cases = [case for run in runs for case in run["cases"]]
    rows = [row for case in cases for row in case["methods"]]
    wire = [r for row in rows for r in row["wire_over_formula"].values() if r is not None]
    return {
        "cases": len(cases),
        "methods": len(rows),
        "median_time_error": median(abs(row["predicted_over_measured"] - 1) for row in rows),
        "worst_time_error": max(abs(row["predicted_over_measured"] - 1) for row in rows),
        "worst_pick_over_best": max(case["pick"]["over_best"] for case in cases),
        "payload_exact": all(all(row["payload_as_predicted"].values()) for row in rows),
        "worst_wire_over_formula": max(wire) if wire else None,
    }
