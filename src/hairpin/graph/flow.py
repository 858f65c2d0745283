"""Which dim of which value is the same dim, all through one run of a model.

Every dim of every value is a group of *atoms*, outermost first, as einops writes it: ``(b t)`` is
a group of two. An operation that works position by position ties the dims of its inputs to those of
its outputs, after the rules of :mod:`hairpin.graph.axes`; a reshape ties flattened runs of dims,
and cuts atoms where it has to. What is tied is one dim. An operation *computes along* an atom that
no single rule covers wherever it occurs.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hairpin.graph.axes import Axis, Operation, Span, axes, operation
from hairpin.graph.trace import Shape

Group = tuple[int, ...]
Kind = Literal["data", "parameter", "constant"]
Binder = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]]

_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "_unsafe_view", "_reshape_alias", "reshape", "view_as", "reshape_as"),
        *("flatten", "unflatten", "squeeze", "unsqueeze"),
    )
)
_UNSPLIT = frozenset(["aten.convolution", "aten.native_group_norm", "aten.native_batch_norm"])


# -------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class Node:
    """One operation of a run.

    Attributes:
        name: ``"aten.add"``; ``module``: path of the innermost module running.
        inputs, outputs: numbers of the values, in the order that ``axes`` counts them.
    """

    name: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[Axis, ...]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        args: the tensor arguments by parameter name, in the order given.
        inside: tensors that lie inside other arguments, such as a list.
        outputs: each output, None for one that is no tensor; None in all where the module gives
            something else than a tensor or a tuple that begins with one.
        begin, end: the operations ``nodes[begin:end]`` ran inside it.
        children: calls of other modules made by this one.
    """

    path: str
    args: Mapping[str, int]
    inside: tuple[int, ...]
    begin: int
    end: int = 0
    outputs: tuple[int | None, ...] | None = None
    children: list["Call"] = field(default_factory=list)

    def walk(self) -> Iterator["Call"]:
        """This call and all calls inside it, in the order they began."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass
class Trace:
    """All operations and module calls of one run; a value is a number.

    Attributes:
        kinds: whether a value comes from the model's input, from parameters alone, or from neither.
        names: parameters and buffers; ``dropouts``: paths of the model's ``nn.Dropout``.
        root: the call of the model itself.
        results: every tensor that the model gave.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: dict[int, Shape] = field(default_factory=dict)
    kinds: dict[int, Kind] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    dropouts: frozenset[str] = frozenset()
    root: Call = field(default_factory=lambda: Call("", {}, (), 0))
    results: tuple[int, ...] = ()


class _Recorder(TorchDispatchMode):
    """Writes down every operation, and which values it takes and gives."""

    def __init__(self, dropouts: frozenset[str]) -> None:
        super().__init__()
        self.trace = Trace(dropouts=dropouts)
        self.stack: list[Call] = []
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def number(self, tensor: Tensor | Any, kind: Kind = "constant") -> int:
        """The number of a value; a new one, of ``kind``, where it was not seen before."""
        if not isinstance(tensor, Tensor):  # an output that is a number or None
            self.trace.shapes[len(self.trace.shapes)] = ()
            return len(self.trace.shapes) - 1
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        number = len(self.trace.shapes)
        self._numbers[id(tensor)] = (weakref.ref(tensor), number)
        self.trace.shapes[number] = tuple(map(int, tensor.shape))
        self.trace.kinds[number] = kind
        return number

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim":
            self._write(func, args, kwargs, out)
        return out

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        trace = self.trace
        inputs = tuple(map(self.number, _tensors((args, kwargs))))
        kind = _kind(trace.kinds[value] for value in inputs)
        results = out if isinstance(out, (list, tuple)) else [out]
        outputs = tuple(self.number(result, kind) for result in results)
        trace.kinds |= dict.fromkeys(outputs, kind)  # what is written in place changes its kind
        found = _functional(operation(func, args, kwargs, out))
        path = self.stack[-1].path if self.stack else ""
        if path in trace.dropouts and found.name == "aten.bernoulli":
            found = replace(found, name="aten.dropout")  # a plan draws by global position
        rules = () if found.name in _RESHAPES else (*axes(found), *_summed(found))
        trace.nodes.append(Node(found.name, path, inputs, outputs, rules))

    def begin(self, path: str, args: Mapping[str, Any]) -> None:
        """A module begins to run."""
        kind: Kind = "constant" if self.stack else "data"
        plain = {n: self.number(x, kind) for n, x in args.items() if isinstance(x, Tensor)}
        rest = [x for x in args.values() if not isinstance(x, Tensor)]
        inside = tuple(self.number(x, kind) for x in _tensors(rest))
        call = Call(path, plain, inside, begin=len(self.trace.nodes))
        if self.stack:
            self.stack[-1].children.append(call)
        else:
            self.trace.root = call
        self.stack.append(call)

    def finish(self, output: Any) -> None:
        """The innermost module running ends."""
        call = self.stack.pop()
        call.end = len(self.trace.nodes)
        outputs = output if isinstance(output, tuple) else (output,)
        if outputs and isinstance(outputs[0], Tensor):
            call.outputs = tuple(self.number(x) if isinstance(x, Tensor) else None for x in outputs)
        if not self.stack:
            self.trace.results = tuple(map(self.number, _tensors(output)))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _kind(kinds: Iterable[Kind]) -> Kind:
    found = set(kinds)
    return "data" if "data" in found else "parameter" if "parameter" in found else "constant"


