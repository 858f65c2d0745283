"""What must not change in a block between planning and running it."""

from collections.abc import Hashable
from functools import cache
from typing import Any

from torch import nn

from hairpin.planning.loops.hookless import HOOKS
from hairpin.planning.loops.settings import setting


def stamp(block: nn.Module) -> tuple[Any, ...]:
    """What must not change in a block after it was planned: settings, modes, hooks inside it.

    A layer may be replaced by one of the same class, settings, shapes and dtypes. What shares a
    parameter must go on sharing it: the graph has it once.
    """
    parts = tuple(_part_stamp(part, inner=part is not block) for part in block.modules())
    return parts, _shared(block)


def _shared(block: nn.Module) -> tuple[int, ...]:
    """Of each parameter and buffer: where the same one comes first."""
    first: dict[int, int] = {}
    tensors = (
        tensor
        for part in block.modules()
        for held in (part._parameters, part._buffers)
        for _, tensor in sorted(held.items())
        if tensor is not None
    )
    return tuple(first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors))


def _part_stamp(part: nn.Module, *, inner: bool) -> tuple[Any, ...]:
    own = vars(part)
    skipped = () if not inner or _has_modes(part) else ("training",)
    settings = tuple(
        (name, setting(value))
        for name, value in sorted(own.items())
        if not name.startswith("_") and name != "forward" and name not in skipped
    )
    hooks = tuple(key for name in HOOKS for key in own[name]) if inner else ()
    shapes = tuple(
        (name, t.shape, t.dtype)
        for tensors in (part._parameters, part._buffers)
        for name, t in sorted(tensors.items())
        if t is not None
    )
    forward = own.get("forward") if inner else None
    if getattr(forward, "ours", False):  # loops and dropouts of a plan are no change
        forward = None
    return type(part), settings, hooks, forward, shapes


def _has_modes(part: nn.Module) -> bool:
    """Whether a module may act otherwise in training: torch's own layers show it in their code.

    A fresh ``nn.Linear`` is in ``train()`` and computes what one in ``eval()`` does.
    """
    return any(True for _ in part.children()) or _reads_mode(type(part))  # type: ignore[arg-type]


@cache
def _reads_mode(kind: Hashable) -> bool:
    assert isinstance(kind, type)
    if not kind.__module__.startswith("torch.nn.modules"):
        return True
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    codes = [getattr(value, "__code__", None) for base in own for value in vars(base).values()]
    return any(code is not None and "training" in code.co_names for code in codes)
