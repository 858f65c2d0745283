"""Training a model with one long dim, with the same loss curve on every mesh.

Examples are a function of the seed and of their number in the whole run; the loss is the mean over
all tokens of a step that count; gradients are averaged over all ranks. So a run may stop on four
ranks and go on on one, and on as many ranks as before it goes on bit for bit.

What a step does with a model is a `Program`: `WholeModel` here, each rank with the whole model;
stages and slices of a model in `run.four_d`. That a sequence is split is known to a `Split` alone,
and asked of it in `prepare_batch` and `Split.loss` alone.

Dims: b examples, s positions, v classes.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hairpin.comm.agree import require_agreement
from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh
from hairpin.comm.verbs import global_mean
from hairpin.models.linear_llm import LinearLLM
from hairpin.models.llm import IGNORED, LLM, TokenLoss, token_losses
from hairpin.models.vit import ViT
from hairpin.run import checkpoint, metrics, settings
from hairpin.run.data import rank_indices
from hairpin.run.data.images import ImageBatch, open_images
from hairpin.run.data.text import Text, TokenBatch, standard_library, unigram_entropy
from hairpin.run.device import device_of
from hairpin.run.memory import measured, require_budget
from hairpin.run.recipes import LinearLLMRecipe, LLMRecipe, SequenceRecipe, ViTRecipe
from hairpin.run.steps import held_bytes, load, new_state, open_log, over_ranks, require_work, save
from hairpin.run.steps import update as update_weights
from hairpin.units import format_bytes, parse_bytes

Batch = TokenBatch | ImageBatch
OnStep = Callable[["SequenceStepMetrics"], None]


class Scores(NamedTuple):
    """How well validation data are predicted.

    Attributes:
        loss: cross-entropy in nats, mean over all labels.
        accuracy: share of the labels that get the highest logit.
    """

    loss: float
    accuracy: float


class Split(Protocol):
    """How each example's sequence is split over ranks."""

    def attach(self, model: nn.Module) -> None:
        """Let a model, or a stage of it, attend across the ranks of a sequence."""
        ...

    def shard(self, batch: TokenBatch) -> TokenBatch:
        """This rank's part of rows that all ranks along the sequence hold whole."""
        ...

    def loss(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean over the tokens of all ranks, under the contract of gradients.

        Args:
            total: scalar, the sum of this rank's losses; differentiable.
            count: scalar, how many they are.
        """
        ...


@dataclass(frozen=True)
class WholeSequences:
    """Each rank has its examples whole: nothing is split but the examples over `dp`.

    Attributes:
        mesh: the axes along which ranks have other examples.
    """

    mesh: Mesh

    def attach(self, model: nn.Module) -> None:
        """Nothing to do: a model attends to what it is given."""

    def shard(self, batch: TokenBatch) -> TokenBatch:
        """The batch as it is."""
        return batch

    def loss(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean over the tokens of all ranks."""
        return global_mean(total, count, self.mesh)


class Program(Protocol):
    """What one step does with the model on this rank."""

    state: checkpoint.TrainState
    split: Split

    def backward(self, batch: Batch) -> float:
        """The loss of a step's examples, of which `batch` is this data-parallel rank's share.

        Leaves the gradients of that loss in the parameters, ready for the optimizer.
        """
        ...

    def update(self, step: int, loss: float) -> float:
        """Clip the gradients and move the weights; returns the norm before clipping."""
        ...

    def scores(self, batches: Sequence[Batch]) -> Scores:
        """How well examples are predicted; `batches` are this data-parallel rank's share."""
        ...

    def load(self, source: Path) -> int:
        """Go on from a checkpoint; returns the number of steps it has done."""
        ...


class WholeModel:
    """Each rank has the whole model; examples are shared out over `dp`."""

    def __init__(self, recipe: SequenceRecipe, mesh: Mesh, split: Split) -> None:
        self.recipe, self.mesh, self.split = recipe, mesh, split
        self.device = device_of(mesh)
        self.model = build_model(recipe).to(self.device).train()
        split.attach(self.model)
        self.state = new_state(self.model, recipe)

    def backward(self, batch: Batch) -> float:
        loss = self.split.loss(*local_loss(self.model, self._prepared(batch)))
        loss.backward()
        sync_grads(self.model, self.mesh)
        return loss.item()

    def update(self, step: int, loss: float) -> float:
        return update_weights(self.state, self.recipe, step, loss)

    def scores(self, batches: Sequence[Batch]) -> Scores:
        self.model.eval()
        with torch.no_grad():
            found = [token_scores(self.model, self._prepared(batch)) for batch in batches]
        self.model.train()
        total, correct, count = torch.stack(found).sum(dim=0)
        return Scores(self.split.loss(total, count).item(), self.split.loss(correct, count).item())

    def load(self, source: Path) -> int:
        return load(source, self.state, self.recipe)

    def _prepared(self, batch: Batch) -> Batch:
        dtype = getattr(torch, self.recipe.dtype)
        return prepare_batch(batch, self.split, device=self.device, dtype=dtype)


def prepare_batch(batch: Batch, split: Split, *, device: torch.device, dtype: torch.dtype) -> Batch:
    """What this rank computes on: on its device, and of rows of text only its part."""
    if isinstance(batch, ImageBatch):  # a model of images forms its own stream, and splits it there
        return ImageBatch(batch.images.to(device, dtype), batch.labels.to(device))
    mine = split.shard(batch)
    tensors = {n: getattr(mine, n).to(device) for n in ("tokens", "labels", "positions")}
    return mine._replace(**tensors)


def local_loss(model: nn.Module, batch: Batch) -> TokenLoss:
    """Sum and count of the losses of a prepared batch, on this rank."""
    return token_losses(logits_of(model, batch), batch.labels)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a prepared batch: `[b, s, v]` of text, `[b, v]` of images."""
    if isinstance(batch, ImageBatch):
        return model(batch.images)  # type: ignore[no-any-return]
    return model(batch.tokens, batch.positions)  # type: ignore[no-any-return]


def token_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Loss, hits and count of a prepared batch on this rank, each a sum: `[3]`."""
    return score_logits(logits_of(model, batch), batch.labels)


def score_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, hits and count of labels, each a sum: `[3]`."""
    total, count = token_losses(logits, labels)
    hits = ((logits.argmax(dim=-1) == labels) & (labels != IGNORED)).sum()
    return torch.stack([total, hits.to(total), count])


def build_model(recipe: SequenceRecipe) -> nn.Module:
    """The recipe's model, with the same weights for the same seed on every rank."""
    torch.manual_seed(recipe.seed)
    model: nn.Module
    if isinstance(recipe, LLMRecipe):
        model = LLM(recipe.model)
    elif isinstance(recipe, LinearLLMRecipe):
        model = LinearLLM(recipe.model)
    else:
        assert isinstance(recipe, ViTRecipe)
        model = ViT(recipe.model)
    return model.to(getattr(torch, recipe.dtype))


@dataclass(frozen=True)
class Data:
    """What a recipe trains and is validated on.

    Attributes:
        train: numbered examples without end.
        validation: those it is judged on, by place.
        chance: loss in nats of predicting each label by how often it occurs; None where it is not
            known.
    """

    train: "Examples"
    validation: "Examples"
    chance: float | None


class Examples(Protocol):
    """A numbered collection of examples."""

    def __len__(self) -> int: ...

    def batch(self, index: Sequence[int]) -> Batch:
        """The training examples with these numbers, which have no end."""
        ...

    def rows(self, places: Sequence[int]) -> Batch:
        """The examples at these places, from 0 to one below the length."""
        ...


def open_data(recipe: SequenceRecipe) -> Data:
    """Read the recipe's data.

    Raises:
        DataError: they are not there, or too short.
        MissingExtraError: a library that brings them is absent.
    """
    if isinstance(recipe, ViTRecipe):
        train = open_images(recipe.data, "train", seed=recipe.seed)
        return Data(train, open_images(recipe.data, "validation", seed=recipe.seed), None)
    assert isinstance(recipe, LLMRecipe | LinearLLMRecipe)
    kept = standard_library("validation")
    return Data(
        Text(standard_library("train"), recipe.length, seed=recipe.seed),
        Text(kept, recipe.length),
        unigram_entropy(kept),
    )


@dataclass(frozen=True, kw_only=True)
class SequenceStepMetrics(metrics.StepMetrics):
    """What one step did; see also `metrics.StepMetrics`.

    Attributes:
        data_wait_s: seconds that the step waited for its examples.
        validation: loss and accuracy with the weights after this step; None where none was done.
    """

    data_wait_s: float
    validation: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceTrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        checkpoint: the last checkpoint.
        metrics: file with one line a step.
        validation: of the weights at the last step.
        chance: the validation loss of predicting each label by how often it occurs; None where it
            is not known.
        method: how attention crossed the ranks of a sequence; None where they were whole.
    """

    step: int
    checkpoint: Path
    metrics: Path
    validation: Scores
    chance: float | None
    method: str | None = None


def train_sequence(
    recipe: SequenceRecipe,
    mesh: Mesh,
    program: Program,
    out_dir: str | Path,
    *,
    resume: str | Path | None = None,
    fallback: bool = False,
    stop_step: int | None = None,
    memory: int | str | None = None,
    keep: int = 3,
    on_step: OnStep | None = None,
) -> SequenceTrainResult:
    """Train until ``stop_step``. Every rank of the mesh calls it.

    Args:
        mesh: with the axis ``dp``, over which examples are shared out, and any others.
        program: what a step does; it holds the model.
        out_dir: gets ``metrics.jsonl`` and ``checkpoints/``.
        resume: folder of a run or of one checkpoint to go on from.
        fallback: go on from an older checkpoint where the newest is damaged.
        stop_step: steps done at the end, those before a resume included; default ``recipe.steps``.
        memory: bytes, or text such as ``"2GiB"``, that a rank may use.
        keep: newest checkpoints that stay.
        on_step: called after each step on the first rank.

    Raises:
        OutputError: ``out_dir`` cannot be written.
        CheckpointError: ``resume`` is damaged or belongs to another model or recipe.
        MemoryBudgetError: the first step needs more than ``memory``.
        NumericsError: the loss or a gradient is not finite.
        DisagreementError: the ranks were given different recipes.
    """
    budget_bytes = None if memory is None else parse_bytes(memory)
    out_dir = checkpoint.require_writable(out_dir)
    for axis in mesh.axes:
        require_agreement(f"train {json.dumps(settings.to_plain(recipe))}", mesh, axis)
    run = _Run(recipe, mesh, program)
    source = None if resume is None else checkpoint.find(resume, fallback=fallback)
    first_step = 0 if source is None else program.load(source)
    last_step = recipe.steps if stop_step is None else stop_step
    require_work(first_step, last_step, source)

    log = open_log(out_dir, first_step, source) if mesh.global_rank == 0 else None
    scores: Scores | None = None
    try:
        for step in range(first_step, last_step):
            row = run.step(step, budget_bytes=budget_bytes if step == first_step else None)
            done = step + 1
            if done % recipe.validate_every == 0 or done == last_step:
                scores = run.validate()
                row = replace(row, validation=scores._asdict())
            if log is not None:
                log.write(row)
                if on_step is not None:
                    on_step(row)
            if done % recipe.checkpoint_every == 0 or done == last_step:
                source = save(out_dir, program.state, recipe, step=done, keep=keep)
    finally:
        if log is not None:
            log.close()
    assert source is not None
    assert scores is not None
    return SequenceTrainResult(
        step=last_step,
        checkpoint=source,
        metrics=out_dir / checkpoint.METRICS_FILE,
        validation=scores,
        chance=run.data.chance,
    )


def sequence_figures(row: metrics.StepMetrics) -> str:
    """Loss, examples per second, bytes sent, memory and, where there is one, the validation."""
    assert isinstance(row, SequenceStepMetrics)
    text = (
        f"loss {row.loss:.4f}  {row.samples_per_s:.1f} examples/s  "
        f"sent {format_bytes(max(row.bytes_sent))}  peak {format_bytes(max(row.peak_memory_bytes))}"
    )
    if row.validation is None:
        return text
    loss, accuracy = row.validation["loss"], row.validation["accuracy"]
    return f"{text}  validation loss {loss:.4f}, {accuracy:.1%} right"


class _Run:
    """The moving parts of a run on this rank: data, program, what the first step has measured."""

    def __init__(self, recipe: SequenceRecipe, mesh: Mesh, program: Program) -> None:
        self.recipe, self.mesh, self.program = recipe, mesh, program
        self.data = open_data(recipe)
        self.peak_bytes: list[int] | None = None

    def step(self, step: int, *, budget_bytes: int | None = None) -> SequenceStepMetrics:
        """One optimizer step, counted from 0."""
        recipe, mesh = self.recipe, self.mesh
        start_s, sent = time.perf_counter(), mesh.traffic.snapshot()
        batch = self.data.train.batch(self._share(step, recipe.batch_size))
        wait_s = time.perf_counter() - start_s
        if self.peak_bytes is None:
            loss, peak_bytes = self._measured_backward(batch)
        else:
            loss, peak_bytes = self.program.backward(batch), 0
        figures = over_ranks(mesh, mesh.traffic.since(sent).bytes_sent, peak_bytes)
        self.peak_bytes = peaks = self.peak_bytes or [peak for _, peak in figures]
        require_budget(
            peaks, budget_bytes, batch_size=recipe.batch_size, ranks=mesh.world, what="examples"
        )
        norm = self.program.update(step, loss)
        time_s = time.perf_counter() - start_s
        return SequenceStepMetrics(
            step=step + 1,
            loss=loss,
            lr=recipe.learning_rate(step),
            grad_norm=norm,
            samples_per_s=recipe.batch_size / time_s,
            bytes_sent=[sent_bytes for sent_bytes, _ in figures],
            peak_memory_bytes=peaks,
            time_s=time_s,
            data_wait_s=wait_s,
        )

    def validate(self) -> Scores:
        """The first validation examples, with the weights as they are."""
        data, most = self.data.validation, self.recipe.batch_size
        left = iter(range(min(self.recipe.validation_examples, len(data))))
        groups: Iterator[list[int]] = iter(lambda: list(itertools.islice(left, most)), [])
        shares = [[group[i] for i in self._share(0, len(group))] for group in groups]
        return self.program.scores([data.rows(share) for share in shares])

    def _share(self, step: int, batch_size: int) -> range:
        """The numbers of this rank's examples of a step."""
        dp = self.mesh.rank("dp")
        return rank_indices(step, batch_size=batch_size, rank=dp, ranks=self.mesh.size("dp"))

    def _measured_backward(self, batch: Batch) -> tuple[float, int]:
        """The loss, and the most bytes this rank needs for a step."""
        with measured(device_of(self.mesh)) as peak:
            loss = self.program.backward(batch)
        return loss, held_bytes(self.program.state.model) + peak.peak_bytes
