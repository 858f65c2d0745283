"""One small language model over the same ranks in several ways: what each sends, holds and takes.

A *layout* says how ranks share out a training step, outermost axis first: ``"pp2 sp2"`` is two
stages far apart, in each two ranks that share every row. Every layout trains the same recipe on the
same batches. What it computes, calls and holds is checked and counted first, with real kernels;
then steps are timed on emulated networks, where by default kernels sleep
(:mod:`hairpin.bench.virtual`): on fewer cores than ranks, real work neither waits nor overlaps as
it would on devices of its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hairpin.bench.measure import Figures, Sample, combine, join, machine, sample
from hairpin.bench.network import Loopback, Wire, emulated_rates, network_note, open_network
from hairpin.bench.virtual import virtual_attention, virtual_products
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import HairpinError, MeshError
from hairpin.models.llm import LLMConfig
from hairpin.run.data import rank_indices
from hairpin.run.data.text import Text, standard_library
from hairpin.run.device import device_of
from hairpin.run.launch import launch, warm
from hairpin.run.memory import measured
from hairpin.run.recipes import LLMRecipe, llm_source
from hairpin.run.sequence import Degrees, SequenceJob, make_program, require_possible
from hairpin.run.sequence_train import Batch, Program
from hairpin.run.steps import held_bytes
from hairpin.units import parse_rate

KINDS = ("pp", "ddp", "fsdp", "sp", "tp")  # of an axis, the outermost of them first
_AXES = ("pp", "dp", "sp", "tp")
_SEND_NOTHING = ("recv_", "barrier", "wait_tensor", "_wrap_tensor_autograd")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        layouts: as :func:`read_layout` takes them; all of :func:`usual_layouts` if empty.
        hosts: None: every rank has its own link; else ranks share one of so many uplinks.
        rates: of each rank's link, or each host's.
        inner_rate: of links inside a host.
        method: how attention crosses the ranks of a row.
        virtual_flops_per_s: of the device that is played; None: real kernels.
    """

    ranks: int = 4
    layouts: Sequence[str] = ()
    hosts: int | None = None
    rates: Sequence[str] = ("200mbit", "1gbit")
    inner_rate: str = "unlimited"
    length: int = 128
    batch_size: int = 8
    method: str = "ring"
    rounds: int = 2
    virtual_flops_per_s: float | None = 10e9

    @property
    def recipe(self) -> LLMRecipe:
        """The small model, with as many key/value heads as heads, so that four ranks share them."""
        usual = llm_source()
        model: LLMConfig = replace(usual.model, kv_heads=usual.model.heads)
        return replace(usual, model=model, length=self.length, batch_size=self.batch_size)


@dataclass(frozen=True)
class Layout:
    """One way to share out a step.

    Attributes:
        axes: kind and degree, outermost first.
    """

    axes: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """As it is read."""
        return " ".join(f"{kind}{degree}" for kind, degree in self.axes)

    @property
    def mesh_degrees(self) -> dict[str, int]:
        """Degrees of all mesh axes, in this layout's order."""
        named = {"dp" if "dp" in kind else kind: degree for kind, degree in self.axes}
        return dict.fromkeys((axis for axis in _AXES if axis not in named), 1) | named

    def job(self, settings: Settings) -> SequenceJob:
        """What ``hairpin train llm`` would be asked to do."""
        degrees = Degrees(**self.mesh_degrees)
        parallel = next((kind for kind, _ in self.axes if "dp" in kind), None)
        return SequenceJob(
            recipe=settings.recipe,
            out_dir=Path(),
            degrees=degrees,
            data_parallel=parallel,
            method=settings.method,
            microbatches=degrees.pp,
            last_step=1,
        )

    def refusal(self, settings: Settings) -> str | None:
        """Why the model cannot be shared out so; None if it can."""
        job = self.job(settings)
        try:
            if job.degrees.ranks != settings.ranks:
                raise MeshError(f"{self.name} is of {job.degrees.ranks} ranks")
            require_possible(
                job.recipe,
                job.degrees,
                microbatches=job.microbatches,
                data_parallel=job.data_parallel,
            )
        except HairpinError as error:
            return str(error)
        return None


