"""``hairpin train llm``, ``linear-llm`` and ``vit``: train a model with one long dim."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli import train
from hairpin.cli.output import Json

if TYPE_CHECKING:
    from hairpin.run.recipes import SequenceRecipe
    from hairpin.run.sequence import SequenceJob
    from hairpin.run.sequence_train import SequenceTrainResult

    Makers = dict[str, Callable[[], SequenceRecipe]]

_IMAGES = (("sklearn", "scikit-learn", "images"), ("PIL", "pillow", "images"))

Dp = Annotated[
    int, typer.Option(min=1, help="Groups of ranks that share out examples; the rest split them.")
]
Method = Annotated[
    str | None,
    typer.Option(
        help="How attention crosses the ranks of a sequence: auto, ring, ulysses, usp, ..."
    ),
]
RecipeOfText = Annotated[
    str | None, typer.Option(help="source (the default), tiny, or the checkpoint's.")
]
Rows = Annotated[int | None, typer.Option(help="Rows per step, over all ranks.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens (bytes) of a row of text.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")]


def llm(
    *,
    recipe: RecipeOfText = None,
    ranks: train.Ranks = None,
    dp: Dp = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages that share out the layers.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share each layer's weights.")] = 1,
    sp: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share each row; default the rest.")
    ] = None,
    data_parallel: Annotated[
        str | None,
        typer.Option(help="Keep the copies over --dp alike by fsdp or ddp; with --pp, --tp: fsdp."),
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option(min=1, help="Parts of a batch in a pipeline; default as --pp.")
    ] = None,
    method: Method = None,
    length: Length = None,
    memory: train.Memory = None,
    steps: train.Steps = None,
    batch_size: Rows = None,
    resume: train.Resume = None,
    fallback: train.Fallback = False,
    out: train.RunFolder = None,
    dtype: train.Dtype = None,
    seed: Seed = None,
    checkpoint_every: train.CheckpointEvery = None,
    validate_every: train.ValidateEvery = None,
    json: Json = False,
) -> None:
    """Train a Llama-shaped language model on the source text of Python's standard library."""
    _train(
        "llm",
        recipe,
        changes=train.given(
            length=length,
            batch_size=batch_size,
            dtype=dtype,
            seed=seed,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
        ),
        degrees={"ranks": ranks, "dp": dp, "sp": sp, "tp": tp, "pp": pp},
        options={
            "memory": memory,
            "data_parallel": data_parallel,
            "method": method,
            "microbatches": microbatches,
        },
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        json=json,
    )


def linear_llm(
    *,
    recipe: RecipeOfText = None,
    ranks: train.Ranks = None,
    dp: Dp = 1,
    length: Length = None,
    memory: train.Memory = None,
    steps: train.Steps = None,
    batch_size: Rows = None,
    resume: train.Resume = None,
    fallback: train.Fallback = False,
    out: train.RunFolder = None,
    dtype: train.Dtype = None,
    seed: Seed = None,
    checkpoint_every: train.CheckpointEvery = None,
    validate_every: train.ValidateEvery = None,
    json: Json = False,
) -> None:
    """Train a language model with gated linear attention on Python's own source text."""
    _train(
        "linear-llm",
        recipe,
        changes=train.given(
            length=length,
            batch_size=batch_size,
            dtype=dtype,
            seed=seed,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
        ),
        degrees={"ranks": ranks, "dp": dp},
        options={"memory": memory},
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        json=json,
    )


def vit(
    *,
    recipe: Annotated[
        str | None, typer.Option(help="digits (the default), photos, tiny, or the checkpoint's.")
    ] = None,
    ranks: train.Ranks = None,
    dp: Dp = 1,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side; of photos alone.")
    ] = None,
    method: Method = None,
    memory: train.Memory = None,
    steps: train.Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all ranks.")] = None,
    resume: train.Resume = None,
    fallback: train.Fallback = False,
    out: train.RunFolder = None,
    dtype: train.Dtype = None,
    seed: Seed = None,
    checkpoint_every: train.CheckpointEvery = None,
    validate_every: train.ValidateEvery = None,
    json: Json = False,
) -> None:
    """Train a vision transformer to tell handwritten digits, or how photographs are turned."""
    train.require_extras(_IMAGES)
    _train(
        "vit",
        recipe,
        changes=train.given(
            size=size,
            batch_size=batch_size,
            dtype=dtype,
            seed=seed,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
        ),
        degrees={"ranks": ranks, "dp": dp},
        options={"memory": memory, "method": method},
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        json=json,
    )


