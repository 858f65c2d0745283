"""What must not change in a block between planning and running it."""

from typing import Any

from torch import nn


def stamp(block: nn.Module) -> tuple[Any, ...]:
    """What must not change in a block after it was planned: settings, modes, hooks inside it."""
    return tuple(_part_stamp(part, inner=part is not block) for part in block.modules())


def _part_stamp(part: nn.Module, *, inner: bool) -> tuple[Any, ...]:
    own = vars(part)
    settings = tuple(
        (name, value)
        for name, value in own.items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    )
    hooks = (*part._forward_hooks, *part._forward_pre_hooks) if inner else ()
    shapes = tuple(
        (name, t.shape, t.dtype)
        for tensors in (part._parameters, part._buffers)
        for name, t in tensors.items()
        if t is not None
    )
    forward = own.get("forward") if inner else None
    if getattr(forward, "ours", False):  # loops and dropouts of a plan are no change
        forward = None
    return type(part), settings, hooks, forward, shapes
