"""What a block does to its gradients and a graph of its operations would not.

A graph for training is differentiated operation by operation. A ``detach``, a ``torch.no_grad()``
or a backward of its own that a block's code has would be lost there, with the forward still right,
so such a block is refused.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from hairpin.errors import TraceError

_STOPS = frozenset({"aten.detach", "aten.detach_"})


def require_own_gradients(
    block: str, exported: torch.export.ExportedProgram, notes: Sequence[str]
) -> None:
    """Raise unless autograd of a graph's operations gives the gradients of the block.

    Every parameter and every argument of floats counts as one that needs a gradient, since the
    plan holds for calls in which it does.

    Args:
        block: its name, for the message.
        exported: in grad mode, and not decomposed yet.
        notes: of :func:`noting_backwards`.

    Raises:
        TraceError: naming what would be lost.
    """
    learned = [
        spec.kind in (InputKind.PARAMETER, InputKind.USER_INPUT)
        for spec in exported.graph_signature.input_specs
    ]
    stops = [*notes, *_stops(exported.graph_module, learned)]
    if stops:
        raise TraceError(
            f"the forward of {block} changes its own gradients, which loops for training would "
            f"not keep: {', '.join(dict.fromkeys(stops))}"
        )


def _stops(module: fx.GraphModule, learned: Sequence[bool]) -> list[str]:
    """Where gradients end in a graph, in words.

    Args:
        learned: whether each placeholder may need a gradient.
    """
    found: list[str] = []
    needs: set[fx.Node] = set()
    written = False  # a gradient into some tensor in place, which others may be views of
    flags = iter(learned)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            needed = next(flags)
        else:
            needed = written or any(source in needs for source in node.all_input_nodes)
        if needed:
            found += _stops_of(module, node, needs)
        if needed and _has_floats(node):
            needs.add(node)
            written = written or _is_write(node)
    return found


def _stops_of(module: fx.GraphModule, node: fx.Node, needs: Container[fx.Node]) -> list[str]:
    """The same of one operation, or of the graph within the graph that it runs."""
    if str(getattr(node.target, "overloadpacket", "")) in _STOPS:
        return ["detach()"]
    if str(node.target) == "wrap_with_set_grad_enabled":
        enabled, inner, *args = node.args
        if not enabled:
            loses = _has_floats(node) or _writes(_inner(module, inner))
            return ["torch.no_grad()"] if loses else []
    elif str(node.target) == "wrap_with_autocast":
        _device, _dtype, _enabled, _cache, inner, *args = node.args
    else:
        return []
    return _stops(_inner(module, inner), [arg in needs for arg in args])


def _inner(module: fx.GraphModule, node: Any) -> fx.GraphModule:
    found = module.get_submodule(str(node.target))
    assert isinstance(found, fx.GraphModule)
    return found


def _has_floats(node: fx.Node) -> bool:
    """Whether a node's value, or one of them, could have a gradient."""
    if "val" not in node.meta:
        return any(_has_floats(user) for user in node.users)
    tensors = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _writes(module: fx.GraphModule) -> bool:
    return any(_is_write(node) for node in module.graph.nodes)


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@contextmanager
def noting_backwards() -> Iterator[list[str]]:
    """While the block lasts, note what code does to gradients that leaves no mark in a graph."""
    notes: list[str] = []
    apply = torch.autograd.Function.__dict__["apply"].__func__
    enter, hook = torch.inference_mode.__enter__, Tensor.register_hook
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def noted_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        notes.append(f"the autograd function {cls.__name__}")
        return apply(cls, *args, **kwargs)

    def noted_enter(mode: torch.inference_mode) -> None:
        if mode.mode:
            notes.append("torch.inference_mode()")
        enter(mode)

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            notes.append(name)
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name, instead in (
            (torch.autograd.Function, "apply", classmethod(noted_apply)),
            (torch.inference_mode, "__enter__", noted_enter),
            (Tensor, "register_hook", noted("Tensor.register_hook", hook)),
            (torch.autograd, "grad", noted("torch.autograd.grad", grad)),
            (torch.autograd, "backward", noted("torch.autograd.backward", backward)),
        ):
            stack.enter_context(patch.object(owner, name, instead))
        yield notes
