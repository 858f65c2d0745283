"""``hairpin sample``: clips drawn from a checkpoint, as a film and a contact sheet."""

from pathlib import Path
from typing import Annotated

import typer

from hairpin.cli.output import Json, print_json, print_text
from hairpin.cli.train import DpOfClips, Ranks, on_ranks, rank_count, write_pictures


def sample(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a run or of one checkpoint.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder for samples.gif and samples.png.")] = Path(
        "samples"
    ),
    count: Annotated[int, typer.Option(min=1, help="Clips to draw.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of clips and noise.")] = 0,
    ranks: Ranks = None,
    dp: DpOfClips = 1,
    json: Json = False,
) -> None:
    """Draw clips that go on from the first frames of clips the model has never seen."""
    from hairpin.run import checkpoint
    from hairpin.run.video import degrees, run_sampling

    world = rank_count(ranks)
    dp, sp = degrees(world, dp)
    source = checkpoint.find(path)
    folder = checkpoint.require_writable(out)
    drawn = on_ranks(run_sampling, world, source, dp=dp, sp=sp, count=count, seed=seed)
    if drawn is None:
        return
    film, sheet = write_pictures(folder, drawn)
    if json:
        figures = {"psnr_db": drawn.psnr_db, "still_psnr_db": drawn.still_psnr_db, "clips": count}
        print_json({"film": str(film), "sheet": str(sheet), **figures})
    else:
        print_text(f"{film}\n{sheet}")
