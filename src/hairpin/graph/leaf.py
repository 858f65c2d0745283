"""Blocks as single operations of the graph around them.

A model of 48 equal blocks is traced as one block and, around it, a graph in which each call of a
block is one node. While the model is exported, the forward of each block is stood in for by an
operator whose shapes come from the block's own graph.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from hairpin.graph.lengths import hints

_NAMESPACE = "hairpin_trace"


@dataclass(eq=False)
class Site:
    """One block of a model, and the calls of it that a trace met.

    Attributes:
        path: of the block in the model.
        traced: its own graph, a :class:`~hairpin.graph.export.Traced`.
        specs: of each call, how its arguments flatten; plain arguments in place, tensors as None.
    """

    path: str
    block: nn.Module
    traced: Any
    calls: list["Call"] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Call:
    """How one call's arguments are put together from a list of tensors.

    Attributes:
        outputs: traced values of what it returns.
        recipes: tensors that are made inside the call, from those given.
    """

    spec: Any
    plain: tuple[Any, ...]
    outputs: tuple[Any, ...] = ()
    recipes: tuple["Recipe", ...] = ()

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in their places, and those that are made of them."""
        given = iter(tensors)
        made = {recipe.place: recipe.made(tensors) for recipe in self.recipes}
        wanted = range(self.plain.count(TENSOR))
        found = iter([made[place] if place in made else next(given) for place in wanted])
        leaves = [next(found) if leaf is TENSOR else leaf for leaf in self.plain]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one tensor among a call's arguments is made, inside the call.

    Attributes:
        place: among the call's tensors, counting those that are made.
        takes: places among the tensors that are given.
        words: the same for two recipes that compute the same.
    """

    place: int
    takes: tuple[int, ...]
    graph: fx.GraphModule
    words: str

    def made(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        found: Tensor = self.graph(*(tensors[place] for place in self.takes))
        return found


class _Tensor:
    """Stands for a tensor among the plain arguments."""

    def __repr__(self) -> str:
        return "tensor"


TENSOR = _Tensor()


@contextmanager
def as_leaves(model: nn.Module, graphs: Mapping[str, Any]) -> Iterator[dict[str, Site]]:
    """While the block lasts, calls of these submodules are recorded as single operations.

    Args:
        graphs: path of a submodule -> its graph.
    """
    sites = {path: Site(path, model.get_submodule(path), traced) for path, traced in graphs.items()}
    library = torch.library.Library(_NAMESPACE, "DEF")
    try:
        library.define("block(Tensor[] tensors, str path, int call) -> Tensor[]")

        def shapes(tensors: Sequence[Tensor], path: str, call: int) -> list[Tensor]:
            return shapes_of(sites[path], tensors)

        torch.library.register_fake(f"{_NAMESPACE}::block", shapes, lib=library)
        for site in sites.values():
            site.block.__dict__["forward"] = _Recorded(site)
        yield sites
    finally:
        for site in sites.values():
            site.block.__dict__.pop("forward", None)
        library._destroy()


class NotALeaf(Exception):
    """A block cannot be a single step of the graph around it.

    Attributes:
        path: of the block.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"block '{path}': {reason}")
        self.path = path


class OtherCall(Exception):
    """A block is called in another way than its graph was traced.

    Attributes:
        path: of the block.
        arguments: (args, kwargs) of the call, tensors on the meta device.
    """

    def __init__(self, path: str, arguments: Any) -> None:
        super().__init__(f"block '{path}' is called in another way than it was traced")
        self.path, self.arguments = path, arguments


def _alike(call: Call, spec: Any, leaves: Sequence[Any]) -> bool:
    """Whether a call has tensors where another had them, and the same plain arguments."""
    if spec != call.spec:
        return False
    return all(
        isinstance(leaf, Tensor) if plain is TENSOR else type(leaf) is type(plain) and leaf == plain
        for plain, leaf in zip(call.plain, leaves, strict=True)
    )


