"""AlphaFold against DeepMind's own numbers: reads an oracle file, runs our model, compares.

An oracle file holds parameters by their public names (``param/...``), features (``feat/...``),
outputs (``out/...``), and maybe the ``loss`` and its gradients (``grad/...``); or single Evoformer
modules with an input and an output each. Which model it is of is read off the arrays.

Two things in such a file are rounding and not result, for a residue beside itself (i = j). The bin
of its aligned error, 0 or 1: see `_Diagonal`. And in the multimer the direction in which its
template sees itself: the difference of two equal vectors, which a fused multiply-add leaves at 1e-7
Angstrom, made as long as 1. That reaches every output. So a multimer's file may hold its outputs
once more as ``exact/...``, of the same code in double precision, where nothing is left there. These
are compared, in double precision too, and the pairs of ``out/...`` must be no farther from ours
than such noise takes ours.

Over several ranks a model runs with its stacks split, and every rank compares the whole outputs,
losses and gradients. Of single modules the whole blocks are split; the others have no split form of
their own and run whole on every rank.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hairpin.comm.agree import require_agreement
from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import DataError
from hairpin.models.alphafold import weights
from hairpin.models.alphafold.confidence import plddt
from hairpin.models.alphafold.config import AlphaFoldConfig, BlockConfig
from hairpin.models.alphafold.evoformer import EvoformerBlock
from hairpin.models.alphafold.losses import total_loss
from hairpin.models.alphafold.losses.heads import aligned_error_bins, aligned_error_loss
from hairpin.models.alphafold.model import AlphaFold
from hairpin.models.alphafold.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    OuterProductMean,
)
from hairpin.models.alphafold.pair import TriangleAttention, TriangleMultiplication
from hairpin.models.alphafold.primitives import Transition
from hairpin.models.alphafold.sampling import FirstRows
from hairpin.planning.apply import parallelize
from hairpin.planning.axial.attach import AxialSplit
from hairpin.planning.axial.msa import arrives_along, evoformer_block
from hairpin.planning.axial.plan import plan_axial
from hairpin.planning.axial.way import Passing, Product

TIMEOUT_S = 300.0
RTOL, ATOL = 1e-4, 2e-5
POSITION = 1e-3  # Angstrom
GRADIENT = 1e-4  # of the largest of each array
_LAYERS = 3  # of the structure module in files of this layout; real models have 8
_PUBLISHED_C_S = 384
_MOST_SETS = 100_000
_PAIR = "representations/pair"
_UNIT_VECTOR = (4, 5, 6)  # which layers of the multimer's template embedding take its coordinates
_DRAWS = 5
_ROUNDING = 1e-6  # gradients this small beside the largest of all are zeros


@dataclass(frozen=True)
class Check:
    """One compared array.

    Attributes:
        name: its name in the file, or of a group of arrays.
        error: the greatest absolute difference; of gradients, relative to the array's largest.
        worst: the greatest error as a share of what is allowed; 1 or less passes.
        note: what has to be known to read it.
    """

    name: str
    error: float
    worst: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """The error is within its tolerance, and is a number."""
        return self.worst <= 1


@dataclass(frozen=True)
class Verdict:
    """All checks of one oracle file.

    Attributes:
        file: its name; ``model``: the preset its arrays tell; ``recycles``: how often it recycled.
        time_s: how long it took.
        ranks: that the model was split over.
    """

    file: str
    model: str
    recycles: int
    checks: tuple[Check, ...]
    time_s: float
    ranks: int = 1

    @property
    def passed(self) -> bool:
        """Every check passed, and there was at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def shipped() -> list[Path]:
    """The oracle files that come with Hairpin."""
    folder = Path(str(files("hairpin.models.alphafold") / "oracle"))
    return sorted(folder.glob("*.npz"))


def verify_on_ranks(
    paths: Sequence[Path],
    *,
    sp: int = 1,
    product: Product = "gather",
    passing: Passing = "gather",
    recycles: int | None = None,
    layers: int | None = None,
) -> list[Verdict]:
    """Compare our model, split over the ranks that call this, with each oracle file.

    Args:
        sp: how many they are.
        product, passing: how the split model's parts meet, see ``hp.plan_axial``.
        recycles, layers: as :func:`verify` takes them.

    Raises:
        DisagreementError: the ranks found different errors.
    """
    mesh = init_mesh(sp=sp, timeout_s=TIMEOUT_S)
    split = AxialSplit(plan_axial(mesh, product=product, passing=passing), mesh)
    verdicts = []
    for path in paths:
        verdict = verify(path, recycles=recycles, layers=layers, split=split)
        errors = ", ".join(f"{check.name} {check.error:.3g}" for check in verdict.checks)
        require_agreement(f"{verdict.file}: {errors}", mesh, "sp")
        verdicts.append(verdict)
    return verdicts


