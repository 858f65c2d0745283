"""A block of a model as a graph of ATen operations, exported once with its lengths left open.

Tracing is done by ``torch.export`` without strict mode: the block's own Python runs once, on fake
tensors whose lengths are symbols, so nothing is computed and nothing is allocated. Parameters are
inputs of the graph by name, so that a graph fits every block of the same structure.
"""

import hashlib
import io
import logging
import mmap
import operator
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from hairpin.errors import TraceError
from hairpin.graph.autocast import autocast_now
from hairpin.graph.gradients import noting_backwards, require_own_gradients
from hairpin.graph.leaf import (
    TENSOR,
    BlockCall,
    Call,
    NotALeaf,
    OtherCall,
    as_leaves,
    canonical,
    shapes_of,
    state,
    with_block_inputs,
)
from hairpin.graph.lengths import alike, expression, hint, hints, is_open, symbol
from hairpin.graph.simplify import simplify
from hairpin.graph.strides import lay_out

_LARGE = 2**30  # bytes of a tensor whose pages are not to be reserved
_NORESERVE = 0x4000  # of Linux' mmap; Python names it from 3.12 on

_ASSERTIONS = frozenset(
    {
        "aten._assert_scalar",
        "aten._assert_tensor_metadata",
        "aten._assert_async",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
    }
)


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    Attributes:
        kind: of an input ``"state"`` (a parameter or buffer), ``"constant"``, ``"given"`` or
            ``"block"`` (a submodule that the graph calls); of an output ``"returned"``, ``"state"``
            or ``"given"`` (the new value of one).
        name: of the parameter or buffer, of the constant, path of the argument or the submodule.
        call: how a submodule's arguments are put together.
    """

    kind: str
    name: str
    call: Any = None


@dataclass(eq=False)
class Traced:
    """One block's graph.

    Attributes:
        name: class of the block.
        graph: every placeholder is an input, in the order of ``inputs``; assertions are left out.
        outputs: what each output is, in the order of the graph's output.
        call: how the arguments were given; ``paths`` names each of them.
        constants: tensors that the block made from nothing while it ran.
        guards: conditions on the lengths under which the graph is right, besides the shapes.
        training: whether the block was traced in ``train()``.
        source: what this is another order of; None for the graph as it was traced.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    call: Call
    paths: tuple[str, ...]
    out_spec: TreeSpec
    constants: Mapping[str, Tensor]
    guards: tuple[Any, ...]
    training: bool
    source: "Traced | None" = None
    _checked: dict[tuple[Any, ...], None] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """Names the graph: the same for two blocks that compute the same, whatever the weights.

        Another order of a graph has the name of the graph itself.
        """
        if self.source is not None:
            return self.source.digest
        lines = [f"{self.name} {self.training} {self.call.spec} {self.call.plain} {self.out_spec}"]
        symbols: dict[str, str] = {}
        for node in self.graph.nodes:
            value = node.meta.get("val")
            lines.append(
                f"{node.name} {node.target} {node.args} {node.kwargs} {_shape_text(value, symbols)}"
            )
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()

    @property
    def placeholders(self) -> list[fx.Node]:
        """The graph's inputs."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The graph's output."""
        output: fx.Node = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return output

    def flat_inputs(
        self, block: nn.Module, forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Any]:
        """What the graph takes, from a block of this structure and the arguments of its call.

        Raises:
            TraceError: the call is not like the one that was traced.
        """
        leaves, spec = tree_flatten(canonical(forward, args, kwargs))
        if self.call.recipes:
            raise TraceError(f"this {self.name} was traced with arguments that it makes itself")
        if spec != self.call.spec:
            raise TraceError(
                f"this {self.name} was traced with arguments {_spec_text(self.call.spec)} and is "
                f"called with {_spec_text(spec)}; plan with an example that is called like this"
            )
        self._require_plain(leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.require(tensors)
        return self.filled(block, tensors)

    def _require_plain(self, leaves: Sequence[Any]) -> None:
        for place, (traced, leaf) in enumerate(zip(self.call.plain, leaves, strict=True)):
            if traced is TENSOR and isinstance(leaf, Tensor):
                continue
            if traced is TENSOR or type(traced) is not type(leaf) or traced != leaf:
                was = "a tensor" if traced is TENSOR else repr(traced)
                raise TraceError(
                    f"argument {self.paths[place]} of this {self.name} was {was} when it was "
                    f"traced and is {_value_text(leaf)} now; plan with an example that is called "
                    "like this"
                )

    def filled(self, block: nn.Module, tensors: Sequence[Tensor]) -> list[Any]:
        """The graph's inputs: these arguments, and what the block holds."""
        given = iter(tensors)
        return [
            next(given) if port.kind == "given" else self._held(block, port) for port in self.inputs
        ]

    def _held(self, block: nn.Module, port: Port) -> Any:
        if port.kind == "constant":
            return self.constants[port.name]
        if port.kind == "block":
            return BlockCall(block.get_submodule(port.name), port.name, port.call)
        return state(block, port.name)

    @cached_property
    def _symbols(self) -> dict[Any, tuple[int, int]]:
        """Each open length: the input and the dim that has it."""
        found: dict[Any, tuple[int, int]] = {}
        for place, node in enumerate(self.placeholders):
            value = node.meta.get("val")
            if self.inputs[place].kind == "given" and isinstance(value, Tensor):
                for dim, size in enumerate(value.shape):
                    if symbol(size) is not None:
                        found.setdefault(symbol(size), (place, dim))
        return found

    @cached_property
    def example(self) -> dict[Any, int]:
        """The open lengths as they were in the example."""
        nodes = self.placeholders
        return {
            symbol: hint(nodes[place].meta["val"].shape[dim])
            for symbol, (place, dim) in self._symbols.items()
        }

    def is_long(self, leaves: Sequence[Any]) -> bool:
        """Whether every length that is open here is 2 or more in these arguments."""
        given = [port for port in self.inputs if port.kind == "given"]
        nodes = self.placeholders[self.inputs.index(given[0]) :] if given else []
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return all(
            not is_open(size) or length > 1
            for node, tensor in zip(nodes, tensors, strict=False)
            if tensor.dim() == node.meta["val"].dim()
            for size, length in zip(node.meta["val"].shape, tensor.shape, strict=True)
        )

    def lengths(self, flat: Sequence[Any]) -> dict[Any, int]:
        """The open lengths in these inputs of the graph."""
        return {
            symbol: int(flat[place].shape[dim]) for symbol, (place, dim) in self._symbols.items()
        }

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph holds for arguments like these."""
        try:
            self.require(tensors)
        except (TraceError, ValueError):  # ValueError: another number of them
            return False
        return True

    def require(self, tensors: Sequence[Tensor]) -> None:
        """Raise unless the graph holds for arguments like these.

        Raises:
            TraceError: naming the argument and what it was traced with.
        """
        key = tuple((tuple(x.shape), x.stride(), x.dtype, x.device.type) for x in tensors)
        if key in self._checked:
            return
        ports = [
            (port, node)
            for port, node in zip(self.inputs, self.placeholders, strict=True)
            if port.kind == "given"
        ]
        lengths: dict[Any, int] = {}
        for (port, node), tensor in zip(ports, tensors, strict=True):
            self._require_alike(port.name, node.meta["val"], tensor, lengths)
        for (port, node), tensor in zip(ports, tensors, strict=True):
            self._require_shape(port.name, node.meta["val"], tensor, lengths)
        for guard in self.guards:
            if guard.xreplace(lengths) == False:  # noqa: E712 - a sympy condition
                words = ", ".join(f"{symbol}={n}" for symbol, n in lengths.items())
                raise TraceError(
                    f"this {self.name} was traced under the condition {guard} on its lengths, "
                    f"which {words} breaks: its code goes another way there; plan with an example "
                    "of these lengths"
                )
        self._checked[key] = None

    def _require_alike(
        self, name: str, traced: Tensor, leaf: Tensor, lengths: dict[Any, int]
    ) -> None:
        """Same dtype, device and rank; and note the lengths that symbols stand for."""
        if (
            leaf.dtype != traced.dtype
            or leaf.dim() != traced.dim()
            or leaf.device.type != traced.device.type
            or _arrangement(leaf) != _arrangement(traced)
        ):
            raise TraceError(
                f"argument {name} of this {self.name} was {_value_text(traced)} when it was traced "
                f"and is {_value_text(leaf)} now; plan with an example like this"
            )
        for size, length in zip(traced.shape, leaf.shape, strict=True):
            if symbol(size) is not None:
                lengths.setdefault(symbol(size), int(length))

    def _require_shape(
        self, name: str, traced: Tensor, leaf: Tensor, lengths: Mapping[Any, int]
    ) -> None:
        for dim, (size, length) in enumerate(zip(traced.shape, leaf.shape, strict=True)):
            expected = int(expression(size).xreplace(lengths))
            if expected != length:
                raise TraceError(
                    f"dim {dim} of argument {name} of this {self.name} has length {length}; the "
                    f"graph that was traced holds for {expected} there (a length of 1, one that "
                    "the code fixes, or one equal to another); plan with an example of this length"
                )
            if is_open(size) and length < 2:
                raise TraceError(
                    f"dim {dim} of argument {name} of this {self.name} has length {length}, and "
                    "was traced with 2 or more; plan with an example of this length"
                )


def trace(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    blocks: Mapping[str, "Traced"] | None = None,
    backward: bool = False,
) -> Traced:
    """Export one block at these arguments; every length above 1 stays open where the code lets it.

    Args:
        blocks: path of a submodule -> its graph: its calls stay single steps of this one.
        backward: the graph is to be differentiated.

    Raises:
        TraceError: the block cannot be exported, with the reason, or with ``backward`` its code
            changes its own gradients.
        OtherCall: a block inside it is called in another way than its graph was traced.
    """
    args, kwargs = canonical(block.forward, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    call = Call(spec, tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves))
    paths = tuple("".join(map(str, path)) for path, _ in tree_flatten_with_path((args, kwargs))[0])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return trace_call(block, call, tensors, paths, blocks=blocks, backward=backward)


def trace_call(
    block: nn.Module,
    call: Call,
    tensors: Sequence[Tensor],
    paths: tuple[str, ...],
    *,
    blocks: Mapping[str, "Traced"] | None = None,
    backward: bool = False,
) -> Traced:
    """Export one block at a call of it, which may make some of its arguments itself.

    Args:
        paths: of the call's arguments, for messages.
        backward: the graph is to be differentiated.

    Raises:
        TraceError: the block cannot be exported, with the reason, or with ``backward`` its code
            changes its own gradients.
        OtherCall: a block inside it is called in another way than its graph was traced.
    """
    tensors = _distinct(tensors)
    try:
        with (
            torch.no_grad(),
            _quietly(),
            _storing_nothing(block),
            as_leaves(block, blocks or {}) as sites,
        ):
            exported = _exported(block, call, tensors, backward=backward)
            guards = _guards(exported.graph_module)
            exported = exported.run_decompositions({})
    except (OtherCall, NotALeaf, TraceError):
        raise
    except Exception as error:
        raise TraceError(f"{type(block).__name__} cannot be exported: {_reason(error)}") from error
    return _traced(block, exported, guards=guards, call=call, paths=paths, sites=sites)


def _exported(
    block: nn.Module, call: Call, tensors: tuple[Tensor, ...], *, backward: bool
) -> torch.export.ExportedProgram:
    """The block's own operations; only in grad mode do they show where that is switched off."""
    nothing: AbstractContextManager[list[str]] = nullcontext([])
    noting = noting_backwards() if backward else nothing
    with torch.set_grad_enabled(backward), noting as notes:
        exported = torch.export.export(
            _Flat(block, call), tensors, dynamic_shapes=_open(tensors), strict=False
        )
    _require_one_autocast(block, exported)
    if backward:
        require_own_gradients(type(block).__name__, exported, notes)
    return exported


def _require_one_autocast(block: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """Raise where a setting within a setting would be lost: a graph runs under the outer one."""
    modules = exported.graph_module.modules()
    graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
    if autocast_now() and any(
        str(node.target) == "wrap_with_autocast" for graph in graphs for node in graph.nodes
    ):
        raise TraceError(
            f"the forward of {type(block).__name__} sets torch.autocast itself, and is planned "
            f"under torch.autocast ({autocast_now()}) that it changes"
        )


@contextmanager
def _storing_nothing(block: nn.Module) -> Iterator[None]:
    """Put back what the forward stores in its modules, and refuse: a graph stores nothing."""
    before = {module: _contents(module) for module in block.modules()}
    yield
    changed = []
    for module, contents in before.items():
        for place, known in contents.items():
            now = getattr(module, place) if place else vars(module)
            names = [n for n in now if n not in _OWN and _differs(now[n], known.get(n, _NOTHING))]
            changed += [f"{type(module).__name__}.{n}" for n in names]
            for name in list(now):
                if name in known:
                    now[name] = known[name]
                elif name != "forward":
                    del now[name]
    if changed:
        raise TraceError(
            f"the forward of {type(block).__name__} stores {', '.join(sorted(set(changed)))}, "
            "which a graph of it would not"
        )


def _differs(now: Any, before: Any) -> bool:
    """Whether an attribute is another; export itself copies tuples and dicts."""
    if now is before:
        return False
    plain = (bool, int, float, str, tuple, list, dict, set)
    return not (isinstance(now, plain) and type(now) is type(before) and bool(now == before))


_NOTHING = object()
_OWN = frozenset({"_buffers", "_parameters", "_modules", "forward"})


def _contents(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        "": dict(vars(module)),
        "_buffers": dict(module._buffers),
        "_parameters": dict(module._parameters),
    }


class _Flat(nn.Module):
    """A block as a module that takes tensors alone, however its own call is made up."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        super().__init__()
        self.block = block
        self.call = call
        self.train(block.training)

    def forward(self, *tensors: Tensor) -> Any:
        """The block's own result."""
        args, kwargs = self.call.arguments(tensors)
        return self.block(*args, **kwargs)


def _distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Every argument a tensor of its own: export takes one that is given twice for one input."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        found.append(tensor.detach().clone() if id(tensor) in seen else tensor.detach())
        seen.add(id(tensor))
    return tuple(found)


def _open(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...]]:
    """Every length above 1, for export to leave open where the code lets it."""
    return (
        tuple(
            {dim: Dim.AUTO for dim, length in enumerate(tensor.shape) if length > 1}
            for tensor in tensors
        ),
    )


def _guards(graph_module: fx.GraphModule) -> tuple[Any, ...]:
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        shape_env = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        if shape_env is not None:
            return tuple(guard.expr for guard in shape_env.guards)
    return ()


_INPUTS = {
    InputKind.PARAMETER: "state",
    InputKind.BUFFER: "state",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "given",
}
_OUTPUTS = {
    OutputKind.USER_OUTPUT: "returned",
    OutputKind.BUFFER_MUTATION: "state",
    OutputKind.USER_INPUT_MUTATION: "given",
}


def _traced(
    block: nn.Module,
    exported: torch.export.ExportedProgram,
    *,
    guards: tuple[Any, ...],
    call: Call,
    paths: tuple[str, ...],
    sites: Mapping[str, Any],
) -> Traced:
    signature = exported.graph_signature
    given = _given_paths(call, paths)
    inputs = []
    by_name = {}
    for spec in signature.input_specs:
        if spec.kind not in _INPUTS:
            raise TraceError(f"{type(block).__name__} takes a {spec.kind.name.lower()}")
        kind = _INPUTS[spec.kind]
        inputs.append(Port(kind, next(given) if kind == "given" else _own(spec.target)))
        by_name[spec.arg.name] = inputs[-1].name
    outputs = []
    for out in signature.output_specs:
        if out.kind not in _OUTPUTS:
            raise TraceError(f"{type(block).__name__} gives back a {out.kind.name.lower()}")
        target = _own(out.target)
        outputs.append(Port(_OUTPUTS[out.kind], by_name.get(target, target)))
    graph = exported.graph_module.graph
    _without_assertions(graph)
    inputs = _without_unused(graph, inputs)
    called = with_block_inputs(graph, sites)
    simplify(graph)
    lay_out(graph, {node: partial(shapes_of, sites[path]) for node, path, _ in called})
    inputs += [Port("block", path, _with_outputs(node, call)) for node, path, call in called]
    _renew_views(graph)
    _drop_passing(graph)
    if any(node.op in ("get_attr", "call_module") for node in graph.nodes):
        raise TraceError(
            f"{type(block).__name__} holds a graph within its graph (control flow, or a switch of "
            "the gradient mode inside its forward)"
        )
    assert exported.call_spec.out_spec is not None
    return Traced(
        name=type(block).__name__,
        graph=graph,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        call=call,
        paths=paths,
        out_spec=exported.call_spec.out_spec,
        constants={_own(k): v for k, v in exported.constants.items() if isinstance(v, Tensor)},
        guards=guards,
        training=block.training,
    )


def _with_outputs(block: fx.Node, call: Call) -> Call:
    """A call with the values that it gives in the graph."""
    (node,) = block.users
    return replace(call, outputs=tuple(node.meta["val"]))


def _given_paths(call: Call, paths: Sequence[str]) -> Iterator[str]:
    """Names of the tensors that a call takes: its own arguments, then what others are made of."""
    made = {recipe.place for recipe in call.recipes}
    tensors = [path for path, plain in zip(paths, call.plain, strict=True) if plain is TENSOR]
    yield from (path for place, path in enumerate(tensors) if place not in made)
    number = 0
    while True:
        yield f"part {(number := number + 1)} of what the block makes"


def _own(name: object) -> str:
    """The block's own name of a parameter or buffer."""
    return str(name).removeprefix("block.")


def _without_assertions(graph: fx.Graph) -> None:
    """Drop checks that export wrote in; the guards say the same."""
    for node in reversed(list(graph.nodes)):
        packet = getattr(node.target, "overloadpacket", None)
        if str(packet) in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _renew_views(graph: fx.Graph) -> None:
    """Make again each view whose source was given another value, so that they share a storage."""
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target.is_view:
            continue
        source, mine = node.args[0].meta["val"], tree_flatten(node.meta["val"])[0]
        if all(_storage(view) == _storage(source) for view in mine):
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with torch.no_grad(), source.fake_mode:
            node.meta["val"] = target(*args, **kwargs)
        for user in node.users:
            if user.target is operator.getitem:
                user.meta["val"] = node.meta["val"][user.args[1]]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_PASSING = frozenset(
    f"aten.{name}"
    for name in ["type_as", "to", "contiguous", "alias", "detach", "lift_fresh", "_to_copy"]
)


def _drop_passing(graph: fx.Graph) -> None:
    """Take out operations that give their input back as it is."""
    for node in list(graph.nodes):
        if str(getattr(node.target, "overloadpacket", "")) not in _PASSING:
            continue
        source = node.args[0]
        mine, given = node.meta["val"], source.meta["val"]
        if (
            _storage(mine) == _storage(given)
            and mine.dtype == given.dtype
            and alike(mine.shape, given.shape)
            and alike(mine.stride(), given.stride())
        ):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _without_unused(graph: fx.Graph, inputs: list[Port]) -> list[Port]:
    """Drop parameters that the graph does not read: those of blocks inside it."""
    kept = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, port in zip(placeholders, inputs, strict=True):
        if port.kind == "given" or node.users:
            kept.append(port)
        else:
            graph.erase_node(node)
    return kept


def packed_outputs(traced: Traced, values: Sequence[Any]) -> Any:
    """What the block returns, from the values of the graph's outputs."""
    returned = [
        value for port, value in zip(traced.outputs, values, strict=True) if port.kind == "returned"
    ]
    return tree_unflatten(returned, traced.out_spec)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's log of an export that fails: the error says it; without fused inference."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),  # torch prints the graph of a failed export there
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def shape_of(value: Tensor) -> tuple[int, ...]:
    """The shape that a traced value had in the example."""
    return tuple(hint(size) for size in value.shape)


def _shape_text(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        words = []
        for size in value.shape:
            text = str(size)
            words.append(symbols.setdefault(text, f"n{len(symbols)}") if is_open(size) else text)
        return f"{words} {value.dtype}"
    if isinstance(value, (list, tuple)):
        return " ".join(_shape_text(item, symbols) for item in value)
    return ""


def _arrangement(tensor: Tensor) -> tuple[tuple[int, ...], bool]:
    """Dims longer than 1 from the slowest in memory to the fastest, and whether without gaps."""
    shape, strides = hints(tensor.shape), hints(tensor.stride())
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: (-strides[d], d))
    expected = 1
    dense = True
    for d in reversed(order):
        dense = dense and strides[d] == expected
        expected *= shape[d]
    return tuple(order), dense


def _spec_text(spec: TreeSpec) -> str:
    return str(spec).replace("\n", " ")


def _value_text(value: Any) -> str:
    if isinstance(value, Tensor):
        order, dense = _arrangement(value)
        gaps = "" if dense else " with gaps"
        return (
            f"a tensor of {value.dim()} dims, {value.dtype}, on {value.device.type}, dims in "
            f"memory in the order {list(order)}{gaps}"
        )
    return repr(value)


def _reason(error: BaseException) -> str:
    if "DataDependent" in type(error).__name__:
        return "its code branches on values of its input, which are not known when it is planned"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"


def filled(tensor: Tensor) -> Tensor:
    """A real tensor in place of a shape: pages that nobody writes cost nothing."""
    nbytes = tensor.element_size() * (
        1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    if nbytes >= _LARGE and sys.platform == "linux" and tensor.numel():
        return _reserving_nothing(nbytes, tensor)
    make = torch.empty_strided if tensor.is_floating_point() else _zeros
    return make(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _reserving_nothing(nbytes: int, like: Tensor) -> Tensor:
    """Zeros of any size: more of them may be asked for than the machine has memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    pages = mmap.mmap(-1, nbytes, flags=flags)
    flat = torch.frombuffer(pages, dtype=torch.uint8).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _zeros(shape: Any, stride: Any, **options: Any) -> Tensor:
    return torch.empty_strided(shape, stride, **options).zero_()