def read_layout(text: str) -> Layout:
    """Read ``"fsdp2 sp2"``: kinds of axes and their degrees, outermost first.

    Raises:
        MeshError: an unknown kind, no degree, or a kind twice.
    """
    found = [re.fullmatch(r"([a-z]+)(\d+)", word) for word in text.split()]
    axes = [(match[1], int(match[2])) for match in found if match]
    names = [kind.replace("fsdp", "dp").replace("ddp", "dp") for kind, _ in axes]
    sound = len(axes) == len(found) > 0 and len(set(names)) == len(names)
    if not sound or not all(kind in KINDS and degree for kind, degree in axes):
        raise MeshError(
            f"cannot read the layout {text!r}; write each of {', '.join(KINDS)} at most once with "
            "a number of ranks, ddp or fsdp, outermost first, for example 'fsdp2 sp2'"
        )
    return Layout(tuple(axes))


def usual_layouts(ranks: int) -> list[str]:
    """Each way alone; all ways that share out twos; those of sp and tp in both orders."""
    found = [f"{kind}{ranks}" for kind in KINDS]
    twos = ranks.bit_length() - 1
    if ranks == 2**twos and twos > 1:
        for kinds in combinations(KINDS, twos):
            if {"ddp", "fsdp"} <= {*kinds} or {"ddp", "tp"} <= {*kinds}:
                continue
            found.append(" ".join(f"{kind}2" for kind in kinds))
            if {"sp", "tp"} <= {*kinds}:
                found.append(found[-1].replace("sp2 tp2", "tp2 sp2"))
    return found


