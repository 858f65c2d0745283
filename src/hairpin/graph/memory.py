"""Live bytes along a graph: which storage each value lies in, from when to when it is needed.

Sizes are those of the example. Views share the storage of what they view, so a chain of reshapes
costs nothing; storages of inputs and parameters are not counted, they were there before.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from hairpin.graph.axes import Axis, Operation, Span, axes, operation
from hairpin.graph.export import shape_of
from hairpin.graph.halo import halo_axes
from hairpin.graph.leaf import run_block
from hairpin.graph.lengths import alike, compiled, hint, hints, is_open
from hairpin.graph.meter import Meter

END = 1 << 30  # a time after every step: outputs are needed then


@dataclass(eq=False)
class Step:
    """One operation of a graph, with what the search asks of it.

    Attributes:
        index: place in the order of the graph.
        inputs: nodes of its tensor inputs, in the order that :class:`Axis` counts them.
        axes: dims along which it can be cut.
        root: node that made the storage of its (first) result; itself if it made one.
        is_view: it makes no storage of its own.
        nbytes: of the storages that it makes.
        last_use: index of the last step that reads its value itself, END for an output.
        work: bytes that it takes for itself while it runs.
        takes_over: the step whose storage it may write its result into: that dies here.
        extra: bytes that a block inside it holds while it runs, its results included.
        growth: how many times as large its result is as in the example.
        made_at: index of the step that made its storage: for a getitem, the operation before it.
    """

    index: int
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    axes: tuple[Axis, ...]
    operation: Operation | None
    root: fx.Node
    is_view: bool
    nbytes: int
    last_use: int
    work: int = 0
    takes_over: fx.Node | None = None
    extra: int = 0
    growth: float = 1.0
    made_at: int = -1

    def resized(self, now: int, then: int) -> "Step":
        """The same step where the storages of its results have ``now`` bytes, not ``then``."""
        growth = now / then if then else 1.0
        nbytes, work = now if self.nbytes else 0, math.ceil(self.work * growth)
        return replace(self, nbytes=nbytes, work=work, growth=growth)


@dataclass(eq=False)
class Flow:
    """The steps of a graph, and the storages that are alive between them."""

    graph: fx.Graph
    steps: tuple[Step, ...]
    index: dict[fx.Node, int]  # of the nodes that are steps
    storage_end: dict[fx.Node, int]  # root -> index of the last step that reads any of its views
    scale: "Scale"

    @cached_property
    def live_bytes(self) -> list[int]:
        """Bytes alive just before each step, and after the last."""
        changes = [0] * (len(self.steps) + 2)
        for step in self.steps:
            if step.nbytes:
                changes[step.made_at + 1] += step.nbytes
                changes[min(self.storage_end[step.node], len(self.steps)) + 1] -= step.nbytes
        total, live = 0, []
        for change in changes[: len(self.steps) + 1]:
            total += change
            live.append(total)
        return live

    @cached_property
    def peak_bytes(self) -> int:
        """Most bytes alive during a step."""
        return max(self.during(step) for step in self.steps) if self.steps else 0

    def during(self, step: Step) -> int:
        """Bytes alive while a step runs: before it, and what it makes."""
        new = 0 if step.takes_over is not None else self._made[step.index]
        return self.live_bytes[step.index] + max(new + step.work, step.extra)

    @cached_property
    def _made(self) -> list[int]:
        """Bytes that each step makes, those included that a getitem after it takes out."""
        made = [0] * len(self.steps)
        for step in self.steps:
            made[step.made_at] += step.nbytes
        return made

    @cached_property
    def _sizes_at(self) -> Any:
        """Storage bytes of every step's results as a function of the lengths."""
        return compiled(self._sizes)

    @cached_property
    def _sizes(self) -> list[Any]:
        sizes: list[Any] = []
        for step in self.steps:
            own = kept_tensors(step.node) if step.nbytes else []
            if step.work and not own:
                own = tensors(step.node.meta["val"])[:1]
            storages = {_storage(tensor): tensor.untyped_storage() for tensor in own}
            sizes.append(sum(storage.nbytes() for storage in storages.values()))
        return sizes

    def at(self, lengths: Mapping[Any, int]) -> "Flow":
        """The same steps at other lengths; their axes keep the units of the example.

        What a step takes for itself is not weighed again: it is taken to grow as its result does.
        """
        sizes = zip(self.steps, self._sizes_at(lengths), hints(self._sizes), strict=True)
        steps = tuple(step.resized(now, then) for step, now, then in sizes)
        return Flow(self.graph, steps, self.index, self.storage_end, self.scale)

    def with_extra(self, extra: Mapping[fx.Node, int]) -> "Flow":
        """The same steps, some of which hold more while they run."""
        steps = tuple(replace(step, extra=extra.get(step.node, 0)) for step in self.steps)
        return Flow(self.graph, steps, self.index, self.storage_end, self.scale)

    def live_roots(self, boundary: int) -> Iterator[Step]:
        """Steps before ``boundary`` whose storage is read at or after it.

        A step of several results is not among them: each getitem after it is one.
        """
        for step in self.steps[:boundary]:
            if (
                step.nbytes
                and isinstance(step.node.meta["val"], Tensor)
                and self.storage_end[step.node] >= boundary
            ):
                yield step


