"""``hairpin profile``: what one step of a model costs on this machine."""

from typing import Annotated

import typer

from hairpin.cli.load import ObjectNameError, load_callable
from hairpin.cli.output import print_json, print_text


def profile(
    build: Annotated[
        str,
        typer.Argument(metavar="PKG.MOD:BUILD", help="A function returning (model, inputs)."),
    ],
    *,
    backward: Annotated[bool, typer.Option("--backward", help="Run a backward too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure peak memory, time and bytes moved of one step of a model."""
    from dataclasses import asdict

    from hairpin.run.profile import profile as measure

    built = load_callable(build)()
    if not isinstance(built, tuple) or len(built) < 2:
        raise ObjectNameError(
            f"{build!r} returned one {type(built).__name__}; let it return (model, inputs)"
        )
    model, inputs, *_ = built
    report = measure(model, inputs, backward=backward)
    if json:
        print_json(asdict(report))
    else:
        print_text(str(report))
