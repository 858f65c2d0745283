"""``hairpin train``: train a model on local ranks, or join the ranks torchrun started."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from hairpin.cli.output import Json, command_line, print_json, print_text, say
from hairpin.errors import (
    MeshError,
    MissingExtraError,
    OutputError,
    RankFailed,
    RecipeError,
)

if TYPE_CHECKING:
    from hairpin.run.recipes.schedule import Schedule
    from hairpin.run.video import TrainJob, TrainOutcome

    Recipe = TypeVar("Recipe", bound=Schedule)

RECIPES = ("digits", "tiny")
_NEEDS = (
    ("sklearn", "scikit-learn", "video"),
    ("PIL", "pillow", "video"),
    ("matplotlib", "matplotlib", "report"),
    ("jinja2", "jinja2", "report"),
)
_SLOW_IMPORTS = ("sklearn.datasets", "gemmi")  # of what ranks need, those that take long

# options of every training
Steps = Annotated[
    int | None, typer.Option(help="Stop when so many steps are done, those resumed included.")
]
Resume = Annotated[Path | None, typer.Option(help="Folder of a run or checkpoint to go on from.")]
Fallback = Annotated[
    bool, typer.Option("--fallback", help="Pass over a damaged newest checkpoint.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option(help="Folder to write; default runs/<recipe>, or the run resumed."),
]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations.")]
Memory = Annotated[
    str | None, typer.Option(help="Bytes a rank may use, such as 2GiB: more is an error.")
]

# options of everything that starts ranks
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Local ranks to start; default 1, or torchrun's.")
]
DpOfClips = Annotated[
    int, typer.Option(min=1, help="Groups of ranks that share out clips; the rest split clips.")
]
Product = Annotated[
    str, typer.Option(help="How triangle products cross the ranks: gather, ring or channels.")
]
Passing = Annotated[str, typer.Option(help="How pair biases cross the ranks: gather or ring.")]

app = typer.Typer(help="Train a model.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train a model."""


@app.command("video")
def video(
    *,
    recipe: Annotated[
        str | None, typer.Option(help="digits (the default) or tiny, or that of the checkpoint.")
    ] = None,
    ranks: Ranks = None,
    dp: DpOfClips = 1,
    memory: Memory = None,
    steps: Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips per step, over all ranks.")] = None,
    resume: Resume = None,
    fallback: Fallback = False,
    out: RunFolder = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data and noise.")] = None,
    checkpoint_every: CheckpointEvery = None,
    json: Json = False,
) -> None:
    """Train a video transformer on moving handwritten digits, then write samples and a report."""
    require_extras(_NEEDS)
    from hairpin.run.video import run_training

    job = prepare(
        recipe_name=recipe,
        changes=given(
            batch_size=batch_size, dtype=dtype, seed=seed, checkpoint_every=checkpoint_every
        ),
        ranks=rank_count(ranks),
        dp=dp,
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        memory=memory,
    )
    with telling_how_to_go_on("video", job.out_dir):
        outcome = on_ranks(run_training, job.dp * job.sp, job)
    if outcome is None:  # under torchrun, on all ranks but the first
        return
    written = finish(job, outcome)
    if json:
        print_json(written)
    else:
        print_text(written["report"])