def flow_of(graph: fx.Graph) -> Flow:
    """Follow every value of a graph."""
    nodes = [node for node in graph.nodes if _is_step(node)]
    index = {node: place for place, node in enumerate(nodes)}
    owners = _Owners(graph)
    steps = tuple(_step(node, index, owners) for node in nodes)
    ends: dict[fx.Node, int] = {}
    for step in steps:
        for tensor in tensors(step.node.meta["val"]):
            root = owners.root(tensor, step.node)
            ends[root] = max(ends.get(root, step.index), step.last_use)
    scale = Scale()
    for step in steps:
        step.work = scale.whole(step)
        step.takes_over = _takes_over(step, steps, index, ends)
    return Flow(graph, steps, index, ends, scale)


class _Owners:
    """Which node made each storage."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes: dict[int, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                for tensor in tensors(node.meta.get("val")):
                    self._nodes.setdefault(_storage(tensor), node)

    def root(self, tensor: Tensor, default: fx.Node) -> fx.Node:
        """The node that made a tensor's storage."""
        return self._nodes.get(_storage(tensor), default)

    def claim(self, tensor: Tensor, node: fx.Node) -> bool:
        """Note who made a storage; whether it is new."""
        key = _storage(tensor)
        is_new = key not in self._nodes
        self._nodes.setdefault(key, node)
        return is_new


def _step(node: fx.Node, index: Mapping[fx.Node, int], owners: _Owners) -> Step:
    value = node.meta["val"]
    made = 0
    for tensor in kept_tensors(node):  # of a tuple, each getitem makes its own
        made += hint(tensor.untyped_storage().nbytes()) if owners.claim(tensor, node) else 0
    roots = [owners.root(tensor, node) for tensor in tensors(value)]
    described = _described(node)
    return Step(
        index=index[node],
        node=node,
        inputs=tuple(tensor_inputs(node)),
        axes=_axes(node, described),
        operation=described,
        root=roots[0],
        is_view=made == 0 and roots[0] is not node,
        nbytes=made,
        last_use=_last_use(node, index),
        made_at=index[_maker(node)] if made else index[node],
    )


def _maker(node: fx.Node) -> fx.Node:
    """The operation that made a value: for a getitem the one before it."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


def kept_tensors(node: fx.Node) -> list[Tensor]:
    """Results that stay with a node itself: of several, those that no ``getitem`` takes out."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return [value]
    taken = [user.args[1] for user in node.users if user.target is operator.getitem]
    read = {_storage(t) for place in taken for t in tensors(value[place])}
    return [t for t in tensors(value) if _storage(t) not in read]


def _takes_over(
    step: Step, steps: Sequence[Step], index: Mapping[fx.Node, int], ends: Mapping[fx.Node, int]
) -> fx.Node | None:
    """The root of an operand that a pointwise step may write its result into."""
    if not step.nbytes or inplace(step.node.target) is None:
        return None
    for source in operands(step.node):
        place = index.get(source)
        if place is None:
            continue
        root = steps[place].root
        if ends.get(root) != step.index or root not in index or may_alias(root):
            continue
        others = [s for s in step.inputs if s is not source]
        if same_layout(source, step.node) and not any(
            s in index and steps[index[s]].root is root for s in others
        ):
            return root
    return None


def operands(node: fx.Node) -> list[fx.Node]:
    """Operands that an in-place variant of a pointwise operation may write into."""
    found = list(node.args[:1])
    if str(node.target) in ("aten.add.Tensor", "aten.mul.Tensor") and not node.kwargs:
        found.append(node.args[1])
    return [operand for operand in found if isinstance(operand, fx.Node)]


