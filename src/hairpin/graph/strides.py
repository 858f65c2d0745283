"""Strides of dims of length 1, where fake tensors differ from the kernels.

By them torch tells whether an image lies channels last, and the layout of all that follows depends
on it: for a batch of one picture they decide what a convolution holds.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hairpin.graph.lengths import alike, hints

Layout = Callable[[Any, Tensor], Tensor]

_NONE: Mapping[fx.Node, Any] = MappingProxyType({})
_VIEWS = frozenset(
    {
        torch.ops.aten.view.default,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.reshape.default,
    }
)


def layout(func: Any) -> Layout | None:
    """How to give a fake result of ``func`` the kernel's strides, from arguments and result.

    None where fake tensors have them already.
    """
    if func in _VIEWS:
        return _viewed
    if torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1:
        return _with_number
    return None


def _viewed(args: Any, out: Tensor) -> Tensor:
    """``computeStride`` steps over what is inside a dim of length 1, not over the whole."""
    x = args[0]
    shape, strides, after = hints(x.shape), hints(x.stride()), hints(out.shape)
    with _disable_current_modes():
        bare = torch.empty_strided(shape, strides, dtype=x.dtype, device="meta")
        if bare.is_contiguous():
            return out
        try:
            found = bare.view(after).stride()
        except RuntimeError:  # a reshape that copies
            return out
    return _with_strides(out, found)


def _with_number(args: Any, out: Tensor) -> Tensor:
    """An operand of another shape keeps TensorIterator off its fast path: strides are kept."""
    x, *others = args
    if not isinstance(x, Tensor) or not others or not alike(x.shape, out.shape):
        return out
    if any(isinstance(y, Tensor) and y.dim() for y in others):
        return out
    return _with_strides(out, hints(x.stride()))


def _with_strides(out: Tensor, strides: Any) -> Tensor:
    """The result with these strides, if only those of dims of length 1 are others."""
    now = hints(out.stride())
    differ = [n for n, a, b in zip(hints(out.shape), now, strides, strict=True) if a != b]
    if not differ or any(length != 1 for length in differ):
        return out
    kept = out.stride()
    mixed = [a if a_ == b else b for a, a_, b in zip(kept, now, strides, strict=True)]
    return out.as_strided(out.shape, mixed)


class _LaidOut(TorchDispatchMode):
    """While it lasts, fake results have the kernels' strides."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        lays_out = layout(func)
        if lays_out is None or type(out) is not FakeTensor or 1 not in hints(out.shape):
            return out
        return lays_out(args, out)


def lay_out(graph: fx.Graph, blocks: Mapping[fx.Node, Callable[..., Any]] = _NONE) -> None:
    """Give every value of a graph the strides that it has when the graph runs.

    Args:
        blocks: inputs of the graph that are blocks -> what they give for fake tensors.
    """
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.args and node.args[0] in blocks:
            _block_again(node, blocks[node.args[0]], changed)
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or "val" not in node.meta:
            if any(source in changed for source in node.all_input_nodes):
                _pick(node, changed)
            continue
        old = node.meta["val"]
        stale = any(source in changed for source in node.all_input_nodes)
        if not stale and (type(old) is not FakeTensor or 1 not in hints(old.shape)):
            continue
        new = _again(node) if stale else _laid_out(node, old)
        if new is not None and new is not old:
            node.meta["val"] = new
            changed.add(node)


def _block_again(node: fx.Node, run: Callable[..., Any], changed: set[fx.Node]) -> None:
    """Outputs of a block, laid out as what comes in makes them."""
    tensors = [x.meta["val"] for x in node.args[1:] if isinstance(x, fx.Node)]
    mode = next((x.fake_mode for x in tensors if type(x) is FakeTensor), None)
    if mode is None or mode.shape_env is None:
        return
    try:
        with torch.no_grad(), mode.shape_env.suppress_guards(), mode, _LaidOut():
            made = list(run(tensors))
    except Exception:  # noqa: BLE001 - then they stay as they were traced
        return
    node.meta["val"] = made
    changed.add(node)


def _pick(node: fx.Node, changed: set[fx.Node]) -> None:
    """One result of several that were computed again."""
    source = node.args[0] if node.args else None
    if node.op == "call_function" and source in changed and isinstance(source, fx.Node):
        several = source.meta["val"]
        if isinstance(several, (tuple, list)) and isinstance(node.args[1], int):
            node.meta["val"] = several[node.args[1]]
            changed.add(node)


def _again(node: fx.Node) -> Any:
    """The value of a step whose inputs have other strides than they had."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    mode = next((x.fake_mode for x in args if type(x) is FakeTensor), None)
    if mode is None or mode.shape_env is None:
        return None
    try:
        with torch.no_grad(), mode.shape_env.suppress_guards(), mode:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - then its value stays as it was traced
        return None
    return _laid_out(node, made)


def _laid_out(node: fx.Node, made: Any) -> Any:
    lays_out = layout(node.target)
    if lays_out is None or type(made) is not FakeTensor or 1 not in hints(made.shape):
        return made
    args, _ = fx.node.map_arg((node.args, {}), lambda n: n.meta["val"])
    env = made.fake_mode.shape_env
    with torch.no_grad(), made.fake_mode:
        if env is None:
            return lays_out(args, made)
        with env.suppress_guards():
            return lays_out(args, made)