def given(**options: Any) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def prepare(
    *,
    recipe_name: str | None,
    changes: dict[str, Any],
    ranks: int,
    dp: int,
    steps: int | None,
    resume: Path | None,
    fallback: bool,
    out: Path | None,
    memory: str | None,
) -> "TrainJob":
    """Everything that can be wrong is found here, before ranks start and a step is spent."""
    from hairpin.run.recipes import VideoRecipe, tiny, video_digits
    from hairpin.run.video import TrainJob, degrees
    from hairpin.units import parse_bytes

    dp, sp = degrees(ranks, dp)
    if memory is not None:
        parse_bytes(memory)
    start = starting_point(resume, fallback=fallback)
    makers = dict(zip(RECIPES, (video_digits, tiny), strict=True))
    recipe = choose_recipe(
        VideoRecipe, makers, recipe_name, changes, steps=steps, saved=start.recipe
    )
    last_step = last_step_of(recipe, start, steps)
    return TrainJob(
        recipe=recipe,
        out_dir=claim_folder(recipe.name, start, out),
        dp=dp,
        sp=sp,
        resume=start.source,
        first_step=start.step,
        last_step=last_step,
        memory=memory,
    )


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        source: the checkpoint it goes on from; None for a new run.
        step: steps done there.
        recipe: its settings, as plain data.
    """

    source: Path | None
    step: int
    recipe: dict[str, Any] | None


def starting_point(resume: Path | None, *, fallback: bool) -> Start:
    """The checkpoint that a run goes on from, or a new start."""
    from hairpin.run import checkpoint

    if resume is None:
        return Start(None, 0, None)
    source = checkpoint.find(resume, fallback=fallback)
    info = checkpoint.read_info(source)
    return Start(source, info.step, info.recipe)


def choose_recipe(
    kind: "type[Recipe]",
    makers: "Mapping[str, Callable[[], Recipe]]",
    name: str | None,
    changes: dict[str, Any],
    *,
    steps: int | None,
    saved: Mapping[str, Any] | None,
) -> "Recipe":
    """The recipe named, or the first, or that of the checkpoint, with the changes asked for.

    A new run's schedule ends at its last step; a run that goes on keeps the schedule it had.

    Raises:
        RecipeError: there is no such recipe, or a setting cannot work.
        CheckpointError: the recipe is not one that the checkpoint can go on with.
    """
    from dataclasses import replace

    from hairpin.run import settings

    if name is not None and name not in makers:
        raise RecipeError(f"there is no recipe {name!r}; choose one of {', '.join(makers)}")
    if saved is None:
        chosen = makers[name or next(iter(makers))]()
        return replace(chosen, **({"steps": steps} if steps is not None else {}) | changes)
    chosen = settings.from_plain(kind, saved)
    if name is not None:
        chosen = replace(makers[name](), steps=chosen.steps)
    chosen = replace(chosen, **changes)
    settings.require_same(chosen, saved)
    return chosen


def last_step_of(recipe: "Schedule", start: Start, steps: int | None) -> int:
    """The step to stop at.

    Raises:
        RecipeError: it is below 1.
        CheckpointError: that many are done already.
    """
    from hairpin.run.steps import require_work

    last_step = recipe.steps if steps is None else steps
    require_work(start.step, last_step, start.source)
    return last_step


def claim_folder(name: str, start: Start, wanted: Path | None) -> Path:
    """The folder that a run writes to, made if need be.

    Raises:
        OutputError: it holds another run or cannot be written.
    """
    from hairpin.run import checkpoint
    from hairpin.run.video import is_run, out_folder

    source = start.source
    folder = out_folder(name, resume=source, wanted=wanted)
    if is_run(folder) and (source is None or folder.resolve() not in source.resolve().parents):
        raise OutputError(
            f"{folder} holds another run; go on with it by --resume {folder}, or name another --out"
        )
    return checkpoint.require_writable(folder)


def rank_count(wanted: int | None) -> int:
    """How many ranks take part: those asked for, or those torchrun has started.

    Raises:
        MeshError: both are given and differ.
    """
    from hairpin.run.launch import launched

    if not launched():
        return wanted or 1
    world = int(os.environ["WORLD_SIZE"])
    if wanted not in (None, world):
        raise MeshError(
            f"torchrun started {world} ranks but --ranks says {wanted}; leave --ranks out"
        )
    return world


def require_way(product: str, passing: str) -> None:
    """Raise unless a folding model can be split like this.

    Raises:
        PlanError: a way that does not exist.
    """
    from hairpin.comm.mesh import Mesh
    from hairpin.planning.axial.plan import plan_axial

    plan_axial(Mesh(sp=1), product=product, passing=passing)  # type: ignore[arg-type]


def on_ranks(program: Callable[..., Any], ranks: int, *args: Any, **kwargs: Any) -> Any:
    """Run a program on new local ranks, or on the one that torchrun made of this process.

    Returns:
        what the first rank returned; None on torchrun's other ranks.
    """
    from importlib.util import find_spec

    import torch

    from hairpin.run.device import usable_cores
    from hairpin.run.launch import launch, launched, user_error, warm

    threads = max(1, usable_cores() // ranks)
    if launched():
        result = program(*args, **kwargs)
        _leave_group()
        return result if os.environ["RANK"] == "0" else None
    with terminable():
        if ranks == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return program(*args, **kwargs)
            finally:
                torch.set_num_threads(before)
        warm(*(name for name in _SLOW_IMPORTS if find_spec(name.partition(".")[0])))
        try:
            return launch(program, ranks, *args, threads=threads, **kwargs)[0]
        except RankFailed as failure:
            error = user_error(failure)
            raise error from (None if error is not failure else failure.__cause__)


def on_folding_ranks(program: Callable[..., Any], ranks: int, *args: Any, **kwargs: Any) -> Any:
    """As :func:`on_ranks`; one rank alone computes with as many threads as torch would."""
    from hairpin.run.launch import launched

    if ranks == 1 and not launched():
        with terminable():
            return program(*args, **kwargs)
    return on_ranks(program, ranks, *args, **kwargs)


def finish(job: "TrainJob", outcome: "TrainOutcome") -> dict[str, Any]:
    """Write samples and report; returns their paths and the main figures."""
    from hairpin.report import Report, environment, write_report
    from hairpin.run import metrics, settings

    result, samples = outcome.result, outcome.samples
    film, sheet = write_pictures(job.out_dir, samples)
    report, rows = job.out_dir / "report.html", metrics.read(result.metrics)
    likeness = f"{samples.psnr_db:.1f} dB ({samples.still_psnr_db:.1f})"
    figures = [("likeness (of a film that stops)", likeness)]
    write_report(
        report,
        Report(
            title=job.recipe.name,
            command=command_line(),
            recipe=settings.to_plain(job.recipe),
            metrics=rows,
            plan=result.plan,
            mesh={"dp": job.dp, "sp": job.sp},
            film=film,
            sheet=sheet,
            figures=figures,
            environment=environment(),
        ),
    )
    say(f"samples in {film} and {sheet}, checkpoint in {result.checkpoint}")
    return {
        "report": str(report),
        "film": str(film),
        "sheet": str(sheet),
        "checkpoint": str(result.checkpoint),
        "metrics": str(result.metrics),
        "step": result.step,
        "loss": rows[-1]["loss"],
        "psnr_db": samples.psnr_db,
        "still_psnr_db": samples.still_psnr_db,
        "ranks": job.dp * job.sp,
    }


def tell(figures: dict[str, Any], text: str, *, json: bool) -> None:
    """Print how a training ended: its figures as JSON, or a text, and where things are."""
    if json:
        print_json(figures)
    else:
        print_text(text)
        say(f"checkpoint in {figures['checkpoint']}, metrics in {figures['metrics']}")


def write_pictures(folder: Path, samples: Any) -> tuple[Path, Path]:
    """The film and the contact sheet of samples."""
    from hairpin.run.sample import write_contact_sheet, write_gif

    film, sheet = folder / "samples.gif", folder / "samples.png"
    write_gif(samples, film)
    write_contact_sheet(samples, sheet)
    return film, sheet


def require_extras(needs: Sequence[tuple[str, str, str]]) -> None:
    """Raise now rather than when training is over; ``needs``: module, package, extra."""
    from importlib.util import find_spec

    for module, package, extra in needs:
        if find_spec(module) is None:
            raise MissingExtraError(
                f"training and its report need {package}: pip install 'hairpin[{extra}]'"
            )


@contextmanager
def telling_how_to_go_on(what: str, folder: Path) -> Iterator[None]:
    """Whatever ends a run early: say how to go on from its last checkpoint."""
    try:
        yield
    except BaseException:
        if any(folder.glob("checkpoints/step-*")):
            say(f"the last checkpoint is good; go on with: hairpin train {what} --resume {folder}")
        raise


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind this process, so that it ends its ranks first."""

    def leave(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True).show_cursor()  # the bar of a rank that was ended had hidden it


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
