"""``hairpin show``: a saved plan, for a person or a program."""

from pathlib import Path
from typing import Annotated

import typer

from hairpin.cli.output import print_json, print_text


def show(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN.toml", help="A plan made by `hairpin plan`.")
    ],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print a saved plan: each switch and each loop, with its bytes and time."""
    import tomllib

    from hairpin.planning.plan import Plan

    plan = Plan.load(path)
    if json:
        print_json(tomllib.loads(path.read_text(encoding="utf-8")))
    else:
        print_text(plan.explain())
