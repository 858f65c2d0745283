"""Where a command writes: data to stdout, everything said to a person on the way to stderr."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(data: Any) -> None:
    """Write plain data to stdout as indented JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_text(text: str) -> None:
    """Write a command's result to stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def stdout() -> "Console":
    """A console for tables that are the command's result."""
    from rich.console import Console

    return Console(highlight=False)


def command_line() -> str:
    """This command as one would type it."""
    import shlex

    return shlex.join(["hairpin", *sys.argv[1:]])


def say(text: str) -> None:
    """Tell the person something that is not data."""
    sys.stderr.write(text + "\n")
