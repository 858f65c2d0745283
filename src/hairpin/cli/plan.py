"""``hairpin plan``: where to split a model over how many devices, worked out without any device."""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli.load import load_callable, load_object
from hairpin.cli.output import print_json, print_text, say
from hairpin.errors import MeshError, PlanError

if TYPE_CHECKING:
    from hairpin.planning.seam import Attends, Seam


def plan(
    build: Annotated[
        str,
        typer.Argument(
            metavar="PKG.MOD:BUILD",
            help="A function returning a model, (model, example) or (model, example, attends).",
        ),
    ],
    *,
    devices: Annotated[int, typer.Option(help="Number of devices to plan for.")],
    dp: Annotated[int, typer.Option(help="Devices along the data axis; the rest split.")] = 1,
    example: Annotated[
        str | None, typer.Option(metavar="PKG.MOD:NAME", help="An input, or a function giving one.")
    ] = None,
    attends: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE.toml|PKG.MOD:NAME", help="Which module computes along which dim."
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help='Dims of the stream, "b t s c", if the table is short.'
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most that activations may take on a device: 70GiB."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this TOML file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Choose where to split a model over DEVICES, and say what that costs; needs no devices."""
    import hairpin as hp

    model, inputs, table = build_parts(build, example=example, attends=attends)
    mesh = hp.Mesh(dp=dp, sp=sp_degree(devices, dp))
    made = hp.plan(model, inputs, mesh, attends=table, dims=dims, memory=memory)
    if output is not None:
        made.save(output)
        say(f"wrote {output}")
    if json:
        print_json(tomllib.loads(made.to_toml()))
    else:
        print_text(made.explain())


def sp_degree(devices: int, dp: int) -> int:
    """Devices along the axis that splits.

    Raises:
        MeshError: ``dp`` does not divide ``devices``.
    """
    if devices < 1 or dp < 1 or devices % dp:
        raise MeshError(
            f"--devices {devices} cannot be shared out over --dp {dp}; --dp must divide --devices"
        )
    return devices // dp


def build_parts(
    build: str, *, example: str | None, attends: str | None
) -> tuple[Any, Any, "Attends"]:
    """Model, example and table: options come before what the build function returns.

    Raises:
        PlanError: the example or the table comes from nowhere.
    """
    built = without_memory(load_callable(build), build)
    model, inputs, table = (
        (*built, None, None)[:3] if isinstance(built, tuple) else (built, None, None)
    )
    if example is not None:
        named = load_object(example)
        inputs = without_memory(named, example) if callable(named) else named
    if attends is not None:
        table = load_table(attends)
    if inputs is None:
        raise PlanError(
            f"{build!r} returned no example input; let it return (model, example), or name one "
            "with --example pkg.mod:example"
        )
    if table is None:
        raise PlanError(
            f"nothing says which modules of {type(model).__name__} compute along which dim; give a "
            'table with --attends table.toml, with lines such as "blocks.*.spatial" = "b t [s] c"'
        )
    return model, inputs, table


def without_memory(build: Callable[[], Any], name: str) -> Any:
    """What ``build`` returns, made on the meta device: shapes without values, however large.

    A function that needs values while it builds is called again for real, with a word.
    """
    import torch

    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        say(f"{name} cannot be built without memory ({reason}); building it for real")
        return build()


def load_table(source: str) -> "Attends":
    """The table in a TOML file, or the mapping that ``pkg.mod:NAME`` names.

    Raises:
        PlanError: not a file that holds a table, or not a mapping.
    """
    if not source.endswith(".toml"):
        named = load_object(source)
        if not isinstance(named, Mapping):
            raise PlanError(
                f"{source!r} is of type {type(named).__name__}; name a dict of module -> pattern"
            )
        return named
    try:
        data = tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"cannot read a table from {source}: {error}") from error
    return {module: _seam(module, value, source) for module, value in data.items()}


def _seam(module: str, value: Any, source: str) -> "str | Seam | Mapping[str, str]":
    from hairpin.planning.seam import Seam

    if isinstance(value, str) or (module == "" and isinstance(value, Mapping)):
        return value
    try:
        return Seam(**value)
    except TypeError as error:
        raise PlanError(
            f"{source}: entry {module!r} is {value!r}; write a pattern, or a table with the keys "
            "stream, args, out, stream_arg"
        ) from error
