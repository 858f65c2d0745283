"""Training a folding model on structures with alignments, with the same losses on every mesh.

Which proteins a step takes, how they are cropped and masked, and every dropout mask follow from the
seed and the number of the example alone, so a run that goes on from a checkpoint ends with the same
bits as one that never stopped, if the ranks are as many. Along ``dp`` ranks share out the proteins
of a step; along ``sp`` they split the model (dynamic axial parallelism) and all take the same one.
A step's loss is the mean over its proteins and gradients are averaged over all ranks, so nothing
depends on which rank does what. Other processes make the examples ahead of time.

Jumper et al. 2021, Suppl. Sec. 1.9 to 1.11. Dims: r residues.
"""

import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from hairpin.comm.agree import require_agreement
from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.comm.transport import Link
from hairpin.errors import MeshError
from hairpin.models.alphafold.losses import total_loss
from hairpin.models.alphafold.model import AlphaFold
from hairpin.planning.apply import parallelize
from hairpin.planning.axial.attach import AxialSplit
from hairpin.planning.axial.plan import plan_axial
from hairpin.planning.axial.way import Passing, Product
from hairpin.proteins import loader
from hairpin.proteins import metrics as scores
from hairpin.proteins.loader import Example, Protein, Proteins
from hairpin.proteins.pipeline import Batch
from hairpin.proteins.residues import ATOM_TYPES
from hairpin.proteins.sizes import Sizes
from hairpin.run import checkpoint, metrics, settings
from hairpin.run.data import rank_indices
from hairpin.run.device import device_of
from hairpin.run.memory import measured
from hairpin.run.progress import StepProgress
from hairpin.run.recipes.fold import FoldRecipe
from hairpin.run.steps import (
    held_bytes,
    load,
    new_state,
    open_log,
    over_ranks,
    require_work,
    save,
    seed_dropout,
    update,
)
from hairpin.units import format_bytes

CA = ATOM_TYPES.index("CA")
TIMEOUT_S = 600.0
SCORES = ("ca_rmsd", "lddt_ca")
Validation = dict[str, dict[str, float]]  # protein -> ca_rmsd in Angstrom, lddt_ca 0 to 1


@dataclass(frozen=True, kw_only=True)
class FoldStepMetrics(metrics.StepMetrics):
    """What one step of a folding model did; see also `metrics.StepMetrics`.

    Attributes:
        proteins: the names of those that this step took.
        fape: frame aligned point error of the backbone after the last layer, their mean.
        distogram: cross-entropy of the distogram, their mean.
        data_wait_s: seconds that the step waited for its examples.
        validation: of each protein, with the averaged weights; None where none was done.
    """

    proteins: list[str]
    fape: float
    distogram: float
    data_wait_s: float
    validation: Validation | None = None


@dataclass(frozen=True, kw_only=True)
class FoldJob:
    """What `train_fold` is asked to do.

    Attributes:
        recipe: every setting that changes the weights.
        proteins: what is trained on, and judged.
        out_dir: gets ``metrics.jsonl`` and ``checkpoints/``.
        resume: folder of a run or of one checkpoint to go on from.
        first_step: steps that it has done; 0 for a new run.
        last_step: steps done at the end, those before a resume included.
        workers: processes of each rank that make examples; 0 to make each when it is asked for.
        keep: newest checkpoints that stay.
        dp: groups of ranks that share out the proteins of a step.
        dap: ranks of a group, which split the model.
        product, passing: how the split model's parts meet, see ``hp.plan_axial``.
    """

    recipe: FoldRecipe
    proteins: tuple[Protein, ...]
    out_dir: Path
    resume: Path | None = None
    first_step: int = 0
    last_step: int
    workers: int = 1
    keep: int = 3
    dp: int = 1
    dap: int = 1
    product: Product = "gather"
    passing: Passing = "gather"


