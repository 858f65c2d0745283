"""Axes of an operation from labels on the dims of its tensors, and patterns that write them down.

A pattern names the dims of each tensor argument, of the outputs after the arrow::

    input(... k) weight(n k) +bias(n) -> (... n)

A lower-case letter is an axis; one that no output has is summed over. A capital is a dim that must
be whole. ``...`` stands for any number of dims, which broadcast. ``+`` marks a tensor that is added
to the result, so that the parts of a sum would add it more than once. Tensors with fewer dims than
letters are aligned to the right. Arguments that are not named, and named ones that are None, are
whole. Outputs beyond those written carry no axis: state of random numbers, statistics for training.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """A dim of one tensor cut in parts.

    Part ``[i, i + n)`` of a loop is elements ``[i * unit - before, (i + n) * unit + after)`` along
    ``dim``, as far as it goes; where the dim is ``blocks`` blocks of equal length, one after the
    other, those of every block. Only :mod:`hairpin.graph.halo` has parts that overlap.
    """

    dim: int
    unit: int = 1
    before: int = 0
    after: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Axis:
    """One dim of a computation along which an operation works position by position, or sums.

    Both units of an axis may be scaled by the same number.

    Attributes:
        inputs: index of a tensor input -> its span; inputs not named are needed whole.
        outputs: index of an output -> its span. Outputs not named have no elements or are a
            kernel's state of random numbers or statistics, which only its own backward reads.
        sums: the outputs of the parts add up to the whole outputs; ``outputs`` is then empty.
    """

    inputs: Mapping[int, Span]
    outputs: Mapping[int, Span]
    sums: bool = False


@dataclass(frozen=True)
class TensorRef:
    """Stands for a tensor among the arguments of an operation.

    Attributes:
        index: its place among the tensor inputs.
        mask: it holds booleans, which as an index select rather than name positions.
    """

    index: int
    mask: bool = False


@dataclass(frozen=True)
class Operation:
    """One call of an ATen operation as the rules see it: shapes, no values.

    Attributes:
        name: overload packet, such as ``"aten.linear"``.
        arguments: by schema name, defaults filled in, each tensor replaced by a ``TensorRef``.
        inputs: shapes of the tensor inputs, in the order of positional, then keyword arguments.
        outputs: shapes of the outputs, ``()`` for what is no tensor. A length that depends on
            data is -1.
        pointwise: torch tags the overload so.
    """

    name: str
    arguments: Mapping[str, Any]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    pointwise: bool


Rule = Callable[[Operation], tuple[Axis, ...]]


@dataclass(frozen=True)
class Multiple:
    """The label of a dim that holds ``unit`` elements for each position of ``label``."""

    label: Hashable
    unit: int


Labels = Sequence[Hashable]
"""A label for each dim of a tensor: equal labels are the same axis, None is a whole dim."""


def labelled(
    operation: Operation,
    inputs: Mapping[int, Labels],
    outputs: Mapping[int, Labels],
    *,
    sums: bool = False,
) -> tuple[Axis, ...]:
    """The axes that labels stand for: those on which all tensors agree.

    An axis is a label that every output has once, and no input twice. A dim of length 1 in an
    input is broadcast. Dims of the same label must have the same length otherwise.

    Args:
        inputs: labels of the inputs that can be cut.
        outputs: labels of the outputs; those without elements are passed over.
        sums: a label that no output has is summed over.
    """
    filled = {i: labels for i, labels in outputs.items() if prod(operation.outputs[i])}
    if not filled:
        return ()
    groups = (*inputs.values(), *filled.values())
    found = dict.fromkeys(name_of(label) for labels in groups for label in labels)
    axes = (
        _axis(
            _spans(label, inputs, operation.inputs),
            _spans(label, filled, operation.outputs),
            everywhere=len(filled),
            sums=sums,
        )
        for label in found
        if label is not None
    )
    return tuple(axis for axis in axes if axis is not None)


Counted = tuple[Span, int]


def _axis(
    sources: list[tuple[int, Counted]] | None,
    results: list[tuple[int, Counted]] | None,
    *,
    everywhere: int,
    sums: bool,
) -> Axis | None:
    """The axis of spans, each with its number of positions, or None where they disagree."""
    if sources is None or results is None or (not results and not sums):
        return None
    if results and len(results) != everywhere:
        return None
    positions = {count for _, (_, count) in results or sources} - ({1} if not results else set())
    if len(positions) != 1:
        return None
    (length,) = positions
    broadcast = [(i, span) for i, (span, count) in sources if count == 1 and span.unit == 1]
    cut = [(i, span) for i, (span, count) in sources if count == length]
    if length <= 1 or len(broadcast) + len(cut) != len(sources):
        return None
    return Axis(dict(cut), {i: span for i, (span, _) in results}, sums=not results)


def _spans(
    label: Hashable, labels: Mapping[int, Labels], shapes: Sequence[Shape]
) -> list[tuple[int, Counted]] | None:
    """Where tensors have ``label``, and at how many positions; None if one has it twice."""
    found: list[tuple[int, Counted]] = []
    for i, names in labels.items():
        dims = [d for d, name in enumerate(names) if name is not None and name_of(name) == label]
        if not dims:
            continue
        name = names[dims[0]]
        unit = name.unit if isinstance(name, Multiple) and shapes[i][dims[0]] > 1 else 1
        if len(dims) > 1 or shapes[i][dims[0]] % unit:
            return None
        found.append((i, (Span(dims[0], unit), shapes[i][dims[0]] // unit)))
    return found


def name_of(label: Hashable) -> Hashable:
    """The label itself, without the unit of a ``Multiple``."""
    return label.label if isinstance(label, Multiple) else label


def named(operation: Operation, labels: Mapping[str, Labels]) -> dict[int, Labels]:
    """Labels by argument name as labels by input; arguments that are no tensor are left out."""
    refs = {name: operation.arguments.get(name) for name in labels}
    return {ref.index: labels[name] for name, ref in refs.items() if isinstance(ref, TensorRef)}


def aligned(shape: Shape) -> Labels:
    """Labels as broadcasting matches dims: counted from the right, -1 for the last."""
    return range(-len(shape), 0)


def whole(labels: Iterable[Hashable], dims: Iterable[int]) -> list[Hashable]:
    """``labels`` with None at ``dims``."""
    kept = set(dims)
    return [None if d in kept else label for d, label in enumerate(labels)]


def as_list(value: Any) -> list[Any]:
    """A list argument, which may have been given as its only item."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def dims_of(value: Any, rank: int) -> list[int]:
    """Dims in an argument, counted from the left; none for an argument left out."""
    return [] if value is None else [d % max(rank, 1) for d in as_list(value)]


