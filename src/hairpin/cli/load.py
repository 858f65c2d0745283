"""Objects named on the command line as ``pkg.mod:name``."""

import sys
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from hairpin.errors import HairpinError


class ObjectNameError(HairpinError, ValueError):
    """A name given as ``pkg.mod:name`` leads to nothing."""


def load_object(spec: str) -> Any:
    """What ``pkg.mod:name`` names; the current folder is searched first, as ``python -m`` does.

    Raises:
        ObjectNameError: the text has another form, or there is no such module or name.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise ObjectNameError(
            f"cannot read {spec!r} as the name of an object; write module:name, "
            "for example mymodel:build"
        )
    module = _import(module_name, spec)
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        names = ", ".join(name for name in vars(module) if not name.startswith("_"))
        raise ObjectNameError(
            f"{spec!r}: module {module_name!r} ({module.__file__}) has no {path!r}; it has {names}"
        ) from error


def load_callable(spec: str) -> Any:
    """The function ``pkg.mod:name`` names.

    Raises:
        ObjectNameError: there is no such object, or it cannot be called.
    """
    found = load_object(spec)
    if not callable(found):
        raise ObjectNameError(
            f"{spec!r} is of type {type(found).__name__}, which cannot be called; name a function "
            "that takes no arguments"
        )
    return found


def _import(module_name: str, spec: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there but imports something absent is another fault: say which.
        missing = error.name or module_name
        ours = module_name == missing or module_name.startswith(f"{missing}.")
        raise ObjectNameError(
            f"{spec!r}: there is no module {missing!r} in {here} or among the installed packages; "
            "run the command in the folder that holds it, or install its package"
            if ours
            else f"{spec!r}: importing {module_name!r} failed: it needs {missing!r}, which is not "
            "installed"
        ) from error