def measure(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Check and count every layout, then time it at all rates. Gives plain data.

    Where no network can be emulated, ranks run over the loopback and only ``"unlimited"`` is
    measured; ``say`` and the result's ``"wire"`` tell so.

    Raises:
        MeshError: a layout that cannot be read.
        UnitError: a rate that cannot be read.
    """
    layouts = [read_layout(text) for text in settings.layouts or usual_layouts(settings.ranks)]
    refused = {layout.name: layout.refusal(settings) for layout in layouts}
    layouts = [layout for layout in layouts if refused[layout.name] is None]
    rates, inner = emulated_rates(settings.rates), parse_rate(settings.inner_rate)
    described, note = machine(), network_note()
    warm()
    text = Text(standard_library("train"), settings.length, seed=settings.recipe.seed)
    say(f"one process, and {len(layouts)} layouts that have to give its losses")
    alone = launch(_count_rank, 1, Loopback(), settings, [Layout((("sp", 1),))], text)[0][0]
    counted = launch(_count_rank, settings.ranks, Loopback(), settings, layouts, text)
    say(_compute_in_words(settings))
    say(note)
    runs = []
    for rate, rate_bits_per_s in rates.items():
        say(f"timing at {rate}")
        with open_network(
            settings.ranks,
            rate_bits_per_s=rate_bits_per_s,
            hosts=settings.hosts,
            inner_rate_bits_per_s=inner if settings.hosts else None,
        ) as wire:
            timed = launch(_time_rank, settings.ranks, wire, settings, layouts, text)
        runs.append({"rate": rate, "layouts": _timed_rows(layouts, timed)})
    return {
        "benchmark": "4d",
        "machine": described,
        "wire": note,
        "compute": _compute_in_words(settings),
        "settings": asdict(settings),
        "losses": alone["losses"],
        "refused": {name: reason for name, reason in refused.items() if reason is not None},
        "layouts": _counted_rows(layouts, counted, alone["losses"]),
        "runs": runs,
    }


def _compute_in_words(settings: Settings) -> str:
    if settings.virtual_flops_per_s is None:
        return "kernels compute for real: with fewer cores than ranks, they wait for one another"
    return (
        f"matrix products and attention sleep as a device of "
        f"{settings.virtual_flops_per_s / 1e9:g} GFLOP/s would compute; the rest is real"
    )


# --------------------------------------------------------------------------------------- a rank


class Calls(TorchDispatchMode):
    """Counts calls that send something to other ranks, by the name of torch's operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they come again with what is in them
        space, _, name = func._schema.name.partition("::")
        if "c10d" in space and name not in _SEND_NOTHING:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class _Trial:
    """One layout's program on this rank, and the batches that it is given."""

    def __init__(self, layout: Layout, settings: Settings, text: Text) -> None:
        self.mesh: Mesh = init_mesh(device_type="cpu", **layout.mesh_degrees)
        self.job = layout.job(settings)
        self.program: Program = make_program(self.job, self.mesh)
        self.text = text

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        rank, ranks = self.mesh.rank("dp"), self.mesh.size("dp")
        size = self.job.recipe.batch_size
        return self.text.batch(rank_indices(step, batch_size=size, rank=rank, ranks=ranks))

    def step(self) -> None:
        """Train one step."""
        self.program.update(0, self.program.backward(self.batch(0)))


def _count_rank(
    wire: Wire, settings: Settings, layouts: Sequence[Layout], text: Text
) -> list[dict[str, Any]]:
    """Losses of two steps, and what the second calls and holds, by layout."""
    join(wire)
    return [_counted(_Trial(layout, settings, text)) for layout in layouts]


def _counted(trial: _Trial) -> dict[str, Any]:
    """Of two steps: the second one's loss comes of the first one's gradients."""
    losses = [trial.program.backward(trial.batch(0))]
    trial.program.update(0, losses[0])
    batch = trial.batch(1)
    with Calls() as calls:
        with measured(device_of(trial.mesh)) as peak:
            losses.append(trial.program.backward(batch))
        trial.program.update(1, losses[1])
    return {
        "losses": losses,
        "calls": dict(calls.count),
        "held_bytes": held_bytes(trial.program.state.model),
        "peak_bytes": peak.peak_bytes,
    }


def _time_rank(
    wire: Wire, settings: Settings, layouts: Sequence[Layout], text: Text
) -> dict[str, Any]:
    """Samples of a step of each layout in turn, and what left each host meanwhile."""
    world = join(wire)
    trials = {layout.name: _Trial(layout, settings, text) for layout in layouts}
    samples: dict[str, list[Sample]] = {name: [] for name in trials}
    between: dict[str, list[tuple[int, ...]]] = {name: [] for name in trials}
    names = list(trials)
    with ExitStack() as stack:
        if settings.virtual_flops_per_s is not None:
            for play in (virtual_attention, virtual_products):
                stack.enter_context(play(settings.virtual_flops_per_s))
        for turn in range(settings.rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                before = _uplinks(wire, world)
                taken = sample(trials[name].step, world, wire)
                after = _uplinks(wire, world)
                if turn:  # the round before warms up
                    samples[name].append(taken)
                    between[name].append(tuple(b - a for a, b in zip(before, after, strict=True)))
    return {"samples": samples, "between": between}


def _uplinks(wire: Wire, world: Mesh) -> tuple[int, ...]:
    """Bytes that have left each host, on the first rank; all ranks wait for it."""
    counts = wire.uplink_bytes_sent() if world.global_rank == 0 else None
    if world.world > 1:
        dist.barrier()
    return counts or ()


# --------------------------------------------------------------------------------------- figures


def _counted_rows(
    layouts: Sequence[Layout], ranks: Sequence[Sequence[Mapping[str, Any]]], truth: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {
            "layout": layout.name,
            "calls": [rank[i]["calls"] for rank in ranks],
            "held_bytes": [rank[i]["held_bytes"] for rank in ranks],
            "peak_bytes": [rank[i]["peak_bytes"] for rank in ranks],
            "losses": ranks[0][i]["losses"],
            "worst_loss_error": max(
                abs(loss - true) / abs(true)
                for rank in ranks
                for loss, true in zip(rank[i]["losses"], truth, strict=True)
            ),
        }
        for i, layout in enumerate(layouts)
    ]


def _timed_rows(
    layouts: Sequence[Layout], ranks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for layout in layouts:
        figures: Figures = combine([rank["samples"][layout.name] for rank in ranks])
        rounds = ranks[0]["between"][layout.name]
        hosts = [sum(counts) / len(rounds) for counts in zip(*rounds, strict=True)]
        rows.append(
            {
                "layout": layout.name,
                "time_s": figures.time_s,
                "times_s": figures.times_s,
                "wire_bytes": figures.wire_bytes,
                "host_bytes": hosts or None,
            }
        )
    best_s = min(cast(float, row["time_s"]) for row in rows)
    return [row | {"over_best": cast(float, row["time_s"]) / best_s} for row in rows]
