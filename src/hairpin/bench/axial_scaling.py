"""Published training times of folding systems, predicted from rehearsals and tables of devices.

A training step is taken to be that of the Evoformer (48 blocks) and of the extra MSA stack (4):
forwards without gradients for recycling, then a forward, and for each block its forward again and
its backward, as activation checkpointing has it. What is left out (templates, embedders, structure
module, losses, optimiser, waiting for data and for the slowest rank) has no part in a prediction
that is not calibrated; in one that is, the factor that makes work fit one published row takes it
in.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hairpin.bench.axial_ways import (
    Method,
    Rehearsal,
    Size,
    build_block,
    fastfold,
    ours,
    rehearsed,
)
from hairpin.comm.topology import Tier
from hairpin.models.alphafold import presets
from hairpin.planning.axial.choose import Manner
from hairpin.planning.axial.cost import Speeds, predict

_BATCH = 128  # proteins a step, in all of these trainings
_RECYCLES = 1.5  # forwards without gradients, in the mean: 0 to 3, each as often
_PARAMETERS = 93.2e6  # of model 1, whose gradients are added up in float32
_STEPS = {"initial": 10_000_000 // _BATCH, "fine-tune": 1_500_000 // _BATCH}


@dataclass(frozen=True)
class Device:
    """What is assumed of the ranks: parts of the makers' figures.

    Attributes:
        links: to ranks of the same host; network: to those of others.
    """

    name: str
    flops_per_s: float
    touched_per_s: float
    links: Tier
    network: Tier


A100 = Device(
    "A100 40 GB: half of 312 TFLOP/s in bfloat16 products, 0.8 of 1.555 TB/s of memory, 0.7 of "
    "NVLink's 300 GB/s each way, 10 us a transfer, 0.8 of 25 GB/s InfiniBand a GPU",
    0.5 * 312e12,
    0.8 * 1.555e12,
    Tier(1e-5, 0.7 * 300e9),
    Tier(2e-5, 0.8 * 25e9),
)


@dataclass(frozen=True)
class Phase:
    """Lengths of a crop in one phase of AlphaFold's training."""

    sequences: int
    extra: int
    residues: int


PHASES = {"initial": Phase(128, 1024, 256), "fine-tune": Phase(512, 5120, 384)}


@dataclass(frozen=True)
class Setup:
    """How a system ran one phase."""

    phase: str
    devices: int
    dap: int


@dataclass(frozen=True)
class System:
    """A system: the way its blocks run, and its phases; the first is what it is calibrated on."""

    name: str
    method: Method
    setups: tuple[Setup, ...]


SYSTEMS = (
    System("OpenFold", fastfold(), (Setup("initial", 128, 1), Setup("fine-tune", 128, 1))),
    System("FastFold", fastfold(), (Setup("initial", 256, 2), Setup("fine-tune", 512, 4))),
)
ASSUMPTIONS = (
    A100.name,
    f"{_BATCH} proteins a step; {_STEPS['initial']} initial steps, {_STEPS['fine-tune']} later",
    f"{_RECYCLES} forwards without gradients in the mean, every block checkpointed",
    "kernels touch what torch's own on the CPU do, in bfloat16; fused ones would touch less",
    "gradients of 93.2 million parameters are added up in float32, behind nothing",
    "dap lies inside a host, data parallelism across hosts",
)
NOT_PREDICTED = (
    "HelixFold: no row in the table",
    "ScaleFold, 2,080 H100, 7.51 min: the table gives neither the steps nor the time of one",
    "FastFold, 7.5 to 9.5 times as fast inference: no absolute time, device or length is given",
)


