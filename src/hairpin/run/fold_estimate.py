"""What folding a target takes, without weights and without a run: bytes counted, time estimated.

Bytes are counted on fake tensors: the model as it is, with two blocks of each stack, because every
further block holds what the second holds. The counts hold for float32 and torch's CPU kernels; a
GPU's allocator rounds up and its kernels may take other scratch memory.

Over several ranks the split model runs the same way, as the first of so many ranks, whose part is
the largest, on a mesh that counts and sends nothing. Counts are then of that rank.

Dims: r residues, s clusters of the MSA, e extra sequences, n sequences, t templates.
"""

import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hairpin.comm.mesh import Mesh
from hairpin.comm.rehearsal import RehearsalMesh
from hairpin.errors import FoldInputError, MemoryBudgetError
from hairpin.graph.meter import measure
from hairpin.models.alphafold import presets, weights
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.models.alphafold.model import AlphaFold
from hairpin.models.alphafold.recognise import config_from
from hairpin.planning.apply import parallelize
from hairpin.planning.axial.plan import plan_axial
from hairpin.planning.axial.way import Passing, Product
from hairpin.proteins.pipeline import monomer_target
from hairpin.run.fold import STEADY
from hairpin.run.fold_inputs import FoldTarget, read_fold_target, targets_in
from hairpin.units import format_bytes, format_time, parse_bytes

Say = Callable[[str], None]

_NODES = (512, 896, 1536, 2560)  # residues at which bytes are counted to find the longest
_COPIES = 40  # of every representation that a block may hold at once, at most
_LOGITS = 3  # of every attention's logits
_CPU_EFFICIENCY = 0.5
_WARM_SIZE = 1024  # of the matrix product that this processor's speed is measured with
_SHARED = ("aatype", "residue_index", "seq_mask", "target_feat", "asym_id", "entity_id", "sym_id")


