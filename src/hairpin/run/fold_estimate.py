"""What folding a target takes, without weights and without a run: bytes counted, time estimated."""

import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from hairpin.errors import FoldInputError, MemoryBudgetError
from hairpin.models.alphafold import presets, weights
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.recognise import config_from
from hairpin.planning.axial.plan import AxialPlan
from hairpin.proteins.pipeline import monomer_target
from hairpin.run.device import usable_cores
from hairpin.run.fold_count import ALONE, Curve, Need, Say, count, shapes_of, within
from hairpin.run.fold_inputs import FoldTarget, read_fold_target, targets_in
from hairpin.units import format_bytes, format_time, parse_bytes

_COPIES = 40  # of every representation that a block may hold at once, at most
_LOGITS = 3  # of every attention's logits
_CPU_EFFICIENCY = 0.5
_WARM_SIZE = 1024  # of the matrix product that this processor's speed is measured with


@dataclass(frozen=True)
class Device:
    """Something to fold on; each rank has one.

    Attributes:
        memory_bytes: that a fold may use.
        flops_per_s: the peak times the part of it that is assumed to be reached.
    """

    name: str
    memory_bytes: int
    flops_per_s: float


@dataclass(frozen=True)
class Row:
    """How a target does on a device.

    Attributes:
        fits: whether it fits as it is, without ``--memory``.
        longest: residues that would fit, with as many sequences.
    """

    device: str
    memory_bytes: int
    fits: bool
    time_s: float
    longest: int


@dataclass(frozen=True)
class FoldEstimate:
    """What ``hairpin fold --estimate`` says of one target."""

    target: str
    model: str
    need: Need
    rows: tuple[Row, ...]


def estimate_fold(
    fasta: Path,
    alignments: Sequence[Path] = (),
    *,
    params: Sequence[Path] = (),
    preset: str | None = None,
    recycles: int | None = None,
    over: AxialPlan = ALONE,
    memory: int | str | None = None,
    progress: Say | None = None,
) -> FoldEstimate:
    """Count what a target takes, and what each known device could take.

    Args:
        fasta: one target's sequences.
        alignments: tell how many sequences there are; without them as many as the model takes.
        params: the model is told from the first file.
        preset: else it is this, else model_1_ptm, or for complexes model_1_multimer_v3.
        recycles: the model's own number if left out.
        over: how to split the model over ranks.
        memory: bytes that activations may take; the model runs in as many chunks as that takes.

    Raises:
        FoldInputError: a file is missing or malformed.
        MemoryBudgetError: chunks do not reach ``memory``.
        RecipeError: there is no such preset.
        WeightsError: ``params`` is of no known model.
    """
    say = progress or (lambda _: None)
    (path,) = _single(targets_in(fasta))
    target = read_fold_target(path, alignments)
    config = _config(params, preset, several=len(target.chains) > 1)
    times = config.recycles if recycles is None else recycles
    rows = _rows_given(target) if alignments else None
    residues = sum(target.lengths)
    say(f"counting bytes of {config.name} at {residues} residues")
    if memory is not None:
        shapes = shapes_of(config, residues, rows)
        over = within(config, shapes, memory, recycles=times, over=over)
    need = count(config, residues, rows=rows, recycles=times, over=over)
    curve = Curve.of(config, rows=rows, recycles=times, over=over, progress=say)
    devices = [*known_devices(), this_device(over.ranks)]
    found = tuple(
        Row(
            device=device.name,
            memory_bytes=device.memory_bytes,
            fits=need.total_bytes <= device.memory_bytes,
            time_s=need.flops / device.flops_per_s,
            longest=curve.longest(device.memory_bytes),
        )
        for device in devices
    )
    return FoldEstimate(target.name, config.name, need, found)


def table(found: FoldEstimate) -> str:
    """An estimate as text."""
    need = found.need
    sizes = f"{need.residues} residues, {need.sequences} + {need.extra_sequences} sequences"
    parts = {
        "parameters": need.parameter_bytes,
        "features": need.feature_bytes,
        "activations at the peak": need.activation_bytes,
    }
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    width = max(26, *(len(row.device) + 2 for row in found.rows))
    headings = f"{'memory':>12}  {'fits':<6}{'time, estimate':>15}{'longest that fits':>20}"
    lines = [
        f"{found.target}: {sizes}, {found.model}, {need.recycles} recycles, float32",
        f"{format_bytes(need.total_bytes)}: {listed}; {need.flops / 1e12:.1f} TFLOP",
        *_parts(need),
        "",
        f"{'device':<{width}}{headings}",
    ]
    for row in found.rows:
        fits, spent = ("yes", format_time(row.time_s)) if row.fits else ("no", "")
        lines.append(
            f"{row.device:<{width}}{format_bytes(row.memory_bytes):>12}  {fits:<6}{spent:>15}"
            f"{f'{row.longest:,} residues':>20}"
        )
    lines += [
        "",
        "Bytes are counted; times are estimates that assume a part of each device's peak;",
        "the longest is read off between counts: near, not exact.",
        "What does not fit may under --memory, which runs large blocks in parts.",
    ]
    return "\n".join(lines)


def _parts(need: Need) -> list[str]:
    lines = [f"rows in {need.chunks} chunks, to keep to --memory"] if need.chunks > 1 else []
    if need.ranks > 1:
        sent = format_bytes(need.sent_bytes)
        lines.append(
            f"on the first of {need.ranks} ranks; it sends {sent}, for which no time is reckoned"
        )
    return lines


