"""The programs behind ``hairpin train llm``, ``linear-llm`` and ``vit``, as one rank runs them."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hairpin.comm.mesh import Mesh, as_mesh, init_mesh
from hairpin.comm.topology import Topology
from hairpin.errors import MeshError, SequenceError
from hairpin.exchange.mask import Mask
from hairpin.exchange.stream import take
from hairpin.models.vit.model import patches_along
from hairpin.planning.apply import parallelize
from hairpin.planning.sequence.plan import Method, SequencePlan, plan_sequence
from hairpin.planning.sequence.work import AttentionShape
from hairpin.run import checkpoint
from hairpin.run.data.text import TokenBatch
from hairpin.run.device import device_of
from hairpin.run.four_d import FourD, require_data_parallel, require_divisible
from hairpin.run.progress import StepProgress
from hairpin.run.recipes import LinearLLMRecipe, LLMRecipe, SequenceRecipe, ViTRecipe
from hairpin.run.sequence_train import (
    Program,
    SequenceTrainResult,
    Split,
    WholeModel,
    WholeSequences,
    sequence_figures,
    train_sequence,
)
from hairpin.units import format_bytes, format_time

TIMEOUT_S = 300.0
PLAN_FILE = "sequence.txt"  # in the folder of a run whose method was chosen


@dataclass(frozen=True)
class Degrees:
    """How many ways each thing is shared out.

    Attributes:
        dp: groups of ranks that take other examples.
        sp: ranks that share each sequence.
        tp: ranks that share each layer's weights.
        pp: ranks that share the layers.
    """

    dp: int = 1
    sp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        """The product of all."""
        return self.dp * self.sp * self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class SequenceJob:
    """What a rank is asked to do; see :func:`hairpin.run.sequence_train.train_sequence`.

    `data_parallel` is the part of torch that keeps the copies of the model over `dp` alike,
    `"fsdp"` or `"ddp"`. By default it is the first where layers or weights are shared out, and else
    none, for gradients are averaged after the backward. `method` is how attention crosses `sp`, as
    for :func:`hairpin.plan_sequence`; with `"auto"` the links are measured at the start and the
    fastest way is taken. `microbatches` is how many parts a pipeline cuts a batch into.
    """

    recipe: SequenceRecipe
    out_dir: Path
    degrees: Degrees
    data_parallel: str | None = None
    method: str | None = None
    microbatches: int = 1
    resume: Path | None = None
    first_step: int = 0
    last_step: int
    memory: str | None = None

    @property
    def by_torch(self) -> bool:
        """Whether torch's own parts share out the model or keep its copies alike."""
        shared = self.degrees.tp * self.degrees.pp > 1
        return shared or (self.data_parallel is not None and self.degrees.dp > 1)