def verify(
    path: str | Path,
    *,
    recycles: int | None = None,
    layers: int | None = None,
    split: AxialSplit | None = None,
) -> Verdict:
    """Compare our model with an oracle file.

    Args:
        path: the file.
        recycles: how often the oracle recycled; read off ``out/num_recycles`` or the file's name
            (``..._recycle1.npz``) if left out.
        layers: layers of the oracle's structure module; read off ``traj`` if left out.
        split: how the model is split over a live mesh, each of whose ranks calls this.

    Raises:
        WeightsError: it is no npz file, or its parameters fit no model.
        DataError: nothing tells how often it recycled, or it holds nothing to compare.
    """
    path = Path(path)
    split = split or AxialSplit(plan_axial(Mesh(sp=1)), Mesh(sp=1))
    start = time.perf_counter()
    with weights.open_npz(path) as file:
        arrays = {name: file[name] for name in file.files}
    if "in/msa" in arrays:
        checks, model, recycles = list(_module_checks(arrays, split)), "Evoformer modules", 0
    else:
        recycles = _recycles(arrays, path) if recycles is None else recycles
        checks, model = _model_checks(arrays, recycles, layers, split)
    if not checks:
        raise DataError(f"{path} holds no output to compare; give an oracle file")
    seconds = time.perf_counter() - start
    ranks = split.plan.ranks
    return Verdict(path.name, model, recycles, tuple(checks), seconds, ranks)


# ------------------------------------------------------------------------------------ modules


def _module_checks(arrays: Mapping[str, np.ndarray], split: AxialSplit) -> Iterator[Check]:
    inputs = {name: torch.from_numpy(arrays[f"in/{name}"]) for name in _INPUTS}
    for name in sorted({name.split("/")[0] for name in arrays} - {"in"}):
        given = {
            array.removeprefix(f"{name}/param/"): value
            for array, value in arrays.items()
            if array.startswith(f"{name}/param/")
        }
        part = min(given).split("/")[0]
        module = _module(name, {k.split("/", 1)[1]: v.shape for k, v in given.items()}).eval()
        weights.load_arrays(module, given, source=name, part=part)
        with torch.no_grad():
            out = _run_module(module, name, inputs, split)
        for suffix, value in out.items():
            array = f"{name}/out{suffix}"
            yield _close(array, value, arrays[array], note=_where(module, split))


_INPUTS = ("msa", "pair", "msa_mask", "pair_mask")


def _where(module: nn.Module, split: AxialSplit) -> str:
    if split.plan.ranks == 1:
        return ""
    return "split" if isinstance(module, EvoformerBlock) else "whole on every rank"


def _run_module(
    module: nn.Module, name: str, inputs: Mapping[str, Tensor], split: AxialSplit
) -> dict[str, Tensor]:
    m, z, msa_mask, pair_mask = inputs.values()
    if isinstance(module, EvoformerBlock):
        m, z = _run_block(module, m, z, (msa_mask, pair_mask), split)
        return {"/msa": m, "/pair": z}
    if isinstance(module, Transition):
        return {"": module(m if name == "msa_transition" else z)}
    if isinstance(module, MSARowAttentionWithPairBias):
        return {"": module(m, z, msa_mask)}
    if isinstance(module, TriangleAttention | TriangleMultiplication):
        return {"": module(z, pair_mask)}
    return {"": module(m, msa_mask)}


def _run_block(
    block: EvoformerBlock, m: Tensor, z: Tensor, masks: tuple[Tensor, Tensor], split: AxialSplit
) -> tuple[Tensor, Tensor]:
    """One block, split; unlike a stack of extra blocks it gives its MSA back too."""
    if split.plan.ranks == 1:
        return block(m, z, *masks)  # type: ignore[no-any-return]
    way = split.way(m.shape[1], m.shape[0])
    m, z = way.part(m, "s r c", arrives_along(block)), way.part(z, "i j c", "j")
    m, z = evoformer_block(block, m, z, masks, way, leaves="r")
    return way.whole(m, "s r c", "r").wait(), way.whole(z, "i j c", "j").wait()


