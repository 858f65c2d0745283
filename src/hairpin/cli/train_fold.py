"""``hairpin train fold``: train a folding model on structures with alignments."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli import train
from hairpin.cli.output import print_json, print_text, say
from hairpin.errors import RecipeError

if TYPE_CHECKING:
    from hairpin.run.fold_train import FoldJob, FoldTrainResult

RECIPES = ("tiny",)
_NEEDS = (("gemmi", "gemmi", "fold"),)


def fold(
    *,
    data: Annotated[
        Path,
        typer.Option(help="Folder of proteins: NAME/NAME.cif and NAME/*.a3m or *.sto for each."),
    ],
    protein: Annotated[
        list[str] | None, typer.Option(help="Train on this one alone; may be repeated.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="tiny (the default), or that of the checkpoint.")
    ] = None,
    steps: train.Steps = None,
    batch_size: Annotated[int | None, typer.Option(help="Proteins per step.")] = None,
    resume: train.Resume = None,
    fallback: train.Fallback = False,
    out: train.RunFolder = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that make examples; 0 for none beside this one.")
    ] = 1,
    dtype: train.Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, crops and sampling.")] = None,
    checkpoint_every: train.CheckpointEvery = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a folding model on structures with alignments; prints each protein's Ca-RMSD."""
    train.require_extras(_NEEDS)
    from hairpin.run.fold_train import run_fold_training

    changes = {
        "proteins": tuple(protein) if protein else None,
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "validate_every": validate_every,
    }
    job = prepare(
        data,
        recipe_name=recipe,
        changes={name: value for name, value in changes.items() if value is not None},
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        workers=workers,
    )
    with train.telling_how_to_go_on("fold", job.out_dir), train.terminable():
        result = run_fold_training(job)
    if json:
        print_json(figures(result))
    else:
        print_text(table(result))
        say(f"checkpoint in {result.checkpoint}, metrics in {result.metrics}")


def prepare(
    data: Path,
    *,
    recipe_name: str | None,
    changes: dict[str, Any],
    steps: int | None,
    resume: Path | None,
    fallback: bool,
    out: Path | None,
    workers: int,
) -> "FoldJob":
    """Everything that can be wrong is found here, before a step is spent."""
    from dataclasses import replace

    from hairpin.proteins.loader import find_proteins
    from hairpin.run.fold_train import FoldJob
    from hairpin.run.recipes import FoldRecipe, fold_tiny

    start = train.starting_point(resume, fallback=fallback)
    if start.recipe is not None and "clamped" not in start.recipe:
        raise RecipeError(
            f"{start.source} is not of a folding model; go on with it by hairpin train video"
        )
    if start.recipe is not None:
        changes = {"proteins": tuple(start.recipe["proteins"])} | changes
    makers = dict(zip(RECIPES, (fold_tiny,), strict=True))
    recipe = train.choose_recipe(
        FoldRecipe, makers, recipe_name, changes, steps=steps, saved=start.recipe
    )
    last_step = train.last_step_of(recipe, start, steps)
    proteins = find_proteins(data, recipe.proteins)
    return FoldJob(
        recipe=replace(recipe, proteins=tuple(found.name for found in proteins)),
        proteins=proteins,
        out_dir=train.claim_folder(recipe.name, start, out),
        resume=start.source,
        first_step=start.step,
        last_step=last_step,
        workers=workers,
    )


def figures(result: "FoldTrainResult") -> dict[str, Any]:
    """The result as plain data."""
    return {
        "step": result.step,
        "checkpoint": str(result.checkpoint),
        "metrics": str(result.metrics),
        "validated_on": "the proteins trained on: this is memorising",
        "validation": result.validation,
    }


def table(result: "FoldTrainResult") -> str:
    """Each protein's scores, a line each."""
    lines = [
        f"{name:12}  Ca-RMSD {score['ca_rmsd']:6.2f} Å  lDDT-Ca {score['lddt_ca']:.3f}"
        for name, score in result.validation.items()
    ]
    title = f"step {result.step}, on the proteins trained on (this is memorising):"
    return "\n".join([title, *lines])
