"""Values that depend on no data: what lengths alone say of positions, masks and constants.

A small abstract interpretation of graphs of ATen operations. A value is ``Affine`` (a constant, or
positions counted along dims) or a ``Choice`` between two numbers by bounds on positions. What is
known holds for every length that the symbols of a graph allow, not only for the example's: proofs
never look at hints and never add guards. A value that is not followed is simply not known.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg

from hairpin.graph.lengths import alike, proved

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """A tensor of ``start + sum(step * index along dim)``; without steps, a constant.

    Attributes:
        start: a number, or a symbolic integer.
        steps: dim -> step, of dims along which the value changes.
    """

    start: Any
    steps: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    def plus(self, other: "Affine", factor: int = 1) -> "Affine":
        """``self + factor * other``, position by position."""
        steps = dict(self.steps)
        for dim, step in other.steps.items():
            steps[dim] = steps.get(dim, 0) + factor * step
        return Affine(self.start + factor * other.start, _nonzero(steps))

    def times(self, factor: int) -> "Affine":
        """``factor * self``."""
        return Affine(factor * self.start, _nonzero({d: factor * s for d, s in self.steps.items()}))


@dataclass(frozen=True)
class Choice:
    """A tensor of ``yes`` where every bound is <= 0, and of ``no`` elsewhere."""

    bounds: tuple[Affine, ...]
    yes: Any
    no: Any


_LARGEST = 2**31
Value = Affine | Choice
Rule = Callable[["Known", fx.Node], Value | None]


def _nonzero(steps: Mapping[int, int]) -> Mapping[int, int]:
    return MappingProxyType({dim: step for dim, step in steps.items() if step})


def is_constant(value: Value | None) -> bool:
    """The same known number everywhere."""
    return isinstance(value, Affine) and not value.steps and not isinstance(value.start, SymInt)


def holds_number(value: Value | None, number: float) -> bool:
    """Whether it is this number everywhere."""
    return is_constant(value) and isinstance(value, Affine) and value.start == number


def _is_integral(value: Affine) -> bool:
    return isinstance(value.start, (int, SymInt))


def _lowest(value: Affine, shape: Sequence[Any]) -> Any:
    return sum((s * (shape[d] - 1) for d, s in value.steps.items() if s < 0), start=value.start)


def _highest(value: Affine, shape: Sequence[Any]) -> Any:
    return sum((s * (shape[d] - 1) for d, s in value.steps.items() if s > 0), start=value.start)


def _chosen(bounds: Iterable[Affine], shape: Sequence[Any], yes: Any, no: Any) -> Value:
    """A choice without the bounds that always hold; a constant where they all or never do."""
    left: list[Affine] = []
    for bound in bounds:
        if proved(_lowest(bound, shape) > 0):
            return Affine(no)
        known = any(
            bound.steps == other.steps and proved(other.start >= bound.start) for other in left
        )
        if not known and not proved(_highest(bound, shape) <= 0):
            left.append(bound)
    if not left or yes is no or yes == no:
        return Affine(yes)
    return Choice(tuple(left), yes, no)


def _bounds(value: Value | None) -> tuple[Affine, ...] | None:
    """Where a boolean is true, as bounds that hold together; None where that cannot be said."""
    if isinstance(value, Affine) and value.start is True:
        return ()
    if not isinstance(value, Choice):
        return None
    if value.yes is True and value.no is False:
        return value.bounds
    if value.yes is False and value.no is True and len(value.bounds) == 1:
        return (value.bounds[0].times(-1).plus(Affine(1)),)
    return None


def _placed(value: Value, places: Sequence[Affine | None], shape: Sequence[Any]) -> Value | None:
    """``value[places]``: the index along each of its dims as it follows from new indices.

    Returns:
        The value in a tensor of ``shape``; None where it changes along a dim without a place.
    """

    def put(affine: Affine) -> Affine | None:
        result = Affine(affine.start)
        for dim, step in affine.steps.items():
            place = places[dim]
            if place is None:
                return None
            result = result.plus(place, step)
        return result

    if isinstance(value, Affine):
        return put(value)
    bounds = [put(bound) for bound in value.bounds]
    if any(bound is None for bound in bounds):
        return None
    return _chosen([b for b in bounds if b is not None], shape, value.yes, value.no)


def _index(dim: int, step: int = 1, start: Any = 0) -> Affine:
    return Affine(start, MappingProxyType({dim: step}))


def _broadcast(value: Value, shape: Sequence[Any], wanted: Sequence[Any]) -> Value | None:
    """The value as it is when ``shape`` is broadcast to ``wanted``."""
    ahead = len(wanted) - len(shape)
    places = [
        _index(ahead + dim) if alike([n], [wanted[ahead + dim]]) else None
        for dim, n in enumerate(shape)
    ]
    return _placed(value, places, wanted)


@dataclass
class Known:
    """What is known of the nodes of a graph; learn them in the graph's order.

    Attributes:
        values: of nodes that depend on no data.
    """

    values: dict[fx.Node, Value] = field(default_factory=dict, kw_only=True)

    def learn(self, node: fx.Node) -> None:
        """Find what is known of a node's result, from what is known of its inputs."""
        value = self._value(node)
        if value is not None:
            self.values[node] = value
        else:
            self.values.pop(node, None)

    def of(self, node: Any) -> Value | None:
        """What is known of a node's result."""
        return self.values.get(node) if isinstance(node, fx.Node) else None

    def _value(self, node: fx.Node) -> Value | None:
        result, target = node.meta.get("val"), node.target
        if not isinstance(target, OpOverload) or target is aten.view.dtype:
            return None
        if not isinstance(result, Tensor) or result.is_complex():
            return None
        name = name_of(node)
        value = _RULES[name](self, node) if name in _RULES else None
        if value is None and is_pointwise(node):
            value = _evaluated(self, node)
        if isinstance(value, Affine) and not is_constant(value):
            # Smaller integers wrap around, and so would large ones; floats round.
            numbers = [*value.steps.values(), value.start]
            large = any(isinstance(n, int) and abs(n) > _LARGEST for n in numbers)
            return None if large or result.dtype != torch.int64 else value
        return value

    def broadcast(self, arg: Any, node: fx.Node) -> Value | None:
        """What is known of an operand, broadcast to the result; numbers are constants."""
        if isinstance(arg, (bool, int, float)):
            return Affine(arg)
        if not isinstance(arg, fx.Node):
            return None
        result = arg.meta.get("val")
        if isinstance(result, SymInt):
            return Affine(result)
        value = self.values.get(arg)
        if value is None or not isinstance(result, Tensor):
            return None
        return _broadcast(value, result.shape, result_of(node).shape)


