"""Taking forward hooks off a module again."""

from collections.abc import Callable
from typing import Any

from torch import nn


def drop_hooks(module: nn.Module, is_ours: Callable[[object], bool]) -> None:
    """Remove the forward hooks of a module that are ours."""
    registries: list[list[dict[int, Any]]] = [
        [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        [
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ],
    ]
    for hooks, *flags in registries:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            for registry in (hooks, *flags):
                registry.pop(key, None)