def _module(name: str, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The module of that name, its sizes those of the arrays."""
    if name.endswith("_iteration"):
        return EvoformerBlock(_block_config(shapes, extra=name.startswith("extra")))
    if "transition" in name:
        c, wide = shapes["transition1//weights"]
        return Transition(c, wide // c)
    if name == "outer_product_mean":
        _, c_outer, c_z = shapes["/output_w"]
        return OuterProductMean(shapes["layer_norm_input//scale"][0], c_z, c_outer)
    if name.startswith("triangle_multiplication"):
        fused = "projection//weights" in shapes
        c, c_z = shapes["output_projection//weights"]
        return TriangleMultiplication(c_z, c, outgoing=name.endswith("outgoing"), fused=fused)
    c, heads, _ = shapes["attention//query_w"]
    if name.startswith("triangle_attention"):
        return TriangleAttention(c, heads, starting="starting" in name)
    if name == "msa_row_attention_with_pair_bias":
        return MSARowAttentionWithPairBias(c, shapes["/feat_2d_weights"][0], heads)
    kind = MSAColumnGlobalAttention if "global" in name else MSAColumnAttention
    return kind(c, heads)


def _block_config(shapes: Mapping[str, tuple[int, ...]], *, extra: bool) -> BlockConfig:
    row, node = "msa_row_attention_with_pair_bias", "triangle_attention_starting_node"
    c_m, msa_heads, _ = shapes[f"{row}/attention//query_w"]
    c_z, pair_heads = shapes[f"{node}//feat_2d_weights"]
    return BlockConfig(
        c_m=c_m,
        c_z=c_z,
        msa_heads=msa_heads,
        pair_heads=pair_heads,
        c_outer=shapes["outer_product_mean//output_w"][0],
        c_triangle=shapes["triangle_multiplication_outgoing/output_projection//weights"][0],
        msa_transition_factor=shapes["msa_transition/transition1//bias"][0] // c_m,
        pair_transition_factor=shapes["pair_transition/transition1//bias"][0] // c_z,
        extra=extra,
    )


# ------------------------------------------------------------------------------------ models


def _model_checks(
    arrays: Mapping[str, np.ndarray], recycles: int, layers: int | None, split: AxialSplit
) -> tuple[list[Check], str]:
    given = _under(arrays, "param/")
    config = _config(arrays, given, layers)
    model = AlphaFold(config).eval()
    if config.multimer:
        model.sampling = FirstRows(config.data)
    weights.load_arrays(model, given, source="the oracle's parameters")
    batch = {
        name: torch.from_numpy(value).long() if value.dtype == np.int32 else torch.from_numpy(value)
        for name, value in _under(arrays, "feat/").items()
    }
    exact = _under(arrays, "exact/")
    if exact:
        model.double()
    if split.plan.ranks > 1:
        parallelize(model, split.plan, split.mesh)
    trains = "loss" in arrays
    with torch.set_grad_enabled(trains):
        out = model(batch, recycles=recycles)
    found = dict(_leaves(out)) | _confidences(out)
    wanted = _outputs(exact or _under(arrays, "out/"))
    checks = [
        _close(name, found[name], wanted[name], _tolerance(name))
        for name in sorted(found.keys() & wanted.keys())
    ]
    if exact:
        checks.append(_noise_check(model, batch, recycles, out, arrays[f"out/{_PAIR}"]))
    if trains:
        checks += _loss_checks(model, batch, out, wanted, arrays, mesh=split.mesh)
    checks += [
        Check(name, math.nan, math.nan, "nothing of ours to compare")
        for name in sorted(wanted.keys() - found.keys() - {check.name for check in checks})
    ]
    return checks, config.name


def _config(
    arrays: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray], layers: int | None
) -> AlphaFoldConfig:
    """What the parameters tell, and what only outputs tell: layers, rows of the clustered MSA."""
    config = weights.config_from(given)
    if layers is None:
        traj = arrays.get("out/structure_module/traj")
        small = config.c_s != _PUBLISHED_C_S
        layers = len(traj) if traj is not None else _LAYERS if small else config.structure.layers
    rows = len(arrays["out/representations/msa"])
    return replace(
        config,
        structure=replace(config.structure, layers=layers),
        data=replace(config.data, max_msa_clusters=rows),
        recycle_tolerance=None,
    )


def _recycles(arrays: Mapping[str, np.ndarray], path: Path) -> int:
    if "out/num_recycles" in arrays:
        return int(arrays["out/num_recycles"])
    match = re.search(r"recycle(\d+)", path.name)
    if match is None:
        raise DataError(
            f"{path} does not say how often it recycled (no out/num_recycles, and no recycleN in "
            f"its name); give the number"
        )
    return int(match[1])


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _outputs(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The oracle's outputs by our names: frames and positions are one array, not one a number."""
    wanted = dict(given)
    parts = {
        "frames": [*(f"frames/0/{k}" for k in range(9)), *(f"frames/1/{k}" for k in range(3))],
        "atom_pos": [f"atom_pos/{k}" for k in range(3)],
    }
    for name, numbers in parts.items():
        names = [f"structure_module/sidechains/{number}" for number in numbers]
        if all(part in wanted for part in names):
            stacked = np.stack([wanted.pop(part) for part in names], -1)
            wanted[f"structure_module/sidechains/{name}"] = stacked
    logits = wanted.get("predicted_lddt/logits")
    if logits is not None:
        wanted["plddt"] = plddt(torch.from_numpy(logits)).numpy()
    return wanted


def _confidences(out: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is computed from logits, to see how far their errors reach."""
    return {"plddt": plddt(out["predicted_lddt"]["logits"])}


def _leaves(nested: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


_Tolerance = Callable[[np.ndarray], np.ndarray | float]


def _tolerance(name: str) -> _Tolerance:
    position = re.search(r"positions|traj|affines|atom_pos|frames", name) is not None
    return (lambda _: POSITION) if position else _relative


def _relative(wanted: np.ndarray) -> np.ndarray:
    return np.asarray(ATOL + RTOL * np.abs(wanted))


def _close(
    name: str, found: Tensor, wanted: np.ndarray, tolerance: _Tolerance = _relative, note: str = ""
) -> Check:
    value = found.detach().numpy()
    if value.shape != wanted.shape:
        return Check(name, math.inf, math.inf, f"shape {value.shape}, wanted {wanted.shape}")
    error = np.abs(value.astype(np.float64) - wanted)
    worst = np.where(np.isfinite(error), error / tolerance(wanted), np.inf)
    return Check(name, float(error.max(initial=0)), float(worst.max(initial=0)), note)


def _noise_check(
    model: AlphaFold,
    batch: Mapping[str, Tensor],
    recycles: int,
    out: Mapping[str, Any],
    oracle: np.ndarray,
) -> Check:
    """The file's own pair representation is as near to ours as ours with noise at i = j."""
    ours = out["representations"]["pair"]
    generator = torch.Generator().manual_seed(0)
    path = "template_embedder.template_pair_embedding"
    layers = [model.get_submodule(f"{path}.{place}") for place in _UNIT_VECTOR]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: (_noisy(args[0], generator),))
        for layer in layers
    ]
    spreads = [
        _rms(model(batch, recycles=recycles)["representations"]["pair"] - ours)
        for _ in range(_DRAWS)
    ]
    likely = 2 * sorted(spreads)[_DRAWS // 2]
    for hook in hooks:
        hook.remove()
    error = _rms(torch.from_numpy(oracle) - ours)
    note = f"root mean square; noise at i = j makes {min(spreads):.2g} to {max(spreads):.2g}"
    return Check(f"out/{_PAIR}", error, error / likely, note)


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x[i, j, 1]`` with a coordinate of a random unit vector at i = j."""
    noise = (2 * torch.rand(len(x), generator=generator) - 1).to(x.dtype)
    return x + torch.diag(noise)[..., None]


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


# ------------------------------------------------------------------------------------ losses


def _loss_checks(
    model: AlphaFold,
    batch: Mapping[str, Tensor],
    out: dict[str, Any],
    wanted: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    *,
    mesh: Mesh,
) -> list[Check]:
    loss, parts = total_loss(model.config, batch, out)
    found = dict(_leaves(parts))
    aligned = "predicted_aligned_error/loss"
    names = sorted((found.keys() & wanted.keys()) - {aligned})
    checks = [_close(name, found[name], wanted[name], _loss_tolerance) for name in names]
    weight = model.config.loss.aligned_error
    diagonal = _Diagonal.of(batch, out, weight) if aligned in wanted and weight else None
    if diagonal is not None:
        checks.append(diagonal.check(aligned, wanted[aligned]))
        loss = loss + weight * (float(wanted[aligned]) - found[aligned].detach())
    checks.append(_close("loss", loss, arrays["loss"].reshape(()), _loss_tolerance))
    truth = _under(arrays, "grad/")
    if truth:
        if diagonal is not None:
            loss = loss + weight * (diagonal.loss(diagonal.zeros(truth)) - found[aligned])
        checks += _gradient_checks(model, loss, truth, mesh)
    return checks


def _loss_tolerance(wanted: np.ndarray) -> np.ndarray:
    return np.asarray(1e-4 * np.maximum(1, np.abs(wanted)))


def _gradient_checks(
    model: AlphaFold, loss: Tensor, truth: Mapping[str, np.ndarray], mesh: Mesh
) -> Iterator[Check]:
    model.zero_grad()
    loss.backward()
    sync_grads(model, mesh)
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }
    found = weights.to_arrays(model, grads)
    rounding = _ROUNDING * max(np.abs(value).max(initial=0) for value in truth.values())
    for name in sorted(truth.keys() | found.keys()):
        if name not in truth or name not in found:
            yield Check(f"grad/{name}", math.nan, math.nan, "in one of the two only")
            continue
        largest = float(np.abs(truth[name]).max(initial=0))
        if largest <= rounding:  # what no softmax sees: a constant added to all of its logits
            error = float(np.abs(found[name]).max(initial=0)) / rounding
            yield Check(f"grad/{name}", error, error, "0 but for rounding")
            continue
        error = float(np.abs(found[name] - truth[name]).max(initial=0)) / largest
        yield Check(f"grad/{name}", error, error / GRADIENT)


@dataclass(frozen=True)
class _Diagonal:
    """A residue's aligned error as seen from itself is exactly 0, on the edge of two bins.

    Which bin it falls in is rounding: 1e-7 Angstrom left by a fused multiply-add makes it bin 1.
    So the oracle's loss is known to lie between those with all of the diagonal in bin 0 and in
    bin 1; which entries its gradients had in bin 0 can be told from the gradients of the head.
    """

    pair: Tensor
    logits: Tensor
    bins: Tensor
    mask: Tensor
    weight: float

    @staticmethod
    def of(batch: Mapping[str, Tensor], out: dict[str, Any], weight: float) -> "_Diagonal":
        head = out["predicted_aligned_error"]
        frames = out["structure_module"]["final_affines"]
        bins = aligned_error_bins(head["breaks"], frames, batch["backbone_affine_tensor"])
        mask = batch["backbone_affine_mask"]
        return _Diagonal(out["representations"]["pair"], head["logits"], bins, mask, weight)

    def loss(self, zeros: list[int] | None) -> Tensor:
        """The head's loss with these diagonal entries in bin 0 and the rest in bin 1."""
        bins = self.bins.clone().fill_diagonal_(1)
        if zeros:
            bins[zeros, zeros] = 0
        return aligned_error_loss(self.logits, bins, self.mask)

    def check(self, name: str, wanted: np.ndarray) -> Check:
        """The oracle's loss lies between the two."""
        ends = self.loss(list(range(len(self.bins)))), self.loss(None)
        low, high = sorted(float(end.detach()) for end in ends)
        beyond = max(low - float(wanted), float(wanted) - high, 0.0)
        note = f"oracle {float(wanted):.4f}, ours {low:.4f} to {high:.4f} by rounding at i = j"
        return Check(name, beyond, beyond / 1e-4, note)

    def zeros(self, truth: Mapping[str, np.ndarray]) -> list[int]:
        """The diagonal entries that the oracle's gradients had in bin 0.

        The gradient of the bias counts them, and that of the weights adds up their channels.
        """
        path = f"{weights.ROOT}/predicted_aligned_error_head/logits//"
        share = self.logits.detach().double().softmax(-1)[..., 0]
        pair, scale = self.pair.detach().double(), share.numel() / self.weight
        by_bias = float(truth[f"{path}bias"][0]) * scale
        by_weights = torch.from_numpy(truth[f"{path}weights"][:, 0]).double() * scale
        off = self.bins.clone().fill_diagonal_(1) == 0  # bin 0 away from the diagonal
        count = round(float((share - off.double()).sum()) - by_bias)
        sums = torch.einsum("ij,ijc->c", share - off.double(), pair) - by_weights
        own = pair.diagonal(dim1=0, dim2=1).T  # [r, c_z]
        return _subset(own, sums, count)


def _subset(rows: Tensor, total: Tensor, count: int) -> list[int]:
    """The ``count`` rows that add up to the total; or all but those, if that leaves fewer."""
    n = len(rows)
    if not 0 <= count <= n:
        return []
    few = min(count, n - count)
    if math.comb(n, few) > _MOST_SETS:
        return []
    goal = total if few == count else rows.sum(0) - total
    sets = torch.tensor(list(itertools.combinations(range(n), few)), dtype=torch.long)
    best = sets[(rows[sets].sum(1) - goal).abs().amax(-1).argmin()].tolist()
    return best if few == count else [i for i in range(n) if i not in best]