def for_outputs(operation: Operation, labels: Labels) -> dict[int, Labels]:
    """The same labels for every output; those with more dims end in whole ones."""
    return {
        i: [*labels, *[None] * (len(shape) - len(labels))]
        for i, shape in enumerate(operation.outputs)
    }


# Patterns


@dataclass(frozen=True)
class _Term:
    """The dims of one tensor in a pattern."""

    name: str
    letters: tuple[str, ...]
    added: bool

    def labels(self, rank: int) -> Labels | None:
        """Labels of a tensor with ``rank`` dims; None if it has too many."""
        letters: list[Hashable] = [None if letter.isupper() else letter for letter in self.letters]
        if "..." in letters:
            at, free = letters.index("..."), rank - len(letters) + 1
            letters[at : at + 1] = [("...", d) for d in range(-free, 0)]
        return letters[len(letters) - rank :] if rank <= len(letters) else None


_TERM = re.compile(r"(\+?)(\w*)\(([^)]*)\)")


@cache
def _parse(text: str) -> tuple[tuple[_Term, ...], tuple[_Term, ...]]:
    sides = text.split("->")
    assert len(sides) == 2, f"a pattern has one arrow: {text!r}"
    left, right = (
        tuple(
            _Term(name, tuple(letters.split()), added == "+")
            for added, name, letters in _TERM.findall(side)
        )
        for side in sides
    )
    return left, right


def pattern(text: str) -> Rule:
    """The rule that a pattern (see the module) writes down."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        left, right = _parse(text)
        present = [t for t in left if isinstance(operation.arguments.get(t.name), TensorRef)]
        inputs = {}
        for term in present:
            index = operation.arguments[term.name].index
            inputs[index] = term.labels(len(operation.inputs[index]))
        outputs = {i: term.labels(len(operation.outputs[i])) for i, term in enumerate(right)}
        sources = {i: labels for i, labels in inputs.items() if labels is not None}
        results = {i: labels for i, labels in outputs.items() if labels is not None}
        if len(sources) + len(results) != len(inputs) + len(outputs):
            return ()
        sums = not any(term.added for term in present)
        return labelled(operation, sources, results, sums=sums)

    return rule
