"""Folding: a model and a target give a structure with what the model thinks of it.

Dims: r, i, j residues of all chains, one after another.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hairpin.comm.mesh import Mesh
from hairpin.errors import FoldInputError, MemoryBudgetError, WeightsError
from hairpin.models.alphafold import confidence, presets, weights
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.model import AlphaFold
from hairpin.models.alphafold.recognise import config_from
from hairpin.planning.apply import detach, parallelize
from hairpin.planning.axial.attach import AxialSplit
from hairpin.planning.loops.budget import Progress
from hairpin.planning.make import plan
from hairpin.proteins import metrics
from hairpin.proteins.metrics import Violations
from hairpin.proteins.pipeline import Batch, monomer_features, multimer_features
from hairpin.proteins.sizes import Sizes
from hairpin.proteins.structures import Chain
from hairpin.proteins.write import predicted_chain, write_mmcif, write_pdb
from hairpin.run.fold_count import ALONE, within
from hairpin.run.fold_inputs import FoldTarget
from hairpin.run.memory import measured
from hairpin.run.steps import over_ranks
from hairpin.run.trace import Recording

Floats = NDArray[np.floating[Any]]
OnBlock = Callable[[int, int, int], None]

DOWNLOAD = """
the parameters of AlphaFold are public but are not part of Hairpin; download
  https://storage.googleapis.com/alphafold/alphafold_params_2022-12-06.tar
(5.3 GB, by Google DeepMind, licence CC BY 4.0), unpack it with tar -xf, and give one or more of its
files: --params params_model_1_ptm.npz for a single chain, params_model_1_multimer_v3.npz for a
complex. To rehearse without them: --random-weights tiny
""".strip()

REHEARSAL = "REHEARSAL WITH RANDOM WEIGHTS ({}): the structure and its scores mean nothing"


@dataclass(frozen=True, eq=False)
class FoldModel:
    """A model with its parameters.

    Attributes:
        name: of the parameters' file, or of the preset.
        rehearsal: what every output is marked with where the parameters are random; else "".
    """

    name: str
    network: AlphaFold
    rehearsal: str = ""

    @property
    def config(self) -> AlphaFoldConfig:
        """The network's settings."""
        return self.network.config


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one model predicts for a target.

    Attributes:
        model: its name.
        chains: the structure.
        plddt: ``[r]``, 0 to 100.
        pae: predicted aligned error ``[i, j]`` in Angstrom; None where the model has no such head.
        max_pae: the largest it can be.
        ptm, iptm: predicted TM-scores, 0 to 1; None where the model has none.
        ranking: models are ranked by this: mean pLDDT, or of a complex 0.8 ipTM + 0.2 pTM.
        distances: expected distance ``[i, j]`` in Angstrom by the distogram.
        recycles: times the model ran before the last.
        peak_bytes: most that tensors took beyond parameters and features, on any rank.
        rehearsal: not empty where the parameters are random.
    """

    model: str
    chains: tuple[Chain, ...]
    plddt: Floats
    pae: Floats | None
    max_pae: float
    ptm: float | None
    iptm: float | None
    ranking: float
    distances: Floats
    recycles: int
    violations: Violations
    seed: int
    time_s: float
    peak_bytes: int
    rehearsal: str = ""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Residues of each chain."""
        return tuple(len(chain.sequence) for chain in self.chains)

    @property
    def mean_plddt(self) -> float:
        """Over all residues."""
        return float(self.plddt.mean())


# ----------------------------------------------------------------------------------------- models