def _summed(found: Operation) -> tuple[Axis, ...]:
    """The dim that a product with a bias sums over: no axis, since the bias is added once."""
    dims = {"aten.addmm": (1, 0), "aten.baddbmm": (2, 1), "aten.addmv": (1, 0)}.get(found.name)
    if dims is None:
        return ()
    return (Axis({1: Span(dims[0]), 2: Span(dims[1])}, {}, sums=True),)


def _functional(found: Operation) -> Operation:
    """An operation in place by the name of the one that is not: ``aten.add_`` as ``aten.add``."""
    in_place = found.name.endswith("_") and not found.name.endswith("__")
    return replace(found, name=found.name[:-1]) if in_place else found


@contextmanager
def recording(model: nn.Module, bind: Binder) -> Iterator[Trace]:
    """Record every operation and module call of the one forward that the block runs.

    Args:
        bind: gives a call's arguments by parameter name.
    """
    modules = dict(model.named_modules())
    recorder = _Recorder(frozenset(p for p, m in modules.items() if isinstance(m, nn.Dropout)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        recorder.trace.names[recorder.number(tensor, "parameter")] = name
    handles = []
    for path, module in modules.items():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            recorder.begin(path, bind(module, args, kwargs))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            recorder.finish(output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with recorder:
            yield recorder.trace
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------ atoms


class Atoms:
    """Dims that cannot be taken apart, as far as is known; they are joined and cut as more is."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parts: dict[int, Group] = {}

    def new(self, size: int) -> Group:
        """A group for a dim of this length; an empty one for length 1."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def leaves(self, group: Iterable[int]) -> Group:
        """What a group consists of by now."""
        found: list[int] = []
        waiting = list(group)[::-1]
        while waiting:
            atom = waiting.pop()
            parts = self._parts.get(atom)
            if parts is None:
                found.append(atom)
            else:
                waiting.extend(parts[::-1])
        return tuple(found)

    def length(self, group: Iterable[int]) -> int:
        """Number of positions that a group counts."""
        return prod(self.sizes[atom] for atom in group)

    def tie(self, one: Group, other: Group) -> bool:
        """Make two groups the same, cutting atoms where they differ; False where they cannot be."""
        while True:
            pairs = zip(left := self.leaves(one), right := self.leaves(other), strict=False)
            differing = next(((x, y) for x, y in pairs if x != y), None)
            if differing is None:
                return len(left) == len(right)
            x, y = differing
            if self.sizes[x] == self.sizes[y]:
                self._parts[y] = (x,)
            elif self.sizes[x] % self.sizes[y] == 0:
                self._cut(x, self.sizes[y])
            elif self.sizes[y] % self.sizes[x] == 0:
                self._cut(y, self.sizes[x])
            else:
                return False

    def head(self, group: Group, size: int) -> Group | None:
        """The outermost part of a group that counts ``size`` positions, or None."""
        taken: list[int] = []
        left = size
        for atom in self.leaves(group):
            if left == 1:
                break
            if self.sizes[atom] % left == 0 and self.sizes[atom] > left:
                self._cut(atom, left)
                taken.append(self._parts[atom][0])
                left = 1
            elif left % self.sizes[atom] == 0:
                taken.append(atom)
                left //= self.sizes[atom]
            else:
                return None
        return tuple(taken) if left == 1 else None

    def _cut(self, atom: int, outer: int) -> None:
        self._parts[atom] = (*self.new(outer), *self.new(self.sizes[atom] // outer))


# ------------------------------------------------------------------------------------------- flow


class Flow:
    """The dims of values, as the operations that were followed tie them."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.atoms = Atoms()
        self._labels: dict[int, tuple[Group, ...]] = {}
        self._channels: list[Group] = []

    def groups(self, value: int) -> tuple[Group, ...]:
        """What each dim of a value consists of."""
        return tuple(map(self.atoms.leaves, self._label(value)))

    @property
    def channels(self) -> frozenset[int]:
        """Atoms that products with parameters sum over or give: those that parameters carry."""
        return frozenset(self.atoms.leaves(a for group in self._channels for a in group))

    def mark_channels(self, group: Group) -> None:
        """Count a group among the channels."""
        self._channels.append(group)

    def _label(self, value: int) -> tuple[Group, ...]:
        if value not in self._labels:
            shape = self.trace.shapes[value]
            self._labels[value] = tuple(self.atoms.new(length) for length in shape)
        return self._labels[value]

    def follow(self, nodes: Iterable[Node]) -> "Flow":
        """Tie the dims of what these operations take and give."""
        for node in nodes:
            if node.name in _RESHAPES:
                for before, after in self._runs(node):
                    self.atoms.tie(before, after)
            for axis in node.axes:
                heads = self._heads(node, axis)
                first, *others = heads.items() or [((True, 0, 0), ())]
                for place, head in others:
                    if not self._is_again(node, place, first[1]):
                        self.atoms.tie(first[1], head)
                if heads and self._is_carried(node, axis):
                    self.mark_channels(first[1])
            for before, after in self._kept(node):
                self.atoms.tie(before, after)
            if node.name in _UNSPLIT and self.trace.kinds[node.inputs[0]] == "data":
                self.mark_channels(self._label(node.inputs[0])[1])
        return self

    def along(self, node: Node) -> frozenset[int]:
        """Atoms that one operation does not treat position by position."""
        if node.name in _RESHAPES:
            runs = [tuple(map(self.atoms.leaves, run)) for run in self._runs(node)]
            return frozenset(a for one, other in runs if one != other for a in (*one, *other))
        places: dict[int, list[tuple[bool, int, int]]] = defaultdict(list)
        for is_output, values in ((False, node.inputs), (True, node.outputs)):
            for index, value in enumerate(values):
                for dim, group in enumerate(self.groups(value)):
                    for atom in group:
                        places[atom].append((is_output, index, dim))
        fine: set[int] = set()
        for axis in node.axes:
            heads = self._heads(node, axis)
            leaves = {self.atoms.leaves(head) for head in heads.values()}
            if axis.sums or len(leaves) != 1:
                continue
            fine |= {atom for atom in leaves.pop() if sorted(places[atom]) == sorted(heads)}
        return frozenset(places) - fine

    def _heads(self, node: Node, axis: Axis) -> dict[tuple[bool, int, int], Group]:
        """Each place that an axis names, and the outer part of its dim that the axis counts."""
        spans = {
            **{(False, i, s.dim): (node.inputs[i], s) for i, s in axis.inputs.items()},
            **{(True, i, s.dim): (node.outputs[i], s) for i, s in axis.outputs.items()},
        }
        lengths = {k: self.trace.shapes[v][s.dim] / s.unit for k, (v, s) in spans.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values())).is_integer():
            return {}
        found = {}
        for key, (value, span) in spans.items():
            head = self.atoms.head(self._label(value)[span.dim], int(lengths[key]))
            if head is None:
                return {}
            found[key] = head
        return found

    def _is_again(self, node: Node, place: tuple[bool, int, int], head: Group) -> bool:
        """Whether another dim of an output is of these atoms already.

        Of scores between all positions, or of pairs of them, each side is a dim of its own.
        """
        is_output, index, dim = place
        if not is_output:
            return False
        groups = self.groups(node.outputs[index])
        others = {a for other, group in enumerate(groups) if other != dim for a in group}
        return not others.isdisjoint(self.atoms.leaves(head))

    def _kept(self, node: Node) -> list[tuple[Group, Group]]:
        """Dims that an operation computes along, before and after, where it keeps the shape."""
        if not node.axes or not node.inputs or not node.outputs:
            return []
        source, result = node.inputs[0], node.outputs[0]
        if source == result or self.trace.shapes[source] != self.trace.shapes[result]:
            return []
        named = {axis.inputs[0].dim for axis in node.axes if 0 in axis.inputs}
        named |= {axis.outputs[0].dim for axis in node.axes if 0 in axis.outputs}
        pairs = enumerate(zip(self._label(source), self._label(result), strict=True))
        return [pair for dim, pair in pairs if dim not in named]

    def _runs(self, node: Node) -> list[tuple[Group, Group]]:
        """Runs of dims before and after a reshape that hold the same elements."""
        before, after = self._label(node.inputs[0]), self._label(node.outputs[0])
        shapes = self.trace.shapes[node.inputs[0]], self.trace.shapes[node.outputs[0]]
        return [
            (
                tuple(a for dim in ours for a in before[dim]),
                tuple(a for dim in theirs for a in after[dim]),
            )
            for ours, theirs in segments(*shapes)
        ]

    def _is_carried(self, node: Node, axis: Axis) -> bool:
        """Whether an axis sums over a parameter's dim, or takes one into data from there alone."""
        kinds = [self.trace.kinds[node.inputs[i]] for i in axis.inputs]
        if "parameter" not in kinds or self.trace.kinds[node.outputs[0]] != "data":
            return False
        return axis.sums or "data" not in kinds


def segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims before and after a reshape that hold the same elements."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ours, theirs = [i], [j]
        i, j = i + 1, j + 1
        while (n := _length(before, ours)) != (m := _length(after, theirs)):
            if n < m:
                ours.append(i)
                i += 1
            else:
                theirs.append(j)
                j += 1
        found.append((ours, theirs))
    return found


def _length(shape: Sequence[int], dims: Iterable[int]) -> int:
    return prod(shape[dim] for dim in dims)
