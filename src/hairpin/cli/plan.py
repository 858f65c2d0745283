"""``hairpin plan``: where to split a model and what to run as loops, without any device."""

import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli.load import load_callable, load_object
from hairpin.cli.output import print_json, print_text, say
from hairpin.errors import HairpinError, MeshError, OutputError, PlanError

if TYPE_CHECKING:
    from hairpin.planning.plan import Plan
    from hairpin.planning.split.seam import Attends, Seam

Build = Annotated[
    str,
    typer.Argument(
        metavar="PKG.MOD:BUILD",
        help="A function returning a model, (model, example) or (model, example, attends).",
    ),
]
Example = Annotated[
    str | None, typer.Option(metavar="PKG.MOD:NAME", help="An input, or a function giving one.")
]
Table = Annotated[
    str | None,
    typer.Option(metavar="TABLE.toml|PKG.MOD:NAME", help="Which module computes along which dim."),
]
Dims = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help='Dims of the stream, "b t s c", if the table is short.'),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Most that activations may take on a device: 2GiB."),
]
Picture = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Draw memory along the run, before and after."),
]


def plan(
    build: Build,
    *,
    devices: Annotated[
        int | None, typer.Option(help="Number of devices to split over; one if left out.")
    ] = None,
    dp: Annotated[int, typer.Option(help="Devices along the data axis; the rest split.")] = 1,
    example: Example = None,
    attends: Table = None,
    dims: Dims = None,
    memory: Memory = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="The memory is for a forward and a backward.")
    ] = False,
    picture: Picture = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this TOML file.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take and keep plans in the cache folder.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Choose where to split a model over DEVICES and what to run as loops; needs no devices."""
    import hairpin as hp

    _check(devices=devices, dp=dp, memory=memory, picture=picture)
    parts = build_parts(
        build,
        example=example,
        attends=attends,
        splits=devices is not None,
        on_cpu=memory is not None or picture is not None,
    )
    mesh = None if devices is None else hp.Mesh(dp=dp, sp=sp_degree(devices, dp))
    with searching() as progress:
        made = hp.plan(
            parts.model,
            parts.example,
            mesh,
            attends=parts.attends,
            dims=dims,
            memory=memory,
            backward=backward,
            progress=progress if memory is not None else None,
            cache=cache and picture is None,  # a picture needs the graphs, which no file holds
        )
    if output is not None:
        made.save(output)
        say(f"wrote {output}")
    if picture is not None:
        _draw(parts.model, parts.example, made, picture, backward=backward)
    if json:
        print_json(tomllib.loads(made.to_toml()))
    else:
        print_text(made.explain())


def _check(*, devices: int | None, dp: int, memory: str | None, picture: Path | None) -> None:
    """Refuse before anything is built what would be refused after minutes of search."""
    if devices is None and memory is None:
        raise PlanError(
            "there is nothing to plan for: give --devices 8 to split over devices, --memory 2GiB "
            "to keep one device's activations under a budget, or both"
        )
    if devices is not None:
        sp_degree(devices, dp)
    elif dp != 1:
        raise MeshError(f"--dp {dp} shares out devices; give their number with --devices")
    if memory is not None:
        from hairpin.units import parse_bytes

        parse_bytes(memory)
    if picture is not None:
        from hairpin.report.memory import require_matplotlib

        require_matplotlib()
        if not picture.resolve().parent.is_dir():
            raise OutputError(
                f"cannot write the picture to {picture}: there is no folder {picture.parent}"
            )


def _draw(model: Any, example: Any, made: "Plan", path: Path, *, backward: bool) -> None:
    from hairpin.report.memory import draw_memory
    from hairpin.run.timeline import memory_timelines

    before, after = memory_timelines(model, example, made, backward=backward)
    draw_memory(before, path, model=made.model, after=after, budget_bytes=made.memory_bytes)
    say(f"wrote {path}")


@contextmanager
def searching() -> Iterator[Callable[[str], None]]:
    """Yields what is to be told each step of a search: a spinner on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield say
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None)
        yield lambda words: bar.update(task, description=words)


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


