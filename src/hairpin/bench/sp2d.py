"""Sequence parallelism of a 2-D transformer: four methods against the bandwidth of the links.

One step is a forward and a backward of the same transformer on the same input. Parameter gradients
are averaged over the ranks only on request (``sync_gradients``): that happens once per optimizer
step, not per layer, costs DSP, Ulysses and ring the same, and Megatron next to nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hairpin.bench.measure import Figures, Sample, combine, interleave, join, machine, sample
from hairpin.bench.methods import AXIS, METHODS, Method, sent_bytes
from hairpin.bench.network import Wire, emulated_rates, network_note, open_network
from hairpin.bench.transformer import Size, build
from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh
from hairpin.layout import Layout
from hairpin.run.launch import launch

RATES = ("unlimited", "1gbit", "400mbit", "200mbit", "100mbit", "50mbit")
OURS = "dsp"
_WARM_UP_ROUNDS = 3

Samples = dict[str, list[Sample]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    ranks: int = 4
    rates: Sequence[str] = RATES
    size: Size = field(default_factory=Size)
    rounds: int = 9
    sync_gradients: bool = False


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all methods at all rates. Gives plain data; ``say`` is told what goes on.

    Where no network can be emulated, ranks run over the loopback and only ``"unlimited"`` is
    measured; ``say`` and the result's ``"wire"`` tell so.

    Raises:
        UnitError: a rate that cannot be read.
    """
    rates = emulated_rates(settings.rates)
    described, note = machine(), network_note()
    say(note)
    runs = []
    for rate, rate_bits_per_s in rates.items():
        say(f"{rate}: {settings.rounds} rounds of {', '.join(METHODS)}")
        with open_network(settings.ranks, rate_bits_per_s=rate_bits_per_s) as wire:
            ranks = launch(_run_rank, settings.ranks, wire, settings)
        runs.append({"rate": rate, "rate_bits_per_s": rate_bits_per_s, **_summary(ranks)})
    return {
        "benchmark": "sp2d",
        "machine": described,
        "wire": note,
        "settings": asdict(settings),
        "expected_bytes": {name: _expected(name, settings) for name in METHODS},
        "runs": runs,
    }


def _run_rank(wire: Wire, settings: Settings) -> dict[str, Samples]:
    """One rank at one rate: count forwards and backwards apart, which warms up, then time steps."""
    mesh = join(wire)
    trials = {name: _Trial(name, settings, mesh) for name in METHODS}
    forward: Samples = {name: [] for name in METHODS}
    backward: Samples = {name: [] for name in METHODS}
    for _ in range(_WARM_UP_ROUNDS):
        for name, trial in trials.items():
            forward[name].append(sample(trial.forward, mesh, wire))
            backward[name].append(sample(trial.backward, mesh, wire))
    steps = {name: trial.step for name, trial in trials.items()}
    step = interleave(steps, mesh, wire, rounds=settings.rounds)
    return {"forward": forward, "backward": backward, "step": step}


class _Trial:
    """One method with its weights and this rank's part of the input."""

    def __init__(self, name: str, settings: Settings, mesh: Mesh) -> None:
        size = settings.size
        self.mesh = mesh
        self.sync_gradients = settings.sync_gradients
        self.method: Method = METHODS[name](build(size), size, mesh)
        frames = Layout(f"b t/{AXIS} s c", b=size.b, t=size.t, s=size.s, c=size.c)
        self.x = torch.randn(frames.local_shape(mesh)).requires_grad_()
        self.cotangent = torch.randn(frames.local_shape(mesh))
        self.y: Tensor = self.x

    def forward(self) -> None:
        self.y = self.method(self.x)

    def backward(self) -> None:
        self.y.backward(self.cotangent)
        if self.sync_gradients:
            sync_grads(self.method.model, self.mesh)

    def step(self) -> None:
        self.forward()
        self.backward()


def _summary(ranks: Sequence[Mapping[str, Samples]]) -> dict[str, Any]:
    """Figures of all methods at one rate, and how much faster ours is than each."""
    figures = {
        name: {part: combine([rank[part][name] for rank in ranks]) for part in ranks[0]}
        for name in METHODS
    }
    times_s = {name: parts["step"].time_s for name, parts in figures.items()}
    others = {name: time_s for name, time_s in times_s.items() if name != OURS}
    speedup = {name: time_s / times_s[OURS] for name, time_s in others.items()}
    return {
        "methods": {
            name: {part: asdict(f) for part, f in parts.items()} for name, parts in figures.items()
        },
        "speedup": {**speedup, "best other": min(speedup.values())},
        "bytes_ratio": {name: _bytes_ratio(figures[OURS], figures[name]) for name in others},
    }


def _bytes_ratio(ours: Mapping[str, Figures], other: Mapping[str, Figures]) -> dict[str, float]:
    """Bytes of ours over the other's: on the wire where it is counted, else payload."""
    return {
        part: sum(ours[part].wire_bytes or ours[part].payload_bytes)
        / max(1, sum(other[part].wire_bytes or other[part].payload_bytes))
        for part in ours
    }


def _expected(name: str, settings: Settings) -> dict[str, float]:
    """Mean bytes a rank sends by the formula, without parameter gradients."""
    forward, backward = sent_bytes(name, settings.size, settings.ranks)
    return {"forward": forward / settings.ranks, "backward": backward / settings.ranks}
