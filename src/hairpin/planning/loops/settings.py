"""Settings of a module as values that are equal where they act the same."""

from collections.abc import Mapping
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MOST_ITEMS = 1000  # of a container that is compared by what it holds
_DEPTH = 4  # of containers and objects in each other


class Same:
    """Stands for an object that is equal to itself alone; a deep copy stands for the copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def setting(value: Any, depth: int = _DEPTH) -> Any:
    """A value that is equal for objects that act the same; else the object's identity."""
    if isinstance(value, _PLAIN):
        return type(value).__qualname__, repr(value)
    if isinstance(value, FunctionType):
        bare = not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)
        return (value.__module__, value.__qualname__, value.__code__) if bare else Same(value)
    if depth and isinstance(value, (tuple, list)) and len(value) <= _MOST_ITEMS:
        return type(value).__qualname__, tuple(setting(item, depth - 1) for item in value)
    if depth and isinstance(value, Mapping) and len(value) <= _MOST_ITEMS:
        return type(value).__qualname__, _pairs(value, depth)
    if isinstance(value, (Tensor, partial, nn.Module, type)):
        return Same(value)
    inside = getattr(value, "__dict__", None)
    if depth and _is_python(type(value)) and inside is not None and len(inside) <= _MOST_ITEMS:
        return type(value).__qualname__, _pairs(inside, depth)
    return Same(value)


def _is_python(kind: type) -> bool:
    """Whether a class is written in Python, so that its objects are what their attributes are."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return all(base in (object, SimpleNamespace) or base.__flags__ & heap for base in kind.__mro__)


def _pairs(items: Mapping[Any, Any], depth: int) -> tuple[Any, ...]:
    """What is under each key; texts in order, so that the order they were set in does not count."""
    pairs = [(setting(key, depth - 1), setting(item, depth - 1)) for key, item in items.items()]
    return tuple(sorted(pairs, key=lambda pair: str(pair[0])))
