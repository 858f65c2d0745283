"""Training a video model on any mesh, with the same loss curve on every mesh.

Clips and noise are a function of the seed and of the clip's number in the whole run; the loss is
the mean over all clips of a step; gradients are averaged over all ranks. Nothing depends on which
rank does what, so a run may stop on four ranks and go on on one.

Dims: b batch, t frames, h height, w width.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hairpin.comm.agree import require_agreement
from hairpin.comm.grads import sync_grads
from hairpin.comm.mesh import Mesh
from hairpin.comm.verbs import global_mean
from hairpin.models.video_dit import ATTENDS, VideoDiT, flow_loss
from hairpin.planning.apply import parallelize
from hairpin.planning.make import plan as make_plan
from hairpin.planning.plan import Plan
from hairpin.run import checkpoint, metrics, settings
from hairpin.run.data import MovingDigits, rank_indices
from hairpin.run.device import device_of
from hairpin.run.memory import measured, require_budget
from hairpin.run.recipes import VideoRecipe
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
from hairpin.units import parse_bytes

OnStep = Callable[[metrics.StepMetrics], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        checkpoint: the last checkpoint.
        metrics: file with one line a step.
        plan: how the model was split; None on one rank along ``sp``.
    """

    step: int
    checkpoint: Path
    metrics: Path
    plan: Plan | None


def train(
    recipe: VideoRecipe,
    mesh: Mesh,
    out_dir: str | Path,
    *,
    resume: str | Path | None = None,
    fallback: bool = False,
    stop_step: int | None = None,
    memory: int | str | None = None,
    keep: int = 3,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train until ``stop_step``. Every rank of the mesh calls it.

    Args:
        mesh: with the axes ``dp`` (clips) and ``sp`` (frames and patches of each clip).
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
    run = _Run(recipe, mesh)
    source = None if resume is None else checkpoint.find(resume, fallback=fallback)
    first_step = 0 if source is None else load(source, run.state, recipe)
    last_step = recipe.steps if stop_step is None else stop_step
    require_work(first_step, last_step, source)

    log = open_log(out_dir, first_step, source) if mesh.global_rank == 0 else None
    try:
        for step in range(first_step, last_step):
            row = run.step(step, budget_bytes=budget_bytes if step == first_step else None)
            if log is not None:
                log.write(row)
                if on_step is not None:
                    on_step(row)
            done = step + 1
            if done % recipe.checkpoint_every == 0 or done == last_step:
                source = save(out_dir, run.state, recipe, step=done, keep=keep)
    finally:
        if log is not None:
            log.close()
    assert source is not None
    return TrainResult(
        step=last_step,
        checkpoint=source,
        metrics=out_dir / checkpoint.METRICS_FILE,
        plan=run.plan,
    )


def build_model(recipe: VideoRecipe, *, device: torch.device) -> VideoDiT:
    """The recipe's model, with the same weights for the same seed on every rank and device."""
    torch.manual_seed(recipe.seed)
    return VideoDiT(recipe.model).to(device, getattr(torch, recipe.dtype))


def split(model: VideoDiT, recipe: VideoRecipe, mesh: Mesh, *, clips: int) -> Plan | None:
    """Plan and attach the split over ``sp``; None where there is nothing to split.

    A model with dropout gets a plan on one rank too: it draws the masks that more ranks draw.

    Args:
        clips: the most clips that a rank is given at once.
    """
    if mesh.size("sp") == 1 and not recipe.model.dropout:
        return None
    plan = plan_video(model, recipe, mesh, clips=clips)
    parallelize(model, plan, mesh)
    return plan


def plan_video(model: VideoDiT, recipe: VideoRecipe, mesh: Mesh, *, clips: int) -> Plan:
    """The cheapest split of the model over ``sp``; the mesh may be a description."""
    data, like = recipe.data, model.patch_embed.weight
    example = (
        like.new_zeros(clips, data.frames, data.height, data.width),
        like.new_zeros(clips),  # noise level
        torch.zeros(clips, data.digits, dtype=torch.int64, device=like.device),
        torch.zeros(clips, data.frames, dtype=torch.bool, device=like.device),  # given
    )
    return make_plan(model, example, mesh, attends=ATTENDS)


class _Run:
    """The moving parts of a run on this rank: model and training state, split, data."""

    def __init__(self, recipe: VideoRecipe, mesh: Mesh) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.device = device_of(mesh)
        self.model = build_model(recipe, device=self.device).train()
        self.state = new_state(self.model, recipe)
        self.data = MovingDigits(recipe.data, split="train", seed=recipe.seed)
        most_clips = -(-recipe.batch_size // mesh.size("dp"))
        self.plan = split(self.model, recipe, mesh, clips=most_clips)
        self.peak_bytes: list[int] | None = None

    def step(self, step: int, *, budget_bytes: int | None = None) -> metrics.StepMetrics:
        """One optimizer step, counted from 0."""
        recipe, mesh = self.recipe, self.mesh
        start_s, sent = time.perf_counter(), mesh.traffic.snapshot()
        if self.peak_bytes is None:
            loss, peak_bytes = self._measured_backward(step)
        else:
            loss, peak_bytes = self._backward(step), 0
        figures = over_ranks(mesh, mesh.traffic.since(sent).bytes_sent, peak_bytes)
        self.peak_bytes = peaks = self.peak_bytes or [peak for _, peak in figures]
        require_budget(peaks, budget_bytes, batch_size=recipe.batch_size, ranks=mesh.world)
        norm = update(self.state, recipe, step, loss)
        time_s = time.perf_counter() - start_s
        return metrics.StepMetrics(
            step=step + 1,
            loss=loss,
            lr=recipe.learning_rate(step),
            grad_norm=norm,
            samples_per_s=recipe.batch_size / time_s,
            bytes_sent=[sent_bytes for sent_bytes, _ in figures],
            peak_memory_bytes=peaks,
            time_s=time_s,
        )

    def _measured_backward(self, step: int) -> tuple[float, int]:
        """As :meth:`_backward`, with the most bytes this rank needs for a step."""
        with measured(self.device) as peak:
            loss = self._backward(step)
        return loss, held_bytes(self.model) + peak.peak_bytes

    def _backward(self, step: int) -> float:
        """Loss of this step's clips, and its gradients, averaged over all ranks."""
        recipe, mesh = self.recipe, self.mesh
        dp = mesh.rank("dp")
        seed_dropout(recipe.seed, step, dp)
        index = rank_indices(step, batch_size=recipe.batch_size, rank=dp, ranks=mesh.size("dp"))
        clips = self.data.clips(index)
        video = clips.video.to(self.device, getattr(torch, recipe.dtype))  # [b, t, h, w]
        error = flow_loss(
            self.model,
            video,
            clips.labels.to(self.device),
            index=index,
            seed=recipe.seed,
            given_frames=recipe.given_frames,
            null_label=recipe.model.classes,
            label_dropout=recipe.label_dropout,
        )
        loss = global_mean(error.total, error.count, mesh)
        loss.backward()
        sync_grads(self.model, mesh)
        return loss.item()
