"""The programs behind ``hairpin train video`` and ``hairpin sample``, as one rank runs them."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import MeshError
from hairpin.run import checkpoint
from hairpin.run.progress import StepProgress
from hairpin.run.recipes import VideoRecipe
from hairpin.run.sample import Samples, draw_samples
from hairpin.run.train import TrainResult, train

TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a rank is asked to do; see :func:`hairpin.run.train.train`."""

    recipe: VideoRecipe
    out_dir: Path
    dp: int
    sp: int
    resume: Path | None = None
    first_step: int = 0
    last_step: int
    memory: str | None = None
    clips: int = 6


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended, and clips drawn from its last checkpoint."""

    result: TrainResult
    samples: Samples


def degrees(ranks: int, dp: int) -> tuple[int, int]:
    """(dp, sp) of a mesh of `ranks` ranks.

    Raises:
        MeshError: `dp` does not divide `ranks`.
    """
    if ranks < 1 or dp < 1 or ranks % dp:
        raise MeshError(
            f"got {ranks} ranks and dp={dp}; the ranks are shared out evenly, so give a --dp that "
            f"divides --ranks"
        )
    return dp, ranks // dp


def run_training(job: TrainJob) -> TrainOutcome:
    """Train, then draw samples from the last checkpoint, on the ranks that call it."""
    mesh = init_mesh(dp=job.dp, sp=job.sp, timeout_s=TIMEOUT_S)
    with ExitStack() as stack:
        progress = None
        if mesh.global_rank == 0:
            progress = stack.enter_context(StepProgress(job.first_step, job.last_step))
        result = train(
            job.recipe,
            mesh,
            job.out_dir,
            resume=job.resume,
            stop_step=job.last_step,
            memory=job.memory,
            on_step=progress,
        )
    _save_plan(result, mesh, job.out_dir)
    return TrainOutcome(result, draw_samples(result.checkpoint, mesh, count=job.clips))


def run_sampling(path: Path, *, dp: int, sp: int, count: int, seed: int) -> Samples:
    """Draw samples from a checkpoint on the ranks that call it."""
    mesh = init_mesh(dp=dp, sp=sp, timeout_s=TIMEOUT_S)
    return draw_samples(path, mesh, count=count, seed=seed)


def out_folder(name: str, *, resume: Path | None, wanted: Path | None) -> Path:
    """Where a run writes: the folder asked for, that of the run it goes on from, or a new one.

    A checkpoint that lies in no run's folder starts a new one.
    """
    if wanted is not None:
        return wanted
    if (
        resume is not None
        and resume.parent.name == checkpoint.FOLDER
        and is_run(resume.parent.parent)
    ):
        return resume.parent.parent
    parent = Path("runs")
    numbered = (parent / f"{name}-{number}" for number in range(2, 10_000))
    free = (folder for folder in (parent / name, *numbered) if not folder.exists())
    return next(free)


def is_run(folder: Path) -> bool:
    """Whether a run has written there."""
    return (folder / checkpoint.METRICS_FILE).exists()


def _save_plan(result: TrainResult, mesh: Mesh, out_dir: Path) -> None:
    if result.plan is not None and mesh.global_rank == 0:
        result.plan.save(out_dir / "plan.toml")
