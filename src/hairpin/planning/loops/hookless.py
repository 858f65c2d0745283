"""Tracing beside the hooks of a model.

Hooks of a block itself run around its forward, whatever that is, so its graph is traced without
them. Hooks inside it would be gone: a graph calls no modules. Such a block is not traced.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hairpin.errors import TraceError
from hairpin.graph.export import Traced, trace, trace_call
from hairpin.graph.leaf import Call

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_inside(block: nn.Module, blocks: Sequence[str] = ()) -> list[str]:
    """Paths of the modules inside a block that carry hooks, other than those of a plan.

    Args:
        blocks: paths of modules that stay modules, and keep theirs.
    """
    return [
        path
        for path, part in block.named_modules()
        if path
        and not any(path == kept or path.startswith(f"{kept}.") for kept in blocks)
        and any(_is_foreign(hook) for name in HOOKS for hook in vars(part)[name].values())
    ]


def _is_foreign(hook: object) -> bool:
    return not type(hook).__module__.startswith("hairpin.")


def trace_block(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    blocks: Mapping[str, Traced] | None = None,
    backward: bool = False,
) -> Traced:
    """The graph of a block's forward, as :func:`hairpin.graph.export.trace` makes it.

    Raises:
        TraceError: it cannot be exported, or a module inside it carries a hook.
    """
    with _without_hooks(block, blocks or {}):
        return trace(block, args, kwargs, blocks=blocks, backward=backward)


def trace_block_call(
    block: nn.Module,
    call: Call,
    tensors: Sequence[Tensor],
    paths: tuple[str, ...],
    *,
    backward: bool = False,
) -> Traced:
    """The same at a call that may make some of its arguments itself."""
    with _without_hooks(block, {}):
        return trace_call(block, call, tensors, paths, backward=backward)


@contextmanager
def _without_hooks(block: nn.Module, blocks: Mapping[str, Traced]) -> Iterator[None]:
    """A block, and those that stay modules inside it, without their own hooks meanwhile."""
    inside = hooks_inside(block, tuple(blocks))
    if inside:
        raise TraceError(
            f"module '{inside[0]}' inside this {type(block).__name__} carries a hook, which a "
            "graph would not call; remove the hook before planning, or let it go without loops"
        )
    modules = (block, *(block.get_submodule(path) for path in blocks))
    kept = [(module, {name: vars(module)[name] for name in HOOKS}) for module in modules]
    for module, hooks in kept:
        vars(module).update({name: type(found)() for name, found in hooks.items()})
    try:
        yield
    finally:
        for module, hooks in kept:
            vars(module).update(hooks)