@dataclass(frozen=True)
class Parts:
    """What there is to plan: a model without memory, an example, a table where one was given."""

    model: Any
    example: Any
    attends: "Attends | None"


def build_parts(
    build: str, *, example: str | None, attends: str | None, splits: bool, on_cpu: bool
) -> Parts:
    """Model, example and table: options come before what the build function returns.

    Args:
        splits: whether a table is needed.
        on_cpu: the model is to lie on the CPU, as it does where it runs.

    Raises:
        PlanError: the example or the table comes from nowhere.
    """
    function, named = load_callable(build), None if example is None else load_object(example)

    def make() -> Parts:
        built = function()
        model, inputs, table = (
            (*built, None, None)[:3] if isinstance(built, tuple) else (built, None, None)
        )
        if named is not None:
            inputs = named() if callable(named) else named
        return Parts(model, inputs, table if attends is None else load_table(attends))

    parts = without_memory(make, build, on_cpu=on_cpu)
    if parts.example is None:
        raise PlanError(
            f"{build!r} returned no example input; let it return (model, example), or name one "
            "with --example pkg.mod:example"
        )
    if splits and parts.attends is None:
        raise PlanError(
            f"nothing says which modules of {type(parts.model).__name__} compute along which dim; "
            'give a table with --attends table.toml, with lines such as "blocks.*.spatial" = '
            '"b t [s] c"'
        )
    return parts


def without_memory(make: Callable[[], Parts], name: str, *, on_cpu: bool) -> Parts:
    """What ``make`` returns, shapes without values, however large.

    The parts are made on the meta device. To lie on the CPU they then get storage that nothing is
    ever written to, which takes no memory. Where values are needed, by the function or by the model
    as it runs, they are made again for real, with a word.
    """
    import torch

    try:
        with torch.device("meta"):
            parts = make()
        if on_cpu and parts.example is not None:
            parts = Parts(unwritten(parts.model), blank(parts.example), parts.attends)
            _run_on_shapes(parts)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, HairpinError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"{name} cannot be built without memory ({reason}); building it for real")
        return make()
    return parts


def unwritten(model: Any) -> Any:
    """The same model with parameters and buffers of the meta device moved to CPU, never written.

    ``to_empty`` of the module would part parameters that several modules share.
    """
    import torch
    from torch import nn

    moved: dict[int, Any] = {}

    def move(tensor: torch.Tensor) -> Any:
        if id(tensor) not in moved:
            moved[id(tensor)] = empty = _empty(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                moved[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return moved[id(tensor)]

    if not isinstance(model, nn.Module):
        return model
    olds = [*model.parameters(), *model.buffers()]  # alive, so that no id is used twice
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for key, tensor in registry.items():
                if tensor is not None and tensor.is_meta:
                    registry[key] = move(tensor)
    del olds
    return model


def blank(example: Any) -> Any:
    """An example whose tensors of the meta device lie on the CPU: zeros, floats never written."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda t: _empty(t) if t.is_meta else t, example)


def _empty(tensor: Any) -> Any:
    import torch

    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    floats = tensor.is_floating_point() or tensor.is_complex()
    return empty if floats else empty.zero_()  # an index must be one that there is


def _run_on_shapes(parts: Parts) -> None:
    """Raise if the model looks at a value, which no model without memory has."""
    from hairpin.graph.meter import measure
    from hairpin.planning.example import as_example

    measure(parts.model, *as_example(parts.example))


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
    from hairpin.planning.split.seam import Seam

    if isinstance(value, str) or (module == "" and isinstance(value, Mapping)):
        return value
    try:
        return Seam(**value)
    except TypeError as error:
        raise PlanError(
            f"{source}: entry {module!r} is {value!r}; write a pattern, or a table with the keys "
            "stream, args, out, stream_arg"
        ) from error
