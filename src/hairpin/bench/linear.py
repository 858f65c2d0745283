"""Linear attention over a split sequence: its schedules on emulated networks, against work alone.

Several layers in a row run forward and backward by each of our schedules, by LASP's own order
(:mod:`hairpin.bench.linear_peers`) and without any exchange, with bytes from the interfaces beside
the formula's. By default kernels sleep (:mod:`hairpin.bench.virtual`): with fewer cores than ranks,
work that is real delays the transfers it should hide.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from hairpin.bench.linear_peers import Attend, Lasp
from hairpin.bench.longest import Longest, find_longest
from hairpin.bench.measure import Sample, combine, join, machine, sample
from hairpin.bench.network import Wire, emulated_rates, network_note, open_network
from hairpin.bench.virtual import virtual_linear_attention
from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.exchange.affine import SCHEDULES, Schedule, bytes_sent
from hairpin.exchange.linear import linear_attention
from hairpin.kernels.linear_attention import linear_attention as attend_whole
from hairpin.kernels.linear_attention import summarize
from hairpin.layout import shard_offset, shard_size
from hairpin.run.launch import launch, warm

AXIS = "sp"
PARTS = ("speed", "longest")
PEERS = ("LASP's order", "LASP's order, barriers")
_ALONE = "work alone"
_CHECKED_ROWS = 80  # of each rank where results are compared with one process: over one chunk
_ITEM_BYTES = 4  # states are float32
_DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        parts: names in ``PARTS``.
        ranks: numbers of ranks, a run each.
        rates: of each rank's link.
        lengths: of the whole sequence, a case each.
        layers: in a row.
        virtual_flops_per_s: of the device that is played; None: real kernels.
        longest: what the longest sequence is looked for in.
    """

    parts: Sequence[str] = PARTS
    ranks: Sequence[int] = (4, 8)
    rates: Sequence[str] = ("200mbit", "1gbit")
    lengths: Sequence[int] = (1024, 2048)
    heads: int = 8
    head_dim: int = 64
    layers: int = 8
    rounds: int = 3
    virtual_flops_per_s: float | None = 4e9
    longest: Longest = field(default_factory=Longest)

    @property
    def state_bytes(self) -> int:
        """What crosses from one rank to another: ``h d e`` numbers."""
        return self.heads * self.head_dim**2 * _ITEM_BYTES

    @property
    def decay_bytes(self) -> int:
        """What a decay per head adds to a message that several ranks use."""
        return self.heads * _ITEM_BYTES


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all cases. Gives plain data; ``say`` is told what goes on.

    Where no network can be emulated, ranks run over the loopback and only ``"unlimited"`` is
    measured; ``say`` and the result's ``"wire"`` tell so.

    Raises:
        UnitError: a rate that cannot be read.
    """
    result: dict[str, Any] = {
        "benchmark": "linear",
        "machine": machine(),
        "settings": asdict(settings),
    }
    rates = emulated_rates(settings.rates)
    warm()
    if "speed" in settings.parts:
        result |= _speed(settings, rates, say)
    if "longest" in settings.parts:
        result["longest"] = find_longest(settings.longest, say=say)
    return result


def _speed(
    settings: Settings, rates: Mapping[str, float | None], say: Callable[[str], None]
) -> dict[str, Any]:
    say(_compute_in_words(settings))
    note, runs = network_note(), []
    say(note)
    for size in settings.ranks:
        for rate, rate_bits_per_s in rates.items():
            say(f"{size} ranks, {rate}: lengths {', '.join(map(str, settings.lengths))}")
            with open_network(size, rate_bits_per_s=rate_bits_per_s) as wire:
                ranks = launch(_run_rank, size, wire, settings)
            cases = [
                _summary([rank[i] for rank in ranks], settings, length)
                for i, length in enumerate(settings.lengths)
            ]
            of = {"ranks": size, "rate": rate, "rate_bits_per_s": rate_bits_per_s}
            runs.append({**of, "cases": cases})
    return {"wire": note, "compute": _compute_in_words(settings), "runs": runs}


def _compute_in_words(settings: Settings) -> str:
    if settings.virtual_flops_per_s is None:
        return "kernels compute for real: with fewer cores than ranks, little can overlap"
    return (
        f"the local work is played: kernels sleep as a device of "
        f"{settings.virtual_flops_per_s / 1e9:g} GFLOP/s would compute; packing and transfers are "
        "real"
    )


# --------------------------------------------------------------------------------------- a rank


def _run_rank(wire: Wire, settings: Settings) -> list[dict[str, Any]]:
    mesh = join(wire)
    ways = _ways(mesh)
    errors = {name: _error(attend, mesh, settings) for name, attend in ways.items()}
    errors.pop(_ALONE)
    with _compute(settings):
        return [
            {**_case(ways, mesh, wire, replace(settings, lengths=(length,))), "errors": errors}
            for length in settings.lengths
        ]


def _compute(settings: Settings) -> AbstractContextManager[None]:
    speed = settings.virtual_flops_per_s
    return nullcontext() if speed is None else virtual_linear_attention(speed)


def _ways(mesh: Mesh) -> dict[str, Attend]:
    """The work alone, then ours, then the peers."""
    link = Link(mesh, AXIS)
    peers = zip(PEERS, (Lasp(link, barrier=b).attend for b in (False, True)), strict=True)
    return {_ALONE: _alone, **{name: _ours(name, mesh) for name in SCHEDULES}, **dict(peers)}


def _ours(name: str, mesh: Mesh) -> Attend:
    schedule = cast(Schedule, name)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return linear_attention(q, k, v, log_decay, mesh=mesh, axis=AXIS, schedule=schedule)

    return attend


def _alone(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same local work; the rank's own state stands for the one that would come in."""
    segment = summarize(k, v, log_decay)
    return segment.attend(q) + segment.receive(q, segment.state)


