"""How every benchmark's command begins and ends: a quiet torch, a folder, a result in a file."""

import json as json_text
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hairpin.cli.output import say
from hairpin.errors import OutputError


def prepare(out: Path) -> None:
    """Before torch is imported: quieten it, and make the folder, so that no measurement is lost.

    Raises:
        OutputError: the folder cannot be made.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings about host names
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # stages of its profiler
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def run_bench(
    measure: Callable[..., dict[str, Any]], settings: Any, *, out: Path, name: str
) -> dict[str, Any]:
    """Measure, warned of a busy machine, and write the result to ``name``.json.

    Raises:
        OutputError: the file cannot be written.
    """
    from hairpin.bench.measure import foreign_load

    warning = foreign_load()
    if warning is not None:
        say(warning)
    result = measure(settings, say=say)
    path = out / f"{name}.json"
    try:
        path.write_text(json_text.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise _unwritable(out, error) from error
    say(f"wrote {path}")
    return result


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write into {folder}: {error.strerror}; name a folder you may write to with --out"
    )