def model_from_file(path: Path, **changes: Any) -> FoldModel:
    """A model with the parameters of an npz or safetensors file, told from its arrays.

    Args:
        changes: of the settings, such as ``recycle_tolerance=0.5``.

    Raises:
        WeightsError: the file is missing or damaged, or is of no model that is known.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file; {DOWNLOAD}")
    name = path.name.removesuffix(path.suffix).removeprefix("params_")
    if path.suffix == ".safetensors":
        network = _built(replace(weights.config_from_safetensors(path), **changes))
        weights.load_safetensors(network, path)
    else:
        with weights.open_npz(path) as arrays:
            network = _built(replace(config_from(arrays, path), **changes))
        weights.load(network, path)
    return FoldModel(name, network)


def random_model(
    preset: str, *, seed: int = 0, multimer: bool = False, **changes: Any
) -> FoldModel:
    """A model with random parameters, for rehearsals alone.

    Args:
        preset: such as ``"tiny"`` or ``"model_1_ptm"``.
        multimer: of ``tiny``, the one for complexes.

    Raises:
        RecipeError: there is no such preset.
    """
    config = presets.tiny(multimer=multimer) if preset == "tiny" else presets.named(preset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _built(replace(config, **changes))
        _stir(network)
    return FoldModel(f"random_{config.name}", network, REHEARSAL.format(config.name))


def require_fit(config: AlphaFoldConfig, target: FoldTarget) -> None:
    """Raise unless the model can fold so many chains.

    Raises:
        FoldInputError: several chains, and a model for one.
    """
    if len(target.chains) > 1 and not config.multimer:
        raise FoldInputError(
            f"{target.name} has {len(target.chains)} chains and {config.name} folds one; give the "
            "parameters of a multimer model, such as params_model_1_multimer_v3.npz, or one FASTA "
            "file for each chain"
        )


def _built(config: AlphaFoldConfig) -> AlphaFold:
    return AlphaFold(config).eval().requires_grad_(False)


def _stir(network: nn.Module) -> None:
    """Layers that begin at zero would leave every rehearsal the same: give them small values."""
    for parameter in network.parameters():
        if parameter.ndim == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


# ------------------------------------------------------------------------------------ predictions


def predict(
    model: FoldModel,
    target: FoldTarget,
    *,
    seed: int = 0,
    recycles: int | None = None,
    memory: int | str | None = None,
    split: AxialSplit | None = None,
    device: torch.device | None = None,
    recording: Recording | None = None,
    on_block: OnBlock | None = None,
    progress: Progress | None = None,
) -> Prediction:
    """Fold a target with one model. The same seed gives the same structure.

    Args:
        recycles: times to run before the last; the model's own number if left out.
        memory: bytes that activations may take, as in ``hp.plan``; those of each rank, which is
            split in more chunks where they would not suffice.
        split: how the model is split over a live mesh, each of whose ranks calls this and gets the
            whole structure.
        recording: gets what every rank does and sends along the run, to write once the prediction
            is safe.
        on_block: called with (recycle from 0, blocks done in it, blocks of it) as it runs.
        progress: called with a few words as a plan for ``memory`` is searched.

    Raises:
        FoldInputError: the model cannot fold so many chains.
        MemoryBudgetError: ``memory`` cannot be met, or the device has not enough.
        DisagreementError: ranks were given different targets.
    """
    require_fit(model.config, target)
    device = device or torch.device("cpu")
    network = model.network.to(device)
    times = model.config.recycles if recycles is None else recycles
    names = network.needed_features
    batches = [
        {name: batch[name].to(device) for name in names}
        for batch in features_of(model.config, target, times, seed)
    ]
    args: tuple[Any, ...] = (batches if len(batches) > 1 else batches[0],)
    kwargs: dict[str, Any] = {"recycles": times}
    if model.config.multimer:
        kwargs["generator"] = torch.Generator(device).manual_seed(seed)
    began = time.perf_counter()
    with torch.no_grad(), out_of_memory(target, device):
        if split is not None and split.plan.ranks > 1:
            if memory is not None:
                split = split_within(model, target, split, memory, recycles=times)
            parallelize(network, split.plan, split.mesh)
        elif memory is not None:
            _keep_under(network, (args, kwargs), batches[0], memory, progress)
        try:
            mesh = Mesh(sp=1) if split is None else split.mesh
            tracing = nullcontext() if recording is None else recording.of(network, mesh)
            with tracing, measured(device) as peak, _told(network, on_block):
                out = network(*args, **kwargs)
        finally:
            detach(network)
    spent_s = time.perf_counter() - began
    peaks = [(peak.peak_bytes,)] if split is None else over_ranks(split.mesh, peak.peak_bytes)
    return prediction_of(model, target, out, seed=seed, time_s=spent_s, peak_bytes=max(peaks)[0])


def split_within(
    model: FoldModel,
    target: FoldTarget,
    split: AxialSplit,
    memory: int | str,
    *,
    recycles: int,
) -> AxialSplit:
    """A split in as few chunks as keep each of its ranks within a budget. Nothing is sent.

    Args:
        memory: bytes that activations may take on a rank, or text such as ``"2GiB"``.

    Raises:
        MemoryBudgetError: chunks do not reach it; on all ranks alike.
    """
    (batch, *_) = features_of(model.config, target, 0, seed=0)  # shapes are those of any seed
    shapes = _shapes({name: batch[name] for name in model.network.needed_features})
    plan = within(model.config, shapes, memory, recycles=recycles, over=split.plan)
    return replace(split, plan=plan)


def _keep_under(
    network: AlphaFold,
    call: tuple[Any, dict[str, Any]],
    batch: Batch,
    memory: int | str,
    progress: Progress | None,
) -> None:
    """Keep a call within a budget: in chunks of rows, which are counted in seconds, or in loops."""
    with suppress(MemoryBudgetError):
        recycles = call[1]["recycles"]
        chunked = within(network.config, _shapes(batch), memory, recycles=recycles, over=ALONE)
        if chunked != ALONE:
            parallelize(network, chunked, Mesh(sp=1))
        return
    config = network.config
    network.config = replace(config, recycle_tolerance=None)  # shapes alone never converge
    try:
        parallelize(network, plan(network, call, memory=memory, progress=progress))
    finally:
        network.config = config


def _shapes(batch: Batch) -> Batch:
    return {name: x.to("meta") for name, x in batch.items()}


def features_of(
    config: AlphaFoldConfig, target: FoldTarget, recycles: int, seed: int
) -> list[Batch]:
    """What the model takes, one batch for each time it runs, or one for all."""
    sizes = Sizes.of(replace(config.data, crop_size=None), recycles=recycles)
    if config.multimer:
        return multimer_features(target.chains, sizes=sizes, seed=seed)
    (chain,) = target.chains
    return monomer_features(
        chain.sequence, chain.alignments, chain.templates, sizes=sizes, seed=seed
    )


def prediction_of(
    model: FoldModel,
    target: FoldTarget,
    out: Mapping[str, Any],
    *,
    seed: int,
    time_s: float = 0.0,
    peak_bytes: int = 0,
) -> Prediction:
    """The model's outputs as a structure with scores."""
    plddt = confidence.plddt(out["predicted_lddt"]["logits"])
    pae, max_pae, ptm, iptm = _aligned_error(out, several=len(target.chains) > 1)
    chains = _chains(target, out["structure_module"]["final_atom_positions"], plddt)
    return Prediction(
        model=model.name,
        chains=chains,
        plddt=_array(plddt),
        pae=None if pae is None else _array(pae),
        max_pae=max_pae,
        ptm=None if ptm is None else float(ptm),
        iptm=None if iptm is None else float(iptm),
        ranking=confidence.ranking(plddt, ptm=ptm, iptm=iptm),
        distances=_array(expected_distances(out["distogram"])),
        recycles=int(out["num_recycles"]),
        violations=metrics.violations(chains),
        seed=seed,
        time_s=time_s,
        peak_bytes=peak_bytes,
        rehearsal=model.rehearsal,
    )


