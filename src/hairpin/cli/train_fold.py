"""``hairpin train fold``: train a folding model on structures with alignments."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hairpin.cli import train
from hairpin.cli.output import Json
from hairpin.errors import MeshError, RecipeError

if TYPE_CHECKING:
    from hairpin.run.fold_train import FoldJob, FoldTrainResult

RECIPES = ("tiny",)
_NEEDS = (("gemmi", "gemmi", "fold"),)

Ranks = Annotated[
    int | None, typer.Option(min=1, help="Local ranks to start; default --dap, or torchrun's.")
]
Dap = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks that split each protein; default all. The rest is dp."),
]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes a rank has to make examples; 0 for none beside it.")
]


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
    ranks: Ranks = None,
    dap: Dap = None,
    product: train.Product = "gather",
    passing: train.Passing = "gather",
    workers: Workers = 1,
    dtype: train.Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, crops and sampling.")] = None,
    checkpoint_every: train.CheckpointEvery = None,
    validate_every: train.ValidateEvery = None,
    json: Json = False,
) -> None:
    """Train a folding model on structures with alignments; prints each protein's Ca-RMSD."""
    train.require_extras(_NEEDS)
    from hairpin.run.fold_train import run_fold_training
    from hairpin.run.launch import launched

    count = train.rank_count(ranks or (None if launched() else dap))
    job = prepare(
        data,
        recipe_name=recipe,
        changes=train.given(
            proteins=tuple(protein) if protein else None,
            batch_size=batch_size,
            dtype=dtype,
            seed=seed,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
        ),
        steps=steps,
        resume=resume,
        fallback=fallback,
        out=out,
        workers=workers,
        split=Split(count, dap, product, passing),
    )
    with train.telling_how_to_go_on("fold", job.out_dir):
        result = train.on_folding_ranks(run_fold_training, job.dp * job.dap, job)
    if result is None:  # under torchrun, on all ranks but the first
        return
    train.tell(figures(result), table(result), json=json)


class Split(NamedTuple):
    """How many ranks there are and how they split the model."""

    ranks: int = 1
    dap: int | None = None
    product: str = "gather"
    passing: str = "gather"

    def settings(self) -> dict[str, Any]:
        """What a job says of it.

        Raises:
            MeshError: ``dap`` does not divide the ranks.
            PlanError: a way that does not exist.
        """
        train.require_way(self.product, self.passing)
        dap = self.ranks if self.dap is None else self.dap
        if self.ranks % dap:
            raise MeshError(
                f"got {self.ranks} ranks and dap={dap}; groups of ranks are equal, so give a --dap "
                "that divides --ranks"
            )
        dp = self.ranks // dap
        return {"dp": dp, "dap": dap, "product": self.product, "passing": self.passing}


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
    split: Split,
) -> "FoldJob":
    """Everything that can be wrong is found here, before a step is spent."""
    from dataclasses import replace

    from hairpin.proteins.loader import find_proteins
    from hairpin.run.fold_train import FoldJob, require_shares
    from hairpin.run.recipes import FoldRecipe, fold_tiny

    shared = split.settings()
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
    require_shares(recipe, shared["dp"])
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
        **shared,
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