@dataclass(frozen=True, kw_only=True)
class FoldTrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        checkpoint: the last checkpoint.
        metrics: file with one line a step.
        validation: of the averaged weights at the last step.
    """

    step: int
    checkpoint: Path
    metrics: Path
    validation: Validation


OnStep = Callable[[FoldStepMetrics], None]


def train_fold(job: FoldJob, *, on_step: OnStep | None = None) -> FoldTrainResult:
    """Train until ``job.last_step`` and judge every protein with the averaged weights.

    Every one of ``job.dp * job.dap`` ranks calls it.

    Args:
        on_step: called after each step on the first rank.

    Raises:
        FoldInputError: a file of a protein cannot be used.
        MeshError: there are other ranks than these, or more groups than proteins of a step.
        DisagreementError: ranks were given different recipes, or other inputs for one protein.
        OutputError: ``job.out_dir`` cannot be written.
        CheckpointError: ``job.resume`` is damaged or belongs to another model or recipe.
        NumericsError: the loss or a gradient is not finite.
    """
    recipe, out_dir = job.recipe, checkpoint.require_writable(job.out_dir)
    require_shares(recipe, job.dp)
    mesh = init_mesh(dp=job.dp, sp=job.dap, timeout_s=TIMEOUT_S)
    for axis in mesh.axes:
        require_agreement(f"train {json.dumps(settings.to_plain(recipe))}", mesh, axis)
    plan = plan_axial(mesh, product=job.product, passing=job.passing)
    run = _FoldRun(recipe, job.proteins, AxialSplit(plan, mesh))
    source = None if job.resume is None else checkpoint.find(job.resume)
    first_step = 0 if source is None else load(source, run.state, recipe)
    require_work(first_step, job.last_step, source)
    examples = run.examples(first_step, job.last_step, workers=job.workers)
    log = open_log(out_dir, first_step, source) if mesh.global_rank == 0 else None
    row: FoldStepMetrics | None = None
    try:
        for step in range(first_step, job.last_step):
            done = step + 1
            row = run.step(step, examples)
            if done % recipe.validate_every == 0 or done == job.last_step:
                row = replace(row, validation=run.validate())
            if log is not None:
                log.write(row)
                if on_step is not None:
                    on_step(row)
            if done % recipe.checkpoint_every == 0 or done == job.last_step:
                source = save(out_dir, run.state, recipe, step=done, keep=job.keep)
    finally:
        if log is not None:
            log.close()
    assert source is not None
    assert row is not None
    assert row.validation is not None
    return FoldTrainResult(
        step=job.last_step,
        checkpoint=source,
        metrics=out_dir / checkpoint.METRICS_FILE,
        validation=row.validation,
    )


def run_fold_training(job: FoldJob) -> FoldTrainResult:
    """Train while a bar on stderr, of the first rank, shows how it goes."""
    if os.environ.get("RANK", "0") != "0":
        return train_fold(job)
    with StepProgress(job.first_step, job.last_step, figures=fold_figures) as progress:
        return train_fold(job, on_step=progress)


def require_shares(recipe: FoldRecipe, dp: int) -> None:
    """Raise unless every group of ranks has a protein in every step.

    Raises:
        MeshError: there are more groups than proteins in a step.
    """
    if dp > recipe.batch_size:
        raise MeshError(
            f"a step takes {recipe.batch_size} protein{'s'[: recipe.batch_size - 1]}, too few to "
            f"share out over dp={dp} groups of ranks; give --batch-size {dp} or more, or a larger "
            "--dap, so that more ranks split each protein"
        )


def build_fold_model(recipe: FoldRecipe) -> AlphaFold:
    """The recipe's model, with the same weights for the same seed."""
    torch.manual_seed(recipe.seed)
    return AlphaFold(recipe.model).to(getattr(torch, recipe.dtype))


