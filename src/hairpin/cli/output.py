"""Where a command writes: data to stdout, everything said to a person on the way to stderr."""

import json as json_text
import sys
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_result(result: Any, show: Callable[[Any], None], *, json: bool) -> None:
    """Write a command's result to stdout: as JSON, or as ``show`` does."""
    if json:
        print_json(result)
    else:
        show(result)


def print_json(data: Any) -> None:
    """Write plain data to stdout as indented JSON."""
    sys.stdout.write(json_text.dumps(data, indent=2) + "\n")


def print_text(text: str) -> None:
    """Write a command's result to stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def stdout() -> "Console":
    """A console for tables that are the command's result."""
    from rich.console import Console

    return Console(highlight=False)


def new_table(
    title: str,
    headings: Iterable[str],
    *,
    left: Collection[str] = ("",),
    least: int | None = None,
) -> "Table":
    """A table without lines; numbers stand to the right.

    Args:
        left: headings of columns of words: they stand to the left, and wrap if need be.
        least: width of those at least, in characters.
    """
    from rich.table import Table

    table = Table(box=None, title=title)
    for heading in headings:
        if heading in left:
            table.add_column(heading, min_width=least)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def command_line() -> str:
    """This command as one would type it."""
    import shlex

    return shlex.join(["hairpin", *sys.argv[1:]])


def say(text: str) -> None:
    """Tell the person something that is not data."""
    sys.stderr.write(text + "\n")