# --------------------------------------------------------------------------------------- devices


def known_devices() -> list[Device]:
    """The devices of the table that comes with Hairpin."""
    text = files("hairpin.run").joinpath("devices.toml").read_text(encoding="utf-8")
    return [
        Device(
            name=entry["name"],
            memory_bytes=parse_bytes(entry["memory"]) - parse_bytes(entry["reserved"]),
            flops_per_s=entry["tera_flops"] * 1e12 * entry["efficiency"],
        )
        for entry in tomllib.loads(text)["device"]
    ]


def this_device(ranks: int = 1) -> Device:
    """This machine's processor: the memory that is free, and its speed at a matrix product.

    Args:
        ranks: that share it; a rank has its part of the memory and of the cores, as
            ``hairpin fold --ranks`` gives them.
    """
    cores = usable_cores()
    threads = torch.get_num_threads() if ranks == 1 else max(1, cores // ranks)
    name = f"this CPU, {threads} threads" + ("" if ranks == 1 else f" for each of {ranks} ranks")
    free = free_bytes(torch.device("cpu")) // ranks
    share = 1.0 if ranks == 1 else min(1.0, cores / (ranks * threads))
    return Device(name, free, _product_flops_per_s(threads) * share * _CPU_EFFICIENCY)


def _product_flops_per_s(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(_WARM_SIZE, _WARM_SIZE)
        a @ a
        began = time.perf_counter()
        for _ in range(3):
            a @ a
        return 3 * 2 * _WARM_SIZE**3 / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device; of the CPU within this process's limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except OSError:
        most, used = "max", 0
    if most != "max":
        found.append(int(most) - used)
    return max(min(found), 1)


def require_room(
    config: AlphaFoldConfig,
    target: FoldTarget,
    device: torch.device,
    *,
    recycles: int,
    over: AxialPlan = ALONE,
) -> None:
    """Raise if a fold would not fit, before the system ends it without a word.

    Args:
        over: the ranks that the model is split over, which share the device.

    Raises:
        MemoryBudgetError: with what it needs, what is free, and the length that would fit.
    """
    residues, free = sum(target.lengths), free_bytes(device) // over.ranks
    rows = _rows_given(target)
    if _surely_less(config, residues, rows) <= free:
        return
    need = count(config, residues, rows=rows, recycles=recycles, with_flops=False, over=over)
    if need.total_bytes <= free:
        return
    curve = Curve.of(config, rows=rows, recycles=recycles, over=over)
    each = "" if over.ranks == 1 else f" for each of {over.ranks} ranks"
    error = MemoryBudgetError(
        f"{target.name}: {residues} residues need {format_bytes(need.total_bytes)} with "
        f"{config.name}{each}, and {device} has {format_bytes(free)} free{each}, enough for about "
        f"{curve.longest(free)} residues; give a budget such as --memory "
        f"{max(free // 2**30 - 1, 1)}GiB, which runs what is too large in parts, fold the domains "
        "apart, or take a device with more memory (hairpin fold --estimate lists some)"
    )
    error.floor_bytes = need.total_bytes
    raise error


def require_room_for_ranks(
    fasta: Path,
    alignments: Sequence[Path],
    over: AxialPlan,
    *,
    params: Sequence[Path] = (),
    preset: str | None = None,
    recycles: int | None = None,
) -> None:
    """Raise if ranks that share this machine's memory could not fold a target.

    Args:
        fasta, alignments: the target.
        params, preset: the models, as :func:`estimate_fold` takes them.

    Raises:
        FoldInputError: a file is missing or malformed.
        MemoryBudgetError: as :func:`require_room`.
    """
    target = read_fold_target(fasta, alignments)
    for one in [[path] for path in params] or [[]]:
        config = _config(one, preset, several=len(target.chains) > 1)
        times = config.recycles if recycles is None else recycles
        require_room(config, target, torch.device("cpu"), recycles=times, over=over)


def _surely_less(config: AlphaFoldConfig, residues: int, rows: int) -> int:
    """Bytes that a fold surely stays below, from a few products alone."""
    r, c = residues, config
    s = min(c.data.max_msa_clusters, rows) + c.data.max_templates
    e = min(c.data.max_extra_msa, rows)
    tensors = s * r * c.c_m + e * r * c.c_e + r * r * c.c_z
    heads = max(c.evoformer.msa_heads, c.extra_msa.msa_heads)
    logits = heads * (max(s, e) * r * r + s * s * r) + c.evoformer.pair_heads * r**3
    return 4 * (_COPIES * tensors + _LOGITS * logits)


# ---------------------------------------------------------------------------------------- models


def _rows_given(target: FoldTarget) -> int:
    """Different sequences of the deepest alignment."""
    return max(len(monomer_target(chain.sequence, chain.alignments).msa) for chain in target.chains)


def _config(params: Sequence[Path], preset: str | None, *, several: bool) -> AlphaFoldConfig:
    if params:
        if params[0].suffix == ".safetensors":
            return weights.config_from_safetensors(params[0])
        with weights.open_npz(params[0]) as arrays:
            return config_from(arrays, params[0])
    if preset == "tiny":
        return presets.tiny(multimer=several)
    return presets.named(preset or ("model_1_multimer_v3" if several else "model_1_ptm"))


def _single(paths: Sequence[Path]) -> Sequence[Path]:
    if len(paths) != 1:
        raise FoldInputError(
            f"--estimate is for one target, not for {len(paths)}; name a FASTA file"
        )
    return paths