def predict_published(path: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Predicted beside published, with and without calibration; no rows where there is no table."""
    if not Path(path).is_file():
        say(f"no published figures at {path}: nothing to compare predictions with")
        return {"rows": [], "absent": path}
    with Path(path).open(newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    rows: list[dict[str, Any]] = []
    for system in SYSTEMS:
        say(f"training steps of {system.name}")
        rows += _rows(system, published)
    return {"rows": rows, "assumptions": list(ASSUMPTIONS), "not_predicted": list(NOT_PREDICTED)}


# -------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Step:
    """A training step of one rank, in parts.

    Attributes:
        work_s: of all kernels; waits_s: for transfers between ranks of a protein.
        gradients_s: adding up gradients over the others.
        flops: of one protein, over its ranks.
    """

    work_s: float
    waits_s: float
    gradients_s: float
    flops: float

    def time_s(self, factor: float = 1.0) -> float:
        """With the work so many times as long."""
        return factor * self.work_s + self.waits_s + self.gradients_s


def step_of(method: Method, setup: Setup, device: Device = A100) -> Step:
    """Predict a step: every block kind is rehearsed once, in bfloat16."""
    phase = PHASES[setup.phase]
    config = presets.model_1()
    stacks = (
        (config.evoformer, config.evoformer_blocks, phase.sequences),
        (config.extra_msa, config.extra_msa_blocks, phase.extra),
    )
    speeds = Speeds(device.flops_per_s, device.touched_per_s, device.links, device.links)
    work_s = waits_s = flops = 0.0
    for block_config, blocks, sequences in stacks:
        size = Size(sequences, phase.residues, c_m=block_config.c_m)
        block = build_block(block_config, device="meta")
        trained = _rehearsed(method, size, setup.dap, block, backward=True)
        block.requires_grad_(False)
        recycled = _rehearsed(method, size, setup.dap, block, backward=False)
        assert trained.backward is not None
        for run, times in (
            (recycled.forward, _RECYCLES + 1),  # the forward whose insides are not kept
            (trained.forward, 1.0),
            (trained.backward, 1.0),
        ):
            laid_out = predict(run, speeds)
            work_s += blocks * times * laid_out.compute_s
            waits_s += blocks * times * sum(laid_out.exposed_s)
            flops += blocks * times * run.done.flops * setup.dap
    replicas = setup.devices / setup.dap
    sent = 2 * 4 * _PARAMETERS * (setup.devices - 1) / setup.devices
    gradients_s = device.network.time_s(sent) if replicas > 1 else 0.0
    return Step(work_s, waits_s, gradients_s, flops)


def _rehearsed(method: Method, size: Size, degree: int, block: Any, *, backward: bool) -> Rehearsal:
    return rehearsed(method, size, degree, backward=backward, block=block, dtype=torch.bfloat16)


# -------------------------------------------------------------------------------------- the rows


def _rows(system: System, published: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Steps of both phases, then what follows from them."""
    steps = {setup.phase: step_of(system.method, setup) for setup in system.setups}
    times_s = {s.phase: _published(published, system.name, s.phase) for s in system.setups}
    first = system.setups[0].phase
    fixed_s = steps[first].waits_s + steps[first].gradients_s
    factor = (times_s[first] - fixed_s) / steps[first].work_s
    rows: list[dict[str, Any]] = [
        {
            "system": system.name,
            "what": f"step, {setup.phase}",
            "unit": "s",
            "devices": setup.devices,
            "dap": setup.dap,
            "published": times_s[setup.phase],
            "uncalibrated": steps[setup.phase].time_s(),
            "calibrated": steps[setup.phase].time_s(factor),
            "calibrated_on": setup.phase == first,
            "step": asdict(steps[setup.phase]),
            "factor": factor,
            "with_our_order": _with_our_order(setup, factor),
        }
        for setup in system.setups
    ]
    rows.append(_total(system, steps, factor, published))
    if system.name == "FastFold":
        rows += _aggregate(system, steps["fine-tune"], factor, published)
    return [{**row, **_errors(row)} for row in rows]


def _with_our_order(setup: Setup, factor: float) -> float:
    """The same step by the fastest of our manners, at the same calibration."""
    manners = (Manner("gather"), Manner("ring"), Manner("channels", "gather", 4))
    ways = manners if setup.dap > 1 else manners[:1]
    return min(step_of(ours(manner), setup).time_s(factor) for manner in ways)


def _total(
    system: System,
    steps: Mapping[str, Step],
    factor: float,
    published: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    def days(by: float) -> float:
        return sum(_STEPS[name] * step.time_s(by) for name, step in steps.items()) / 86400

    return {
        "system": system.name,
        "what": "both phases",
        "unit": "days",
        "devices": system.setups[-1].devices,
        "dap": system.setups[-1].dap,
        "published": _figure(published, system.name, "total time"),
        "uncalibrated": days(1.0),
        "calibrated": days(factor),
    }


def _aggregate(
    system: System, step: Step, factor: float, published: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Operations per second of all devices, and what data parallelism leaves of each."""
    common = {"system": system.name, "devices": 512, "dap": 4}
    alone_s = [step.time_s(by) - step.gradients_s for by in (1.0, factor)]
    return [
        {
            **common,
            "what": "all devices",
            "unit": "PFLOP/s",
            "published": _figure(published, system.name, "aggregate throughput"),
            "uncalibrated": _BATCH * step.flops / step.time_s() / 1e15,
            "calibrated": _BATCH * step.flops / step.time_s(factor) / 1e15,
        },
        {
            **common,
            "what": "efficiency of data parallelism",
            "unit": "%",
            "published": _figure(published, system.name, "parallel efficiency"),
            "uncalibrated": 100 * alone_s[0] / step.time_s(),
            "calibrated": 100 * alone_s[1] / step.time_s(factor),
        },
    ]


def _errors(row: Mapping[str, Any]) -> dict[str, float]:
    """Predicted over published, less 1."""
    return {
        f"{name}_error": row[name] / row["published"] - 1 for name in ("uncalibrated", "calibrated")
    }


def _published(published: Sequence[Mapping[str, str]], system: str, phase: str) -> float:
    word = {"initial": "initial training", "fine-tune": "finetune"}[phase]
    return _figure(published, system, "step time", workload=word)


def _figure(
    published: Sequence[Mapping[str, str]], system: str, metric: str, *, workload: str = ""
) -> float:
    return next(
        float(row["value"])
        for row in published
        if (row["system"], row["metric"]) == (system, metric) and workload in row["workload"]
    )