@dataclass(frozen=True)
class Need:
    """Bytes and operations of one fold.

    Attributes:
        activation_bytes: most that is alive at once beyond parameters and features.
        feature_bytes: of all recycles.
        flops: multiplications and additions of matrix products, all recycles.
        ranks: that the model is split over; all these figures are of the first one.
        sent_bytes: that it sends to the others, all recycles.
    """

    residues: int
    sequences: int
    extra_sequences: int
    recycles: int
    parameter_bytes: int
    feature_bytes: int
    activation_bytes: int
    flops: int
    ranks: int = 1
    sent_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Parameters, features and activations."""
        return self.parameter_bytes + self.feature_bytes + self.activation_bytes


@dataclass(frozen=True)
class Over:
    """The ranks that a model is to be split over.

    Attributes:
        product, passing: see ``hp.plan_axial``.
    """

    ranks: int = 1
    product: Product = "gather"
    passing: Passing = "gather"


ALONE = Over()


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
    over: Over = ALONE,
    progress: Say | None = None,
) -> FoldEstimate:
    """Count what a target takes, and what each known device could take.

    Args:
        fasta: one target's sequences.
        alignments: tell how many sequences there are; without them as many as the model takes.
        params: the model is told from the first file.
        preset: else it is this, else model_1_ptm, or for complexes model_1_multimer_v3.
        recycles: the model's own number if left out.
        over: the ranks to split the model over.

    Raises:
        FoldInputError: a file is missing or malformed.
        RecipeError: there is no such preset.
        WeightsError: ``params`` is of no known model.
    """
    say = progress or (lambda _: None)
    (path,) = _single(targets_in(fasta))
    target = read_fold_target(path, alignments)
    config = _config(params, preset, several=len(target.chains) > 1)
    times = config.recycles if recycles is None else recycles
    rows = _rows_given(target) if alignments else None
    say(f"counting bytes of {config.name} at {sum(target.lengths)} residues")
    need = count(config, sum(target.lengths), rows=rows, recycles=times, over=over)
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
    lines = [
        f"{found.target}: {sizes}, {found.model}, {need.recycles} recycles, float32",
        f"{format_bytes(need.total_bytes)}: {listed}; {need.flops / 1e12:.1f} TFLOP",
        *_of_ranks(need),
        "",
        f"{'device':<26}{'memory':>12}  {'fits':<6}{'time, estimate':>15}{'longest that fits':>20}",
    ]
    for row in found.rows:
        fits, spent = ("yes", format_time(row.time_s)) if row.fits else ("no", "")
        lines.append(
            f"{row.device:<26}{format_bytes(row.memory_bytes):>12}  {fits:<6}{spent:>15}"
            f"{f'{row.longest:,} residues':>20}"
        )
    lines += [
        "",
        "Bytes are counted; times are estimates that assume a part of each device's peak;",
        "the longest is read off between counts: near, not exact.",
        "What does not fit may under --memory, which runs large blocks in parts.",
    ]
    return "\n".join(lines)


def _of_ranks(need: Need) -> list[str]:
    if need.ranks == 1:
        return []
    sent = format_bytes(need.sent_bytes)
    return [f"on the first of {need.ranks} ranks; it sends {sent}, for which no time is reckoned"]


# --------------------------------------------------------------------------------------- counting


def count(
    config: AlphaFoldConfig,
    residues: int,
    *,
    rows: int | None = None,
    recycles: int | None = None,
    with_flops: bool = True,
    over: Over = ALONE,
) -> Need:
    """Count bytes and operations of folding so many residues.

    Args:
        rows: sequences of the alignment; as many as the model takes if left out.
        over: the ranks that the model is split over; the first one's part is counted.
    """
    times = config.recycles if recycles is None else recycles
    batch = _shapes(config, residues, rows)
    held = min(times, STEADY)
    batches = [dict(batch) for _ in range(1 if config.multimer else held + 1)]
    given = batches if len(batches) > 1 else batches[0]
    network, _ = _network(_short(config, STEADY), over)
    timeline = measure(network, (given,), {"recycles": held}, device=torch.device("cpu"))
    features = _nbytes(batch)
    shared = _nbytes({name: value for name, value in batch.items() if _is_shared(name)})
    copies = 0 if config.multimer else times
    return Need(
        residues=residues,
        sequences=len(batch["msa"] if config.multimer else batch["msa_feat"]),
        extra_sequences=0 if config.multimer else len(batch["extra_msa"]),
        recycles=times,
        parameter_bytes=4 * _parameters(config),
        feature_bytes=features + copies * (features - shared),
        activation_bytes=timeline.peak_bytes,
        flops=(times + 1) * _flops(config, batch, over) if with_flops else 0,
        ranks=over.ranks,
        sent_bytes=(times + 1) * _sent(config, batch, over) if with_flops else 0,
    )


@dataclass(frozen=True)
class Curve:
    """Bytes by residues: counted at some lengths, a cubic between them, as attention grows.

    Near, not exact: what the peak consists of changes with the length.
    """

    lengths: tuple[int, ...]
    total_bytes: tuple[int, ...]

    @staticmethod
    def of(
        config: AlphaFoldConfig,
        *,
        rows: int | None = None,
        recycles: int | None = None,
        over: Over = ALONE,
        progress: Say | None = None,
    ) -> "Curve":
        """Count at a few lengths."""
        found = []
        light = _light(config)
        for n, residues in enumerate(_NODES, start=1):
            if progress is not None:
                progress(f"counting bytes at {residues} residues, {n} of {len(_NODES)}")
            need = count(light, residues, rows=rows, recycles=recycles, with_flops=False, over=over)
            extra = 4 * (_parameters(config) - _parameters(light))
            found.append(need.total_bytes + extra)
        return Curve(_NODES, tuple(found))

    def at(self, residues: int) -> float:
        """Bytes at a length: by the cubic through the counts."""
        x, y = np.array(self.lengths, dtype=float), np.array(self.total_bytes, dtype=float)
        others = [np.delete(x, i) for i in range(len(x))]
        terms = [y[i] * np.prod((residues - others[i]) / (x[i] - others[i])) for i in range(len(x))]
        return float(np.sum(terms))

    def longest(self, memory_bytes: int) -> int:
        """The most residues that take no more."""
        low, high = 0, 2 * max(self.lengths)
        while self.at(high) <= memory_bytes:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= memory_bytes else (low, middle)
        return low


def _short(config: AlphaFoldConfig, blocks: int) -> AlphaFoldConfig:
    return replace(
        config,
        evoformer_blocks=min(blocks, config.evoformer_blocks),
        extra_msa_blocks=min(blocks, config.extra_msa_blocks),
        structure=replace(config.structure, layers=min(blocks, config.structure.layers)),
        recycle_tolerance=None,
    )


def _light(config: AlphaFoldConfig) -> AlphaFoldConfig:
    """With one template of one block, and as many MSA rows.

    Templates hold less than the stacks after them, whatever the length, and take long to count.
    """
    if config.template is None or config.data.max_templates < 2:
        return config
    fewer = config.data.max_templates - 1
    own = 0 if config.data.clusters_hold_templates else fewer
    clusters = config.data.max_msa_clusters + own
    return replace(
        config,
        template=replace(config.template, blocks=1),
        data=replace(config.data, max_templates=1, max_msa_clusters=clusters),
    )


def _on_meta(config: AlphaFoldConfig) -> AlphaFold:
    with torch.device("meta"):
        return AlphaFold(config).eval().requires_grad_(False)


def _network(config: AlphaFoldConfig, over: Over) -> tuple[AlphaFold, Mesh]:
    """The model without storage, split as on the first of some ranks; their mesh, which counts."""
    network, mesh = _on_meta(config), RehearsalMesh(0, sp=over.ranks)
    if over.ranks > 1:
        parallelize(network, plan_axial(mesh, product=over.product, passing=over.passing), mesh)
    return network, mesh


def _sent(config: AlphaFoldConfig, batch: Mapping[str, Tensor], over: Over) -> int:
    """Bytes that the first rank sends in one run: the blocks of a stack but the last send alike."""
    if over.ranks == 1:
        return 0
    first = {"extra_msa_stack": 0, "evoformer": 0}
    network, mesh = _network(_short(config, STEADY), over)
    for stack, module in network.named_children():
        if stack in first and isinstance(module, EvoformerStack) and len(module.blocks):
            _watch(module.blocks[0], mesh, first, stack)
    measure(network, (dict(batch),), {"recycles": 0}, device=torch.device("cpu"))
    total = mesh.traffic.bytes_sent
    blocks = {"extra_msa_stack": config.extra_msa_blocks, "evoformer": config.evoformer_blocks}
    return total + sum(max(blocks[stack] - STEADY, 0) * sent for stack, sent in first.items())


def _watch(block: nn.Module, mesh: Mesh, sent: dict[str, int], name: str) -> None:
    """Note what is sent while a block runs."""

    def before(*_: Any) -> None:
        sent[name] -= mesh.traffic.bytes_sent

    def after(*_: Any) -> None:
        sent[name] += mesh.traffic.bytes_sent

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def _parameters(config: AlphaFoldConfig) -> int:
    """Their number; all blocks of a stack are alike."""
    one, two = (
        sum(p.numel() for p in _on_meta(_blocks(config, n)).parameters()) for n in ((1, 1), (2, 1))
    )
    three = sum(p.numel() for p in _on_meta(_blocks(config, (1, 2))).parameters())
    evoformer, extra = two - one, three - one
    return one + evoformer * (config.evoformer_blocks - 1) + extra * (config.extra_msa_blocks - 1)


def _blocks(config: AlphaFoldConfig, blocks: tuple[int, int]) -> AlphaFoldConfig:
    return replace(config, evoformer_blocks=blocks[0], extra_msa_blocks=blocks[1])


def _flops(config: AlphaFoldConfig, batch: Mapping[str, Tensor], over: Over = ALONE) -> int:
    """Of one run: counted for one block of each stack, times their number."""
    one_each = _blocks(replace(config, recycle_tolerance=None), (1, 1))
    counts = _flops_by_module(_network(one_each, over)[0], batch)
    total = counts["Global"]
    blocks = {"extra_msa_stack": config.extra_msa_blocks, "evoformer": config.evoformer_blocks}
    for stack, number in blocks.items():
        total += (number - 1) * sum(
            value for name, value in counts.items() if name.endswith(f".{stack}.blocks.0")
        )
    return int(total)


def _flops_by_module(network: AlphaFold, batch: Mapping[str, Tensor]) -> dict[str, int]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, given: Any) -> Any:
            with counter:
                return self.network(given, recycles=0)

    measure(Counted(), (dict(batch),), device=torch.device("cpu"))
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of torch's fused attention on the CPU, whose shapes are ``[batch, heads, length, channels]``.

    torch's counter knows only the kernels of GPUs.
    """
    return int(sdpa_flop_count(query, key, value))


