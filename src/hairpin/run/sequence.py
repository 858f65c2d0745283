"""The programs behind ``hairpin train llm``, ``linear-llm`` and ``vit``, as one rank runs them."""

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from hairpin.comm.mesh import Mesh, as_mesh, init_mesh
from hairpin.errors import MeshError, SequenceError
from hairpin.exchange.mask import Mask
from hairpin.exchange.stream import take
from hairpin.models.vit.model import patches_along
from hairpin.planning.apply import parallelize
from hairpin.planning.sequence import Method, SequencePlan, plan_sequence
from hairpin.run.data.text import TokenBatch
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

TIMEOUT_S = 300.0


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
    for :func:`hairpin.plan_sequence`. `microbatches` is how many parts a pipeline
    cuts a batch into.
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
    with ExitStack() as stack:
        progress = None
        if mesh.global_rank == 0:
            progress = stack.enter_context(
                StepProgress(job.first_step, job.last_step, figures=sequence_figures)
            )
        return train_sequence(
            job.recipe,
            mesh,
            program,
            job.out_dir,
            resume=job.resume,
            stop_step=job.last_step,
            memory=job.memory,
            on_step=progress,
        )


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
    return FourD(
        job.recipe,
        mesh,
        make_split(job, as_mesh(mesh.device_mesh["dp", "sp"])),
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
    return SplitSequences(sequence_plan(job.recipe, mesh, method=job.method))


def sequence_plan(recipe: SequenceRecipe, mesh: Mesh, *, method: str | None) -> SequencePlan:
    """The plan of a recipe's sequences over the axis `sp`.

    Raises:
        SequenceError: a method that does not exist or that the model cannot use.
    """
    usual = "linear" if isinstance(recipe, LinearLLMRecipe) else "ring"
    chosen = cast("Method", usual if method is None else method)
    if chosen == "auto":
        raise SequenceError(
            "method 'auto' needs measured links, which training does not take yet; name a method, "
            "or leave --method out"
        )
    if (chosen == "linear") != (usual == "linear"):
        raise SequenceError(
            f"method {chosen!r} does not fit this model; "
            + ("it has linear attention: leave --method out" if usual == "linear" else "use 'ring'")
        )
    return plan_sequence(
        mesh,
        length=_positions(recipe),
        mask=Mask(causal=not isinstance(recipe, ViTRecipe)),
        method=chosen,
    )


def _positions(recipe: SequenceRecipe) -> int:
    """Positions of a sequence: tokens of a row, or patches of an image and the class token."""
    if isinstance(recipe, ViTRecipe):
        return prod(patches_along((recipe.size, recipe.size), recipe.model.patch)) + 1
    assert isinstance(recipe, LLMRecipe | LinearLLMRecipe)
    return recipe.length


@dataclass(frozen=True)
class SplitSequences:
    """The ranks of `sp` share each sequence as a plan says."""

    plan: SequencePlan

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
