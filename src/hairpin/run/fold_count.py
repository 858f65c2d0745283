"""Counting what folding takes: bytes held and sent, operations; nothing is allocated or computed.

Bytes are counted on fake tensors: the model as it is, with two blocks of each stack, because every
further block holds what the second holds. The counts hold for float32 and torch's CPU kernels; a
GPU's allocator rounds up and its kernels may take other scratch memory.

Over several ranks the split model runs the same way, as the first of so many ranks, whose part is
the largest, on a mesh that counts and sends nothing. Counts are then of that rank.

Dims: r residues, s clusters of the MSA, e extra sequences, n sequences, t templates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hairpin.comm.mesh import Mesh
from hairpin.comm.rehearsal import RehearsalMesh
from hairpin.errors import MemoryBudgetError
from hairpin.graph.meter import measure
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.models.alphafold.model import AlphaFold
from hairpin.planning.apply import parallelize
from hairpin.planning.axial.plan import AxialPlan
from hairpin.units import format_bytes, parse_bytes

Say = Callable[[str], None]

ALONE = AxialPlan()
STEADY = 2
"""Recycles, or blocks of a stack, after which more of them hold no more memory."""

_NODES = (512, 896, 1536, 2560)  # residues at which bytes are counted to find the longest
_CHUNKS = (1, 2, 4, 8, 16, 32)  # that a split is tried in, to keep to a budget
_SHARED = ("aatype", "residue_index", "seq_mask", "target_feat", "asym_id", "entity_id", "sym_id")


@dataclass(frozen=True)
class Need:
    """Bytes and operations of one fold.

    Attributes:
        activation_bytes: most that is alive at once beyond parameters and features.
        feature_bytes: of all recycles.
        flops: multiplications and additions of matrix products, all recycles.
        ranks: that the model is split over; all these figures are of the first one.
        chunks: in which a rank computes its rows.
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
    chunks: int = 1
    sent_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Parameters, features and activations."""
        return self.parameter_bytes + self.feature_bytes + self.activation_bytes


def count(
    config: AlphaFoldConfig,
    residues: int,
    *,
    rows: int | None = None,
    recycles: int | None = None,
    with_flops: bool = True,
    over: AxialPlan = ALONE,
) -> Need:
    """Count bytes and operations of folding so many residues.

    Args:
        rows: sequences of the alignment; as many as the model takes if left out.
        over: the ranks that the model is split over; the first one's part is counted.
    """
    times = config.recycles if recycles is None else recycles
    batch = shapes_of(config, residues, rows)
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
        activation_bytes=activation_bytes(config, batch, recycles=times, over=over),
        flops=(times + 1) * _flops(config, batch, over) if with_flops else 0,
        ranks=over.ranks,
        chunks=over.chunks,
        sent_bytes=(times + 1) * _sent(config, batch, over) if with_flops else 0,
    )


def activation_bytes(
    config: AlphaFoldConfig,
    batch: Mapping[str, Tensor],
    *,
    recycles: int,
    over: AxialPlan = ALONE,
) -> int:
    """Most that is alive at once beyond parameters and features, of features of the meta device.

    Args:
        over: how the model is split; the first rank's part is counted.
    """
    held = min(recycles, STEADY)
    batches = [dict(batch) for _ in range(1 if config.multimer else held + 1)]
    given = batches if len(batches) > 1 else batches[0]
    network, _ = _network(_short(config, STEADY), over)
    timeline = measure(network, (given,), {"recycles": held}, device=torch.device("cpu"))
    return timeline.peak_bytes


def within(
    config: AlphaFoldConfig,
    batch: Mapping[str, Tensor],
    memory: int | str,
    *,
    recycles: int,
    over: AxialPlan,
) -> AxialPlan:
    """A split in as few chunks as keep the activations of every rank within a budget.

    Args:
        batch: features of the meta device.
        memory: bytes, or text such as ``"2GiB"``.
        over: the split, in the fewest chunks to try.

    Raises:
        MemoryBudgetError: more chunks do not help any more.
    """
    budget_bytes, held = parse_bytes(memory), [1 << 62]
    for chunks in (over.chunks, *(n for n in _CHUNKS if n > over.chunks)):
        plan = replace(over, chunks=chunks)
        held.append(activation_bytes(config, batch, recycles=recycles, over=plan))
        if held[-1] <= budget_bytes:
            return plan
        if held[-1] >= held[-2]:  # something else holds most
            break
    where = "" if over.ranks == 1 else f" on each of {over.ranks} ranks"
    more = "take more ranks" if over.ranks > 1 else "fold without --estimate: loops may reach lower"
    error = MemoryBudgetError(
        f"activations of {config.name} at {len(batch['aatype'])} residues do not fit into "
        f"{format_bytes(budget_bytes)}{where}: chunks of rows reach {format_bytes(min(held))}; "
        f"allow as much, or {more}"
    )
    error.floor_bytes = min(held)
    raise error


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
        over: AxialPlan = ALONE,
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


def _network(config: AlphaFoldConfig, over: AxialPlan) -> tuple[AlphaFold, Mesh]:
    """The model without storage, split as on the first of some ranks; their mesh, which counts.

    Of one rank only the chunks count: it splits nothing, and has no other to meet.
    """
    over = over if over.ranks > 1 else replace(ALONE, chunks=over.chunks)
    network, mesh = _on_meta(config), RehearsalMesh(0, **over.degrees)
    if over != ALONE:
        parallelize(network, over, mesh)
    return network, mesh


def _sent(config: AlphaFoldConfig, batch: Mapping[str, Tensor], over: AxialPlan) -> int:
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


def _flops(config: AlphaFoldConfig, batch: Mapping[str, Tensor], over: AxialPlan = ALONE) -> int:
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


def shapes_of(config: AlphaFoldConfig, residues: int, rows: int | None) -> dict[str, Tensor]:
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