def _train(what: str, recipe_name: str | None, *, json: bool, **given: Any) -> None:
    """Prepare, train on new ranks or torchrun's, and print how it ended."""
    from hairpin.run.sequence import run_sequence_training

    job = prepare(what, recipe_name=recipe_name, **given)
    with train.telling_how_to_go_on(what, job.out_dir):
        result = train.on_ranks(run_sequence_training, job.degrees.ranks, job)
    if result is None:  # under torchrun, on all ranks but the first
        return
    train.tell(figures(job, result), summary(result), json=json)


def makers_of(what: str) -> "tuple[type[SequenceRecipe], Makers]":
    """The kind of recipe of a command, and its recipes by name, the default first."""
    from hairpin.run import recipes

    named: Makers

    if what == "llm":
        named = {"source": recipes.llm_source, "tiny": recipes.llm_tiny}
        return recipes.LLMRecipe, named
    if what == "linear-llm":
        named = {"source": recipes.linear_llm_source, "tiny": recipes.linear_llm_tiny}
        return recipes.LinearLLMRecipe, named
    named = {"digits": recipes.vit_digits, "photos": recipes.vit_photos, "tiny": recipes.vit_tiny}
    return recipes.ViTRecipe, named


def prepare(
    what: str,
    *,
    recipe_name: str | None,
    changes: dict[str, Any],
    degrees: dict[str, Any],
    options: dict[str, Any],
    steps: int | None,
    resume: Path | None,
    fallback: bool,
    out: Path | None,
) -> "SequenceJob":
    """Everything that can be wrong is found here, before ranks start and a step is spent."""
    from hairpin.comm.mesh import Mesh
    from hairpin.run.sequence import SequenceJob, degrees_of, require_possible, sequence_plan
    from hairpin.units import parse_bytes

    wanted = _rank_count(degrees.pop("ranks"), degrees)
    shared = degrees_of(wanted, **({"sp": None} | degrees))
    if options["memory"] is not None:
        parse_bytes(options["memory"])
    options["microbatches"] = options.get("microbatches") or shared.pp
    kind, makers = makers_of(what)
    start = train.starting_point(resume, fallback=fallback)
    recipe: SequenceRecipe = train.choose_recipe(
        kind,
        makers,
        recipe_name,
        changes,
        steps=steps,
        saved=start.recipe,
    )
    if shared.sp > 1 and options.get("method") != "auto":  # that one is chosen by the ranks
        sequence_plan(recipe, Mesh(dp=shared.dp, sp=shared.sp), method=options.get("method"))
    require_possible(
        recipe,
        shared,
        microbatches=options["microbatches"],
        data_parallel=options.get("data_parallel"),
    )
    last_step = train.last_step_of(recipe, start, steps)
    return SequenceJob(
        recipe=recipe,
        out_dir=train.claim_folder(recipe.name, start, out),
        degrees=shared,
        resume=start.source,
        first_step=start.step,
        last_step=last_step,
        **options,
    )


def _rank_count(ranks: int | None, degrees: dict[str, Any]) -> int:
    """The ranks asked for, or those torchrun has started, or as many as the degrees need."""
    from math import prod

    from hairpin.run.launch import launched

    if ranks is None and not launched():
        return prod(degree or 1 for degree in degrees.values())
    return train.rank_count(ranks)


def figures(job: "SequenceJob", result: "SequenceTrainResult") -> dict[str, Any]:
    """The result as plain data; losses in nats."""
    from dataclasses import asdict

    return {
        "step": result.step,
        "validation_loss": result.validation.loss,
        "validation_accuracy": result.validation.accuracy,
        "frequencies_loss": result.chance,
        "checkpoint": str(result.checkpoint),
        "metrics": str(result.metrics),
        "ranks": job.degrees.ranks,
        "degrees": asdict(job.degrees),
        "method": result.method,
    }


def summary(result: "SequenceTrainResult") -> str:
    """How well validation data are predicted, in a line."""
    scores = result.validation
    text = (
        f"step {result.step}: validation loss {scores.loss:.4f} nats, {scores.accuracy:.1%} right"
    )
    if result.chance is None:
        return text
    return f"{text} (predicting bytes by how often they occur: {result.chance:.4f} nats)"