def _shape_only(tensor: Tensor) -> Tensor:
    shape, strides = hints(tensor.shape), hints(tensor.stride())
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")


class _Recorded:
    """Stands in for the forward of a block while the model around it is traced."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.forward = type(site.block).forward
        self.__signature__ = inspect.signature(self.forward.__get__(site.block))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        site = self.site
        call = canonical(self.forward.__get__(site.block), args, kwargs)
        leaves, spec = tree_flatten(call)
        if not _alike(site.traced.call, spec, leaves):
            raise OtherCall(site.path, tree_map_only(Tensor, _shape_only, call))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        site.calls.append(Call(spec, plain))
        operator = getattr(torch.ops, _NAMESPACE).block
        values = list(operator(tensors, site.path, len(site.calls) - 1))
        return tree_unflatten(values, site.traced.out_spec)


def shapes_of(site: Site, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a block's graph on fake tensors of other lengths."""
    traced = site.traced
    leaves = iter(tensors)
    values = []
    for port in traced.inputs:
        if port.kind == "given":
            values.append(next(leaves))
        else:
            held = (
                traced.constants[port.name]
                if port.kind == "constant"
                else state(site.block, port.name)
            )
            values.append(torch.empty(held.shape, dtype=held.dtype, device=held.device))
    outputs: list[Any] = list(
        fx.Interpreter(fx.GraphModule(nn.Module(), traced.graph)).run(*values)
    )
    given = {value.untyped_storage()._cdata for value in values}
    if any(not isinstance(out, Tensor) for out in outputs):
        raise NotALeaf(site.path, "it returns something that is not a tensor")
    storages = [out.untyped_storage()._cdata for out in outputs]
    if any(port.kind != "returned" for port in traced.outputs):
        raise NotALeaf(site.path, "it writes into its buffers or arguments")
    if given & set(storages) or len(set(storages)) < len(storages):
        raise NotALeaf(site.path, "what it returns shares storage with its arguments or itself")
    return list(outputs)


@dataclass(frozen=True, eq=False)
class BlockCall:
    """A block as a function of tensors alone, for the graph around it."""

    block: nn.Module
    path: str
    call: Call

    def __call__(self, *tensors: Tensor) -> list[Any]:
        forward = vars(self.block).get("forward")
        if self.call.recipes and forward is not None and hasattr(forward, "from_given"):
            return list(tree_flatten(forward.from_given(self.call, tensors))[0])
        args, kwargs = self.call.arguments(tensors)
        return list(tree_flatten(self.block(*args, **kwargs))[0])


def run_block(block: Any, *tensors: Tensor) -> list[Any]:
    """What a graph calls where a block stands: ``block`` is a :class:`BlockCall`."""
    outputs: list[Any] = block(*tensors)
    return outputs


def with_block_inputs(
    graph: fx.Graph, sites: Mapping[str, Site]
) -> list[tuple[fx.Node, str, Call]]:
    """Make the blocks inputs of the graph, so that it fits any model of this structure.

    Returns:
        Each new input with the block's path and call, in the order of the placeholders at the end.
    """
    found: list[tuple[fx.Node, str, Call]] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if not str(node.target).startswith(f"{_NAMESPACE}.block"):
            continue
        tensors, path, number = node.args
        with graph.inserting_after(last):
            last = graph.placeholder(f"block_{path.replace('.', '_')}_{len(found)}")
        last.meta["val"] = None
        found.append((last, path, sites[path].calls[number]))
        node.target, node.args = run_block, (last, *tensors)
    return found


def state(block: nn.Module, name: str) -> Tensor:
    """Parameter or buffer ``name`` as the block holds it now."""
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(block.get_submodule(path), last)
    return found


def canonical(
    forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call in one form, whether they were given by place or by name."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return tuple(args), dict(sorted(kwargs.items()))
    named = {name: bound.kwargs[name] for name in bound.arguments if name in bound.kwargs}
    rest = {name: value for name, value in sorted(bound.kwargs.items()) if name not in named}
    return bound.args, {**named, **rest}