def inplace(target: Any) -> Any:
    """The in-place variant of a pointwise operation, None where there is none."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, f"{name}_", None)
    if packet is None or name.endswith("_") or target._overloadname not in packet.overloads():
        return None
    return getattr(packet, target._overloadname)


def same_layout(operand: fx.Node, result: fx.Node) -> bool:
    """Whether two values have the same dtype, shape and strides."""
    mine, theirs = operand.meta["val"], result.meta["val"]
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return False
    return bool(
        mine.dtype == theirs.dtype
        and alike(mine.shape, theirs.shape)
        and alike(mine.stride(), theirs.stride())
    )


_MAY_ALIAS = frozenset(
    f"aten.{name}"
    for name in [
        "reshape",
        "contiguous",
        "to",
        "flatten",
        "type_as",
        "dropout",
        "unflatten",
        "expand",
    ]
)


def may_alias(node: fx.Node) -> bool:
    """Whether a value may lie in a storage from outside: some operations copy only if they must."""
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is run_block:
        return True
    packet = str(getattr(node.target, "overloadpacket", ""))
    return node.op in ("placeholder", "get_attr") or packet in _MAY_ALIAS


class Scale:
    """Weighs single operations on fake tensors: bytes that they take beyond their results."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._known: dict[Any, int] = {}

    def whole(self, step: Step) -> int:
        """Bytes that a step takes for itself at the example's lengths."""
        return self._work(step, {})

    def part(self, step: Step, spans: Mapping[int, Span], count: int) -> int:
        """The same when its inputs are cut to ``count`` units of these spans."""
        cuts = {p: (s.dim, s.unit * count + s.before + s.after) for p, s in spans.items()}
        return self._work(step, cuts)

    def _work(self, step: Step, cuts: Mapping[int, tuple[int, int]]) -> int:
        operation = step.operation
        if operation is None or operation.pointwise or not operation.inputs:
            return 0
        if operation.name.removeprefix("aten.") not in _HUNGRY:
            return 0
        key = (step.node.target, step.index, tuple(sorted(cuts.items())))
        if key not in self._known:
            self._known[key] = self._weigh(step.node, cuts)
        return self._known[key]

    def _weigh(self, node: fx.Node, cuts: Mapping[int, tuple[int, int]]) -> int:
        counter = iter(range(len(node.args) * 8 + 64))

        def value(source: fx.Node) -> Any:
            given = source.meta["val"]
            if isinstance(given, Tensor):
                made = self._empty(given)
                dim, length = cuts.get(next(counter), (0, -1))
                return made if length < 0 else made.narrow(dim, 0, min(length, made.shape[dim]))
            return hint(given) if is_open(given) else given

        meter = Meter()
        with torch.no_grad(), self._mode:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            with meter:
                try:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
                except (RuntimeError, ValueError, TypeError):
                    return 0
        kept = meter.live_bytes
        del result
        return max(meter.peak_bytes - kept, 0)

    def _empty(self, like: Tensor) -> Tensor:
        shape, strides = hints(like.shape), hints(like.stride())
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


_HUNGRY = frozenset(
    [
        "linear",
        "matmul",
        "einsum",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "bmm",
        "baddbmm",
        "addmm",
        "mm",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "group_norm",
        "softmax",
        "log_softmax",
        "layer_norm",
        "rms_norm",
        "sum",
        "mean",
        "cumsum",
        "sort",
        "topk",
        "upsample_nearest2d",
        "index",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "interpolate",
        "_softmax",
        "_log_softmax",
        "embedding",
        "index_put",
        "scatter_add",
        "gather",
        "var",
        "var_mean",
        "logsumexp",
        "argmax",
        "cat",
        "native_layer_norm",
        "native_group_norm",
    ]
)


def _is_step(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_module") and bool(tensors(node.meta.get("val")))


def _described(node: fx.Node) -> Operation | None:
    if node.target is operator.getitem:
        shape = shape_of(node.meta["val"])
        return Operation("getitem", {}, (shape,), (shape,), pointwise=True)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None

    def value(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    return operation(node.target, args, kwargs, node.meta["val"])


def _axes(node: fx.Node, described: Operation | None) -> tuple[Axis, ...]:
    """Axes from the rules; one result of a step that gives several is cut as the step is."""
    if described is None:
        return ()
    if described.name != "getitem":
        return (*axes(described), *halo_axes(described))
    source, place = node.args
    assert isinstance(source, fx.Node)
    whole = _described(source)
    found = []
    for axis in axes(whole) if whole is not None else ():
        spans = set(axis.outputs.values())
        if len(spans) == 1 and place in axis.outputs:  # cut alike in all results
            (span,) = spans
            found.append(Axis(inputs={0: span}, outputs={0: span}))
    return tuple(found)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are tensors or tuples of them, in the order of its arguments."""
    leaves = tree_flatten((list(node.args), dict(node.kwargs)))[0]
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node) and tensors(leaf.meta.get("val"))]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in the value of a node."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _last_use(node: fx.Node, index: Mapping[fx.Node, int]) -> int:
    """Index of the last step that reads this value; lengths read from it count as the next."""
    last = index[node]
    for user in node.users:
        if user.op == "output":
            return END
        last = max(last, index.get(user, last))
    return last