def expected_distances(distogram: Mapping[str, Tensor]) -> Tensor:
    """Expected distance ``[i, j]`` in Angstrom of the distogram's ``logits[i, j, b]``.

    The last bin, which is open, counts as one as wide as the others.
    """
    edges = distogram["bin_edges"]
    step = edges[1] - edges[0]
    centres = torch.cat([edges - step / 2, edges[-1:] + step / 2])
    return (distogram["logits"].softmax(-1) * centres).sum(-1)


def ranked(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The best first."""
    return sorted(predictions, key=lambda prediction: -prediction.ranking)


def write_structures(
    prediction: Prediction, folder: Path, *, suffix: str = ""
) -> tuple[Path, Path]:
    """Write the structure as ``MODEL.pdb`` and ``MODEL.cif``; a rehearsal is marked in both.

    Raises:
        OutputError: a file cannot be written.
        MissingExtraError: gemmi is absent.
    """
    remarks = [prediction.rehearsal] if prediction.rehearsal else []
    remarks.append(f"Predicted by {prediction.model}, seed {prediction.seed}; B-factors are pLDDT.")
    scores = {"pTM": prediction.ptm, "ipTM": prediction.iptm}
    known = {name: value for name, value in scores.items() if value is not None}
    pdb = folder / f"{prediction.model}{suffix}.pdb"
    cif = folder / f"{prediction.model}{suffix}.cif"
    write_pdb(pdb, prediction.chains, remarks=remarks)
    write_mmcif(cif, prediction.chains, remarks=remarks, metrics=known)
    return pdb, cif


def scores_of(target: FoldTarget, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Everything but the structures as plain data, the best model first."""
    return {
        "target": target.name,
        "rehearsal": next((p.rehearsal for p in predictions if p.rehearsal), None),
        "chains": [
            {"name": name, "sequence": chain.sequence}
            for name, chain in zip(target.names, target.chains, strict=True)
        ],
        "notes": list(target.notes),
        "models": [_scores(p, rank) for rank, p in enumerate(predictions, start=1)],
    }


def _scores(prediction: Prediction, rank: int) -> dict[str, Any]:
    pae = prediction.pae
    return {
        "rank": rank,
        "model": prediction.model,
        "ranking_score": round(prediction.ranking, 4),
        "mean_plddt": round(prediction.mean_plddt, 4),
        "ptm": _rounded(prediction.ptm),
        "iptm": _rounded(prediction.iptm),
        "recycles": prediction.recycles,
        "seed": prediction.seed,
        "time_s": round(prediction.time_s, 2),
        "peak_bytes": prediction.peak_bytes,
        "violations": asdict(prediction.violations),
        "plddt": [round(float(value), 2) for value in prediction.plddt],
        "max_pae": round(prediction.max_pae, 2),
        "pae": None if pae is None else np.round(pae.astype(np.float64), 2).tolist(),
    }


def digest(prediction: Prediction) -> str:
    """A fingerprint of the atoms, to tell whether two runs gave the same."""
    atoms = b"".join(chain.positions.tobytes() for chain in prediction.chains)
    return hashlib.sha256(atoms).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- pieces


@contextmanager
def out_of_memory(target: FoldTarget, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into an error that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        residues = sum(target.lengths)
        raise MemoryBudgetError(
            f"{target.name}: {residues} residues need more memory than {device} has free "
            f"({str(error).splitlines()[0]}); see what would fit with hairpin fold --estimate, or "
            "give a budget with --memory, which runs what is too large in parts"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text


@contextmanager
def _told(network: AlphaFold, on_block: OnBlock | None) -> Iterator[None]:
    """Tell of every block that is done, by hooks from outside."""
    if on_block is None:
        yield
        return
    blocks = [*network.extra_msa_stack.blocks, *network.evoformer.blocks, network.structure_module]
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        recycle, within = divmod(done - 1, len(blocks))
        on_block(recycle, within + 1, len(blocks))

    hooks = [block.register_forward_hook(count) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _aligned_error(
    out: Mapping[str, Any], *, several: bool
) -> tuple[Tensor | None, float, Tensor | None, Tensor | None]:
    """PAE, the largest it can be, pTM, ipTM; those that there are."""
    head = out.get("predicted_aligned_error")
    if head is None:
        return None, 0.0, None, None
    logits, breaks = head["logits"], head["breaks"]
    pae, largest = confidence.predicted_aligned_error(logits, breaks)
    ptm = confidence.ptm(logits, breaks)
    iptm = confidence.iptm(logits, breaks, head["asym_id"]) if several else None
    return pae, largest, ptm, iptm


def _chains(target: FoldTarget, positions: Tensor, plddt: Tensor) -> tuple[Chain, ...]:
    parts = zip(
        target.names,
        target.chains,
        positions.cpu().split(target.lengths),
        plddt.cpu().split(target.lengths),
        strict=True,
    )
    return tuple(predicted_chain(name, c.sequence, atoms, score) for name, c, atoms, score in parts)


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().float().cpu().numpy()
    return array


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