def ca_scores(predicted: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """How near the C-alpha atoms are to the labels of a batch.

    Args:
        predicted: all atoms ``[r, 37, 3]`` in Angstrom.
        batch: with ``all_atom_positions[r, 37, 3]`` and ``all_atom_mask[r, 37]``.

    Returns:
        ``ca_rmsd``, in Angstrom after superposition, and ``lddt_ca``, 0 to 1.
    """
    seen = batch["all_atom_mask"][:, CA].cpu().numpy() > 0
    ours = predicted[:, CA].double().cpu().numpy()[seen]
    true = batch["all_atom_positions"][:, CA].double().cpu().numpy()[seen]
    return {"ca_rmsd": scores.rmsd(ours, true), "lddt_ca": scores.lddt(ours, true)[0]}


def fold_figures(row: metrics.StepMetrics) -> str:
    """Loss, backbone error, memory and, where there is one, the validation."""
    assert isinstance(row, FoldStepMetrics)
    text = (
        f"loss {row.loss:.3f}  FAPE {row.fape:.3f}  {row.samples_per_s:.2f} proteins/s  "
        f"peak {format_bytes(max(row.peak_memory_bytes))}"
    )
    if row.validation is None:
        return text
    judged = (f"{name} {score['ca_rmsd']:.2f}" for name, score in row.validation.items())
    return f"{text}  Ca-RMSD {', '.join(judged)} Å"


class _FoldRun:
    """The moving parts of a run on this rank: model and training state, split, data."""

    def __init__(
        self, recipe: FoldRecipe, proteins: Sequence[Protein], split: AxialSplit | None = None
    ) -> None:
        self.recipe = recipe
        self.mesh = mesh = Mesh(dp=1, sp=1) if split is None else split.mesh
        self.device = device_of(mesh)
        self.model = build_fold_model(recipe).to(self.device).train()
        if split is not None and split.plan.ranks > 1:
            parallelize(self.model, split.plan, mesh)
        self.state = new_state(self.model, recipe)
        self.data = Proteins(
            proteins,
            sizes=Sizes.of(recipe.model.data, recycles=recipe.model.recycles),
            seed=recipe.seed,
            clamped=recipe.clamped,
        )
        for index in range(min(len(proteins), self.data.keep)):
            self.data.target(index)  # a bad file is told of now, and workers inherit what was read
        self.peak_bytes: list[int] | None = None

    def share(self, step: int) -> range:
        """The numbers of this group's examples of a step."""
        mesh, count = self.mesh, self.recipe.batch_size
        return rank_indices(step, batch_size=count, rank=mesh.rank("dp"), ranks=mesh.size("dp"))

    def examples(self, first_step: int, last_step: int, *, workers: int) -> Iterator[Example]:
        """This group's examples of these steps, in order."""
        whole_from = self.recipe.whole_from
        turn = last_step if whole_from is None else min(max(whole_from, first_step), last_step)
        parts = [(self.data, first_step, turn), (_uncropped(self.data), turn, last_step)]
        return itertools.chain.from_iterable(  # the second starts its workers when its turn comes
            loader.load_numbers(data, self._numbers(start, stop), workers=workers)
            for data, start, stop in parts
            if start < stop
        )

    def _numbers(self, first_step: int, last_step: int) -> list[int]:
        return [number for step in range(first_step, last_step) for number in self.share(step)]

    def step(self, step: int, examples: Iterator[Example]) -> FoldStepMetrics:
        """One optimizer step, counted from 0."""
        recipe, mesh = self.recipe, self.mesh
        start_s, sent = time.perf_counter(), mesh.traffic.snapshot()
        taken = list(itertools.islice(examples, len(self.share(step))))
        wait_s = time.perf_counter() - start_s
        if step == recipe.whole_from:
            self.peak_bytes = None  # it is higher from here on
        with ExitStack() as stack:
            peak = None if self.peak_bytes else stack.enter_context(measured(self.device))
            loss, fape, distogram = self._gradients(taken)
        peak_bytes = 0 if peak is None else held_bytes(self.model) + peak.peak_bytes
        figures = over_ranks(mesh, mesh.traffic.since(sent).bytes_sent, peak_bytes)
        self.peak_bytes = self.peak_bytes or [of_rank for _, of_rank in figures]
        norm = update(self.state, recipe, step, loss)
        time_s = time.perf_counter() - start_s
        first = step * recipe.batch_size
        return FoldStepMetrics(
            step=step + 1,
            loss=loss,
            lr=recipe.learning_rate(step),
            grad_norm=norm,
            samples_per_s=recipe.batch_size / time_s,
            bytes_sent=[sent_bytes for sent_bytes, _ in figures],
            peak_memory_bytes=self.peak_bytes,
            time_s=time_s,
            proteins=[self._name(first + place) for place in range(recipe.batch_size)],
            fape=fape,
            distogram=distogram,
            data_wait_s=wait_s,
        )

    def validate(self) -> Validation:
        """Every protein whole, predicted with the averaged weights; groups share them out."""
        mesh, proteins = self.mesh, self.data.proteins
        found = torch.zeros(len(proteins), len(SCORES), dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for index in range(mesh.rank("dp"), len(proteins), mesh.size("dp")):
                recycles = self.recipe.model.recycles
                batches = self._placed(self.data.whole(index, recycles=recycles))
                out = functional_call(self.model, self.state.ema, (batches, recycles))
                positions = out["structure_module"]["final_atom_positions"]
                scored = ca_scores(positions, batches[-1])
                found[index] = torch.tensor([scored[name] for name in SCORES])
        self.model.train()
        rows = self._over_groups(found, "the scores of a validation").tolist()
        named = zip(proteins, rows, strict=True)
        return {protein.name: dict(zip(SCORES, row, strict=True)) for protein, row in named}

    def _gradients(self, taken: Sequence[Example]) -> list[float]:
        """Leave this step's gradients; its loss, backbone error and distogram loss."""
        sums = torch.zeros(3, dtype=torch.float64)
        for example in taken:
            sums += torch.tensor(self._backward(example), dtype=torch.float64)
        sync_grads(self.model, self.mesh)
        _fill_gradients(self.model)
        figures = self._over_groups(sums, "the losses of a step").tolist()
        return [figure / self.recipe.batch_size for figure in figures]

    def _over_groups(self, figures: Tensor, what: str) -> Tensor:
        """The sum over ``dp``."""
        if self.mesh.size("dp") > 1:
            Link(self.mesh, "dp").sum(figures, what=f"adding up {what}")()
        return figures

    def _backward(self, example: Example) -> tuple[float, float, float]:
        """Add one protein's gradients; its loss, backbone error and distogram loss."""
        seed_dropout(self.recipe.seed, example.number, 0)
        batches = self._placed(example.batches)
        out = self.model(batches, recycles=len(batches) - 1)
        loss, parts = total_loss(self.recipe.model, batches[-1], out)
        groups = self.mesh.size("dp")  # gradients are averaged over them, proteins are not
        (loss * groups / self.recipe.batch_size).backward()
        return (
            loss.item(),
            parts["structure_module"]["fape"].item(),
            parts["distogram"]["loss"].item() if "distogram" in parts else 0.0,
        )

    def _name(self, number: int) -> str:
        return self.data.proteins[self.data.index_of(number)].name

    def _placed(self, batches: Sequence[Batch]) -> list[Batch]:
        dtype = getattr(torch, self.recipe.dtype)
        return [
            {
                name: value.to(self.device, dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }
            for batch in batches
        ]


def _uncropped(data: Proteins) -> Proteins:
    """The same examples, whole; files that were read are shared."""
    whole = copy.copy(data)
    whole.sizes = replace(data.sizes, crop_size=None)
    return whole


def _fill_gradients(model: AlphaFold) -> None:
    """Zeros for what this loss does not reach, so that the optimizer's state is whole to save."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
