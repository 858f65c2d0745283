"""A graph at fixed lengths: those of given inputs, or of one part of each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from hairpin.graph.axes import Span
from hairpin.graph.lengths import hint, hints
from hairpin.graph.memory import tensors


def concrete(graph: fx.Graph, flat: Sequence[Any]) -> fx.Graph:
    """A copy of a graph whose values have the lengths of these inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        return _copied(graph, [_fake(value) for value in flat])


def first_part(graph: fx.Graph, cuts: Sequence[Span | None]) -> fx.Graph:
    """A copy of the body of a loop, its values as they are in a turn of one unit.

    Args:
        graph: takes a count, and then the inputs, whose traced values are whole.
        cuts: for each of these inputs what a turn takes of it, None for the whole.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        flat: list[Any] = [1]
        for node, span in zip(placeholders[1:], cuts, strict=True):
            value = _fake(node.meta["val"])
            flat.append(value if span is None else value.narrow(span.dim, 0, span.unit))
        return _copied(graph, flat)


def _copied(graph: fx.Graph, flat: Sequence[Any]) -> fx.Graph:
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    given = iter(flat)
    for node in graph.nodes:
        made = nodes[node] = copied.node_copy(node, nodes.__getitem__)
        if made.op == "placeholder":
            made.meta["val"] = next(given)
        elif made.op != "output":
            args, kwargs = fx.node.map_arg((made.args, dict(made.kwargs)), _value)
            made.meta["val"] = made.target(*args, **kwargs)  # type: ignore[operator]
    return copied


def computed(node: fx.Node) -> Any:
    """The fake result of a node, from those of its inputs as they are now."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    mode = next(t for s in node.all_input_nodes for t in tensors(s.meta["val"])).fake_mode  # type: ignore[attr-defined]
    env = mode.shape_env
    with torch.no_grad(), mode:
        if env is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        with env.suppress_guards():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _fake(value: Any) -> Any:
    """A value of these lengths without data, of the mode that is on."""
    if not isinstance(value, Tensor):
        return hint(value) if isinstance(value, torch.SymInt) else value
    shape, strides = hints(value.shape), hints(value.stride())
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