class _Trial:
    """Layers in a row, each with its own queries and keys; the values are the layer's before."""

    def __init__(self, attend: Attend, mesh: Mesh, settings: Settings) -> None:
        (length,) = settings.lengths
        h, d = settings.heads, settings.head_dim
        shape = (1, h, shard_size(length, mesh.size(AXIS), mesh.rank(AXIS)), d)
        self.attend, self.log_decay = attend, _log_decay(h)
        self.layers = [
            [torch.randn(shape).div_(d).requires_grad_() for _ in "qk"]
            for _ in range(settings.layers)
        ]
        self.values = torch.randn(shape).requires_grad_()
        self.cotangent = torch.randn(shape)
        self.out = self.values

    def forward(self) -> None:
        out = self.values
        for q, k in self.layers:
            out = self.attend(q, k, out, self.log_decay)
        self.out = out

    def backward(self) -> None:
        self.out.backward(self.cotangent)


def _log_decay(heads: int) -> Tensor:
    """A constant per head, from forgetting slowly to fast (as in LASP and RetNet)."""
    return -torch.logspace(-3, -1, heads)


def _case(ways: Mapping[str, Attend], mesh: Mesh, wire: Wire, settings: Settings) -> dict[str, Any]:
    """Samples of all ways in turn, after one round to warm up, which counts collectives."""
    trials = {name: _Trial(attend, mesh, settings) for name, attend in ways.items()}
    samples: dict[str, dict[str, list[Sample]]]
    samples = {name: {part: [] for part in _DIRECTIONS} for name in trials}
    collectives: dict[str, dict[str, int]] = {name: {} for name in trials}
    names = list(trials)
    for turn in range(settings.rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for part in _DIRECTIONS:
                before = mesh.traffic.snapshot()
                taken = sample(getattr(trials[name], part), mesh, wire)
                collectives[name][part] = mesh.traffic.since(before).collectives
                if turn:
                    samples[name][part].append(taken)
    return {"samples": samples, "collectives": collectives}


def _error(attend: Attend, mesh: Mesh, settings: Settings) -> float:
    """Largest error of output and gradients of this rank, relative to the largest value of each."""
    size, rank = mesh.size(AXIS), mesh.rank(AXIS)
    length = _CHECKED_ROWS * size
    here = slice(shard_offset(length, size, rank), shard_offset(length, size, rank + 1))
    drawn = torch.Generator().manual_seed(0)
    shape = (1, settings.heads, length, settings.head_dim)
    *inputs, cotangent = (torch.randn(shape, generator=drawn) for _ in range(4))
    whole = [x.clone().requires_grad_() for x in inputs]
    parts = [x[:, :, here].clone().requires_grad_() for x in inputs]
    log_decay = _log_decay(settings.heads)
    truth = attend_whole(whole[0], whole[1], whole[2], log_decay)[0]
    truth.backward(cotangent)
    out = attend(parts[0], parts[1], parts[2], log_decay)
    out.backward(cotangent[:, :, here])
    pairs = [(out, truth), *((x.grad, w.grad) for x, w in zip(parts, whole, strict=True))]
    return max(
        float((got - want[:, :, here]).detach().abs().max() / want.detach().abs().max())
        for got, want in pairs
        if got is not None and want is not None
    )


# --------------------------------------------------------------------------------------- figures


def _summary(ranks: Sequence[Mapping[str, Any]], settings: Settings, length: int) -> dict[str, Any]:
    """Figures of all ways at one length."""
    rows = [_row(ranks, name, settings) for name in ranks[0]["samples"]]
    alone_s = next(row["time_s"] for row in rows if row["method"] == _ALONE)
    return {
        "length": length,
        "methods": [{**row, "over_alone": row["time_s"] / alone_s} for row in rows],
    }


def _row(ranks: Sequence[Mapping[str, Any]], name: str, settings: Settings) -> dict[str, Any]:
    parts = {
        part: {
            **asdict(combine([rank["samples"][name][part] for rank in ranks])),
            "formula_bytes": formula_bytes(name, len(ranks), settings, part),
            "collectives": max(rank["collectives"][name][part] for rank in ranks),
        }
        for part in _DIRECTIONS
    }
    exchanges = [found for found in parts.values() if sum(found["formula_bytes"])]
    return {
        "method": name,
        "layers": settings.layers,
        **parts,
        "time_s": sum(found["time_s"] for found in parts.values()),
        "payload_as_formula": all(
            found["payload_bytes"] == found["formula_bytes"] for found in parts.values()
        ),
        "wire_over_formula": max(
            (
                sum(found["wire_bytes"]) / sum(found["formula_bytes"])
                for found in exchanges
                if found["wire_bytes"]
            ),
            default=None,
        ),
        "error": None if name == _ALONE else max(rank["errors"][name] for rank in ranks),
    }


def formula_bytes(name: str, size: int, settings: Settings, part: str) -> list[int]:
    """Bytes that each rank sends in a step, all layers, in one direction: of any length.

    A chain sends ``h d e`` numbers of 4 bytes per layer from each rank but the last
    (`hairpin.exchange.affine` has the others); the backward, from each but the first.
    """
    if name == _ALONE:
        return [0] * size
    schedule = cast(Schedule, "chain" if name in PEERS else name)
    sent = [
        settings.layers * bytes_sent(schedule, size, r, settings.state_bytes, settings.decay_bytes)
        for r in range(size)
    ]
    return sent if part == "forward" else sent[::-1]