def result_of(node: Any) -> Tensor:
    """The fake tensor that a node gives."""
    result = node.meta["val"]
    assert isinstance(result, Tensor)
    return result


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the schema; a symbolic number instead of its node."""
    assert isinstance(node.target, OpOverload)
    found = node.kwargs.get(name)
    for place, given in zip(node.target._schema.arguments, node.args, strict=False):
        if place.name == name:
            found = given
    if isinstance(found, fx.Node) and not isinstance(found.meta.get("val"), Tensor):
        return found.meta.get("val")
    return default if found is None else found


def name_of(node: fx.Node) -> str:
    """Of an ATen operation, without overload."""
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        return str(node.target.overloadpacket).removeprefix("aten.")
    return ""


# ------------------------------------------------------------ operation by operation


def _evaluated(known: Known, node: fx.Node) -> Value | None:
    """An operation on constants, by doing it; on a choice, for both of what it chooses from."""
    shape = node.meta["val"].shape
    inputs: dict[fx.Node, tuple[Any, Any]] = {}
    choices = []
    for source in node.all_input_nodes:
        value = known.broadcast(source, node)
        if isinstance(value, Choice):
            choices.append(value.bounds)
            inputs[source] = (value.yes, value.no)
        elif isinstance(value, Affine) and is_constant(value) and "val" in source.meta:
            inputs[source] = (value.start, value.start)
        else:
            return None
    if any(not _same_bounds(bounds, choices[0]) for bounds in choices):
        return None
    yes = _number(node, {source: pair[0] for source, pair in inputs.items()})
    if not choices or yes is None:
        return yes
    no = _number(node, {source: pair[1] for source, pair in inputs.items()})
    return _chosen(choices[0], shape, yes.start, no.start) if no is not None else None


def _same_bounds(left: Sequence[Affine], right: Sequence[Affine]) -> bool:
    return len(left) == len(right) and all(
        a.steps == b.steps and proved(a.start == b.start) for a, b in zip(left, right, strict=True)
    )


def _number(node: fx.Node, numbers: Mapping[fx.Node, Any]) -> Affine | None:
    """Run an operation on tensors of one element with these values."""

    def one(source: fx.Node) -> Tensor:
        like = source.meta["val"]
        return torch.full((1,) * min(like.dim(), 1), numbers[source], dtype=like.dtype)

    target = node.target
    assert isinstance(target, OpOverload)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in {"device", "pin_memory", "layout"}}
    try:
        with unset_fake_temporarily():
            result = target(*map_arg(node.args, one), **map_arg(kwargs, one))
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(result, Tensor) or result.dtype != node.meta["val"].dtype:
        return None
    return Affine(result.reshape(-1)[0].item())


def _filled(number: Any) -> Rule:
    """A constant; its number is the argument of this name if it is text."""

    def rule(known: Known, node: fx.Node) -> Value | None:
        found = argument(node, number) if isinstance(number, str) else number
        if isinstance(found, SymInt):
            return Affine(found)
        if not isinstance(found, (bool, int, float)):
            return None
        dtype = node.meta["val"].dtype
        with unset_fake_temporarily():
            return Affine(torch.full((), found, dtype=dtype).item())

    return rule


def _arange(known: Known, node: fx.Node) -> Value | None:
    start = argument(node, "start", 0)
    step = argument(node, "step", 1)
    if not isinstance(start, (int, SymInt)) or not isinstance(step, int):
        return None
    if node.meta["val"].dtype != torch.int64:
        return None
    if proved(node.meta["val"].shape[0] == 1):
        return Affine(start)
    return _index(0, step, start)


def _same_order(known: Known, node: fx.Node) -> Value | None:
    """Operations that keep the order of elements and change only dims of length 1."""
    source = node.args[0]
    value = known.of(source) if isinstance(source, fx.Node) else None
    if value is None or not isinstance(source, fx.Node):
        return None
    before, after = source.meta["val"].shape, node.meta["val"].shape
    old = [d for d, n in enumerate(before) if not proved(n == 1)]
    new = [d for d, n in enumerate(after) if not proved(n == 1)]
    places: list[Affine | None] = [Affine(0)] * len(before)
    matched = alike([before[d] for d in old], [after[d] for d in new])
    for at, dim in enumerate(old):
        places[dim] = _index(new[at]) if matched else None
    return _cast(_placed(value, places, after), source, node)


def _cast(value: Value | None, source: fx.Node, node: fx.Node) -> Value | None:
    """To the dtype of the result."""
    dtype = node.meta["val"].dtype
    if value is None or dtype == source.meta["val"].dtype:
        return value

    def number(old: Any) -> Any:
        with unset_fake_temporarily():
            return torch.full((), old, dtype=source.meta["val"].dtype).to(dtype).item()

    if isinstance(value, Choice):
        return _chosen(value.bounds, node.meta["val"].shape, number(value.yes), number(value.no))
    return Affine(number(value.start)) if is_constant(value) else None


def _expanded(known: Known, node: fx.Node) -> Value | None:
    return known.broadcast(node.args[0], node)


def _permuted(known: Known, node: fx.Node) -> Value | None:
    value = known.of(node.args[0])
    shape = node.meta["val"].shape
    order = list(range(len(shape)))
    if name_of(node) == "permute":
        order = [int(dim) % len(shape) for dim in argument(node, "dims")]
    elif len(shape) > 1:
        first, second = argument(node, "dim0", 0), argument(node, "dim1", 1)
        order[first], order[second] = order[second], order[first]
    places: list[Affine | None] = [_index(order.index(dim)) for dim in range(len(shape))]
    return _placed(value, places, shape) if value is not None else None


def _sliced(known: Known, node: fx.Node) -> Value | None:
    value = known.of(node.args[0])
    if value is None:
        return None
    before, after = result_of(node.args[0]).shape, node.meta["val"].shape
    dim = int(argument(node, "dim", 0)) % len(before)
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    if not isinstance(step, int):
        return None
    start = _from_start(start, before[dim])
    if start is None:
        return None
    places: list[Affine | None] = [_index(d) for d in range(len(before))]
    places[dim] = Affine(start) if proved(after[dim] == 1) else _index(dim, step, start)
    return _placed(value, places, after)


def _from_start(position: Any, length: Any) -> Any:
    """A position along a dim that may count from its end; None where that is not known."""
    if proved(position >= 0):
        return position
    if proved(position < 0) and proved(position + length >= 0):
        return position + length
    return None


def _selected(known: Known, node: fx.Node) -> Value | None:
    value = known.of(node.args[0])
    if value is None:
        return None
    before, after = result_of(node.args[0]).shape, node.meta["val"].shape
    dim = int(argument(node, "dim")) % len(before)
    at = _from_start(argument(node, "index"), before[dim])
    if at is None:
        return None
    places: list[Affine | None] = [_index(d - (d > dim)) for d in range(len(before))]
    places[dim] = Affine(at)
    return _placed(value, places, after)


def _indexed(known: Known, node: fx.Node) -> Value | None:
    """``x[i, j]`` with an index for every dim, all of them known."""
    source, indices = node.args[:2]
    value = known.of(source)
    shape = node.meta["val"].shape
    assert isinstance(indices, (list, tuple))
    if value is None or len(indices) != result_of(source).dim():
        return None
    places: list[Affine | None] = []
    for at in indices:
        place = known.broadcast(at, node) if isinstance(at, fx.Node) else None
        if not isinstance(place, Affine) or result_of(at).dtype == torch.bool:
            return None
        if not proved(_lowest(place, shape) >= 0):
            return None  # counts from the end
        places.append(place)
    return _placed(value, places, shape)


def _added(sign: int) -> Rule:
    def rule(known: Known, node: fx.Node) -> Value | None:
        left, right = (known.broadcast(arg, node) for arg in node.args[:2])
        alpha = argument(node, "alpha", 1)
        if not isinstance(left, Affine) or not isinstance(right, Affine):
            return None
        if not (_is_integral(left) and _is_integral(right) and isinstance(alpha, int)):
            return None
        if is_constant(left) and is_constant(right):
            return None  # done for real
        if name_of(node) == "rsub":
            left, right = right, left
        return left.plus(right, sign * alpha)

    return rule


def _multiplied(known: Known, node: fx.Node) -> Value | None:
    left, right = (known.broadcast(arg, node) for arg in node.args[:2])
    if not is_constant(right):
        left, right = right, left
    if not isinstance(left, Affine) or not isinstance(right, Affine) or is_constant(left):
        return None
    if not is_constant(right) or not isinstance(right.start, int) or not _is_integral(left):
        return None
    return left.times(right.start)


def _negated(known: Known, node: fx.Node) -> Value | None:
    value = known.of(node.args[0])
    if not isinstance(value, Affine) or is_constant(value) or not _is_integral(value):
        return None
    return value.times(-1)


def _compared(name: str) -> Rule:
    """``left - right`` against 0, as bounds on whole numbers."""

    def rule(known: Known, node: fx.Node) -> Value | None:
        left, right = (known.broadcast(arg, node) for arg in node.args[:2])
        if not isinstance(left, Affine) or not isinstance(right, Affine):
            return None
        if not (_is_integral(left) and _is_integral(right)):
            return None
        if is_constant(left) and is_constant(right):
            return None  # done for real
        shape = node.meta["val"].shape
        more, less = left.plus(right, -1), right.plus(left, -1)
        one = Affine(1)
        if name in {"eq", "ne"}:
            return _chosen((more, less), shape, name == "eq", name != "eq")
        bound = {"le": more, "lt": more.plus(one), "ge": less, "gt": less.plus(one)}[name]
        return _chosen((bound,), shape, True, False)

    return rule


def _both(known: Known, node: fx.Node) -> Value | None:
    """Logical and."""
    if node.meta["val"].dtype != torch.bool:
        return None
    sides = [known.broadcast(arg, node) for arg in node.args[:2]]
    if any(isinstance(side, Affine) and side.start is False for side in sides):
        return Affine(False)
    left, right = _bounds(sides[0]), _bounds(sides[1])
    if left is None or right is None:
        return None
    return _chosen((*left, *right), node.meta["val"].shape, True, False)


def _either(known: Known, node: fx.Node) -> Value | None:
    """Logical or: not both not."""
    if node.meta["val"].dtype != torch.bool:
        return None
    sides = [known.broadcast(arg, node) for arg in node.args[:2]]
    if any(isinstance(side, Affine) and side.start is True for side in sides):
        return Affine(True)
    left, right = (_bounds(_opposite(side)) for side in sides)
    if left is None or right is None:
        return None
    return _chosen((*left, *right), node.meta["val"].shape, False, True)


def _opposite(value: Value | None) -> Value | None:
    if isinstance(value, Choice):
        return Choice(value.bounds, value.no, value.yes)
    return Affine(not value.start) if value is not None and is_constant(value) else None


def _where(known: Known, node: fx.Node) -> Value | None:
    condition, *sides = (known.broadcast(arg, node) for arg in node.args[:3])
    if not isinstance(condition, Affine) or not is_constant(condition) or len(sides) < 2:
        return None
    source = node.args[1 if condition.start else 2]
    side = sides[0 if condition.start else 1]
    return _cast(side, source, node) if isinstance(source, fx.Node) else None


def _difference(known: Known, node: fx.Node) -> Value | None:
    """``diff`` of one step along a dim, with at most one position put before it."""
    value = known.of(node.args[0])
    if not isinstance(value, Affine) or not _is_integral(value):
        return None
    shape = result_of(node.args[0]).shape
    dim = int(argument(node, "dim", -1)) % len(shape)
    ahead = argument(node, "prepend")
    if argument(node, "n", 1) != 1 or argument(node, "append") is not None:
        return None
    step = value.steps.get(dim, 0)
    if ahead is not None:
        first = known.of(ahead)
        if not isinstance(first, Affine) or not proved(result_of(ahead).shape[dim] == 1):
            return None
        jump = Affine(value.start, _nonzero({**value.steps, dim: 0})).plus(first, -1)
        if jump.steps or not proved(jump.start == step):
            return None
    return Affine(step)


def _cumulated(known: Known, node: fx.Node) -> Value | None:
    value = known.of(node.args[0])
    shape = node.meta["val"].shape
    if not isinstance(value, Affine) or value.steps or not isinstance(value.start, (int, SymInt)):
        return None
    if not shape or node.meta["val"].dtype != torch.int64:
        return None
    if isinstance(value.start, SymInt):
        return None
    dim, step = int(argument(node, "dim")) % len(shape), int(value.start)
    return Affine(step) if proved(shape[dim] == 1) else _index(dim, step, step)


def _triangle(sign: int) -> Rule:
    """``tril`` (1) keeps column - row <= diagonal, ``triu`` (-1) the other side."""

    def rule(known: Known, node: fx.Node) -> Value | None:
        value = known.of(node.args[0])
        diagonal = argument(node, "diagonal", 0)
        if value is None or not isinstance(diagonal, (int, SymInt)):
            return None
        shape = node.meta["val"].shape
        row, column = len(shape) - 2, len(shape) - 1
        sizes = zip((row, column), shape[-2:], strict=True)
        steps = {d: -sign if d == row else sign for d, n in sizes if not proved(n == 1)}
        bound = Affine(-sign * diagonal, MappingProxyType(steps))
        if isinstance(value, Affine) and is_constant(value):
            return _chosen((bound,), shape, value.start, type(value.start)(0))
        if isinstance(value, Choice) and value.no == 0:
            return _chosen((*value.bounds, bound), shape, value.yes, value.no)
        return None

    return rule


def table(*families: tuple[str, Any]) -> Mapping[str, Any]:
    """What belongs to each name, from lines of names."""
    return MappingProxyType({name: rule for names, rule in families for name in names.split()})


_RULES = table(
    ("zeros new_zeros zeros_like", _filled(0)),
    ("ones new_ones ones_like", _filled(1)),
    ("full new_full full_like", _filled("fill_value")),
    ("scalar_tensor", _filled("s")),
    ("arange", _arange),
    ("view reshape _unsafe_view unsqueeze squeeze flatten alias detach clone", _same_order),
    ("contiguous lift_fresh_copy _to_copy to type_as", _same_order),
    ("expand", _expanded),
    ("permute transpose t", _permuted),
    ("slice", _sliced),
    ("select", _selected),
    ("index", _indexed),
    ("add", _added(1)),
    ("sub rsub", _added(-1)),
    ("mul", _multiplied),
    ("neg", _negated),
    *((name, _compared(name)) for name in ("eq", "ne", "le", "lt", "ge", "gt")),
    ("__and__ bitwise_and logical_and", _both),
    ("__or__ bitwise_or logical_or", _either),
    ("where", _where),
    ("diff", _difference),
    ("cumsum", _cumulated),
    ("tril", _triangle(1)),
    ("triu", _triangle(-1)),
)
_POINTWISE = frozenset({"where", "__and__", "__or__", "__xor__", "masked_fill", "rsub"})


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of a result follows from the ones at its place, broadcast."""
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return torch.Tag.pointwise in node.target.tags or name_of(node) in _POINTWISE