def degrees_of(ranks: int, *, dp: int, sp: int | None, tp: int = 1, pp: int = 1) -> Degrees:
    """The degrees that a user means: `sp` takes the ranks that the others leave.

    Raises:
        MeshError: they do not multiply to `ranks`.
    """
    others = dp * tp * pp
    named = " ".join(f"{axis}={n}" for axis, n in {"dp": dp, "tp": tp, "pp": pp}.items() if n > 1)
    if ranks < 1 or min(dp, tp, pp) < 1 or ranks % others:
        raise MeshError(
            f"got {ranks} ranks and {named or 'dp=1'}; the ranks are shared out evenly, so give "
            f"degrees whose product divides --ranks"
        )
    if sp is not None and sp != ranks // others:
        raise MeshError(
            f"got {ranks} ranks and {named} sp={sp}, which need {others * sp}; give --ranks "
            f"{others * sp} or leave --sp out"
        )
    return Degrees(dp, ranks // others, tp, pp)


def require_possible(
    recipe: SequenceRecipe, degrees: Degrees, *, microbatches: int, data_parallel: str | None
) -> None:
    """Raise unless the recipe can be trained at these degrees.

    Raises:
        MeshError: naming the degree and what it has to fit.
    """
    if data_parallel is not None:
        require_data_parallel(data_parallel, dp=degrees.dp, tp=degrees.tp)
    if degrees.tp * degrees.pp == 1:
        return
    if not isinstance(recipe, LLMRecipe):
        raise MeshError(
            f"tp={degrees.tp} pp={degrees.pp}: only hairpin train llm shares out layers and "
            f"weights; use dp for this model"
        )
    require_divisible(
        recipe, dp=degrees.dp, tp=degrees.tp, pp=degrees.pp, microbatches=microbatches
    )


def run_sequence_training(job: SequenceJob) -> SequenceTrainResult:
    """Train on the ranks that call it, while a bar on stderr shows how it goes."""
    mesh = mesh_of(job)
    program = make_program(job, mesh)
    if mesh.global_rank == 0 and job.method == "auto":
        tell_choice(program.split, job.out_dir)
    with ExitStack() as stack:
        progress = None
        if mesh.global_rank == 0:
            progress = stack.enter_context(
                StepProgress(job.first_step, job.last_step, figures=sequence_figures)
            )
        result = train_sequence(
            job.recipe,
            mesh,
            program,
            job.out_dir,
            resume=job.resume,
            stop_step=job.last_step,
            memory=job.memory,
            on_step=progress,
        )
    return replace(result, method=method_of(program.split))


def method_of(split: Split) -> str | None:
    """How attention crosses the ranks of a sequence, for people; None where it is whole."""
    if not isinstance(split, SplitSequences):
        return None
    candidates = split.plan.candidates
    return candidates[0].method if candidates else split.method


def tell_choice(split: Split, out_dir: Path) -> None:
    """Say on stderr what `"auto"` has chosen; all that was weighed goes to `sequence.txt`."""
    if not isinstance(split, SplitSequences):
        sys.stderr.write("method auto: each row is whole on a rank (sp=1), nothing to choose\n")
        return
    found = split.plan.candidates
    sys.stderr.write(
        f"method auto: {found[0].method}, dealt {found[0].order}; an attention layer should take "
        f"{format_time(found[0].time_s)} and send {format_bytes(found[0].sent_bytes)} a rank, of "
        f"{len(found)} ways the least time\n"
    )
    sys.stderr.flush()
    (checkpoint.require_writable(out_dir) / PLAN_FILE).write_text(split.plan.explain() + "\n")


def mesh_of(job: SequenceJob) -> Mesh:
    """A live mesh: stages farthest apart, slices of a layer nearest."""
    degrees = job.degrees
    if not job.by_torch:
        return init_mesh(dp=degrees.dp, sp=degrees.sp, timeout_s=TIMEOUT_S)
    return init_mesh(
        pp=degrees.pp, dp=degrees.dp, sp=degrees.sp, tp=degrees.tp, timeout_s=TIMEOUT_S
    )


def make_program(job: SequenceJob, mesh: Mesh) -> Program:
    """What a step does on this mesh."""
    if not job.by_torch:
        return WholeModel(job.recipe, mesh, make_split(job, mesh))
    assert isinstance(job.recipe, LLMRecipe)
    tokens = tuple(axis for axis in mesh.axes if axis in {"dp", "sp"})
    return FourD(
        job.recipe,
        mesh,
        make_split(job, as_mesh(mesh.device_mesh[tokens])),
        data_parallel=job.data_parallel or "fsdp",
        microbatches=job.microbatches,
    )


def make_split(job: SequenceJob, mesh: Mesh) -> Split:
    """How sequences are split.

    Args:
        mesh: the axes `dp`, over which ranks have other sequences, and `sp`, over which they share
            each.
    """
    if mesh.size("sp") == 1:
        return WholeSequences(mesh)
    if job.method == "auto":
        return SplitSequences(fastest_plan(job, mesh), "auto")
    plan = sequence_plan(job.recipe, mesh, method=job.method)
    return SplitSequences(plan, job.method or _usual_method(job.recipe))


def fastest_plan(job: SequenceJob, mesh: Mesh) -> SequencePlan:
    """The plan of the fastest method on the links as they are now, in a few seconds.

    All sequences of a run are split alike: what the first ranks along `sp` measure counts.

    Raises:
        SequenceError: the model has linear attention, for which there is nothing to choose.
        MemoryBudgetError: no method holds an attention layer in the job's memory.
    """
    _require_fitting(job.recipe, "auto")
    shape = attention_shape(job)
    found = Topology.measure(
        mesh, "sp", heads=shape.heads, head_dim=shape.head_dim, device=device_of(mesh)
    )
    told = [found.to_toml()]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    topology = Topology.from_toml(told[0])
    return plan_sequence(mesh, method="auto", shape=shape, topology=topology, memory=job.memory)


def attention_shape(job: SequenceJob) -> AttentionShape:
    """One attention layer as ranks run it: with the heads of a slice and a microbatch's rows."""
    recipe, degrees = job.recipe, job.degrees
    assert isinstance(recipe, LLMRecipe | ViTRecipe)
    model = recipe.model
    groups = recipe.model.kv_heads if isinstance(recipe, LLMRecipe) else model.heads
    parts = degrees.dp * (job.microbatches if degrees.pp > 1 else 1)
    return AttentionShape(
        length=_positions(recipe),
        heads=model.heads // degrees.tp,
        groups=groups // degrees.tp,
        head_dim=model.channels // model.heads,
        batch=max(1, recipe.batch_size // parts),
        element_bytes=getattr(torch, recipe.dtype).itemsize,
        mask=_mask(recipe),
    )


def sequence_plan(recipe: SequenceRecipe, mesh: Mesh, *, method: str | None) -> SequencePlan:
    """The plan of a recipe's sequences over the axis `sp`.

    Raises:
        SequenceError: a method that does not exist or that the model cannot use.
    """
    chosen = cast("Method", method or _usual_method(recipe))
    _require_fitting(recipe, chosen)
    return plan_sequence(mesh, length=_positions(recipe), mask=_mask(recipe), method=chosen)


def _usual_method(recipe: SequenceRecipe) -> str:
    return "linear" if isinstance(recipe, LinearLLMRecipe) else "ring"


def _require_fitting(recipe: SequenceRecipe, method: str) -> None:
    usual = _usual_method(recipe)
    if (method == "linear") != (usual == "linear"):
        raise SequenceError(
            f"method {method!r} does not fit this model; "
            + ("it has linear attention: leave --method out" if usual == "linear" else "use 'ring'")
        )


def _mask(recipe: SequenceRecipe) -> Mask:
    return Mask(causal=not isinstance(recipe, ViTRecipe))


def _positions(recipe: SequenceRecipe) -> int:
    """Positions of a sequence: tokens of a row, or patches of an image and the class token."""
    if isinstance(recipe, ViTRecipe):
        return prod(patches_along((recipe.size, recipe.size), recipe.model.patch)) + 1
    assert isinstance(recipe, LLMRecipe | LinearLLMRecipe)
    return recipe.length


@dataclass(frozen=True)
class SplitSequences:
    """The ranks of `sp` share each sequence as a plan says; `method` is what was asked for."""

    plan: SequencePlan
    method: str

    def attach(self, model: nn.Module) -> None:
        """Route the model's attention over the ranks."""
        parallelize(model, self.plan)

    def shard(self, batch: TokenBatch) -> TokenBatch:
        """This rank's positions of every row."""
        tokens, labels, positions = (
            take(x, self.plan.split, 1) for x in (batch.tokens, batch.labels, batch.positions)
        )
        return batch._replace(tokens=tokens, labels=labels, positions=positions)

    def loss(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean over the tokens of all ranks."""
        return self.plan.loss(total, count)