# ---------------------------------------------------------------------------------------- shapes


def _shapes(config: AlphaFoldConfig, residues: int, rows: int | None) -> dict[str, Tensor]:
    """The features that a model reads, as tensors without storage."""
    data, r = config.data, residues
    t = data.max_templates
    integer, real = torch.int64, torch.float32
    one = {"aatype": integer, "residue_index": integer, "seq_mask": real}
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {n: ((r,), d) for n, d in one.items()}
    if config.multimer:
        n = min(rows or 2048, 2048)
        sizes |= dict.fromkeys(("asym_id", "entity_id", "sym_id"), ((r,), integer))
        sizes |= {"msa": ((n, r), integer)}
        sizes |= dict.fromkeys(("deletion_matrix", "msa_mask"), ((n, r), real))
    else:
        clusters = data.clusters
        s = min(clusters, rows or clusters)
        e = data.max_extra_msa if rows is None else max(min(data.max_extra_msa, rows - s), 1)
        sizes |= {"target_feat": ((r, config.target_features), real)}
        sizes |= {"msa_feat": ((s, r, config.msa_features), real), "msa_mask": ((s, r), real)}
        sizes |= {"extra_msa": ((e, r), integer)}
        extra = ("extra_has_deletion", "extra_deletion_value", "extra_msa_mask")
        sizes |= dict.fromkeys(extra, ((e, r), real))
    if config.template is not None:
        mask = "template_all_atom_mask" if config.multimer else "template_all_atom_masks"
        sizes |= {"template_aatype": ((t, r), integer), mask: ((t, r, 37), real)}
        sizes |= {"template_all_atom_positions": ((t, r, 37, 3), real)}
        if not config.multimer:
            sizes |= {"template_mask": ((t,), real), "template_pseudo_beta": ((t, r, 3), real)}
            sizes |= {"template_pseudo_beta_mask": ((t, r), real)}
    return {n: torch.empty(shape, dtype=d, device="meta") for n, (shape, d) in sizes.items()}


def _is_shared(name: str) -> bool:
    """Whether a feature is the same tensor in every recycle."""
    return name in _SHARED or name.startswith("template_")


def _nbytes(batch: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in batch.values())


def _rows_given(target: FoldTarget) -> int:
    """Different sequences of the deepest alignment."""
    return max(len(monomer_target(chain.sequence, chain.alignments).msa) for chain in target.chains)


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
        ranks: that share it; a rank has its part of both.
    """
    a = torch.ones(_WARM_SIZE, _WARM_SIZE)
    a @ a
    began = time.perf_counter()
    for _ in range(3):
        a @ a
    rate = 3 * 2 * _WARM_SIZE**3 / (time.perf_counter() - began)
    threads = f"this CPU, {torch.get_num_threads()} threads"
    name = threads if ranks == 1 else f"{threads}, {ranks} ranks"
    free = free_bytes(torch.device("cpu")) // ranks
    return Device(name, free, rate * _CPU_EFFICIENCY / ranks)


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
    over: Over = ALONE,
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
    over: Over,
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
