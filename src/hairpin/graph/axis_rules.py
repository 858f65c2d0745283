"""Rules for what moves data: elements by themselves, views, joining, looking up, writing."""

from collections.abc import Hashable
from math import lcm, prod

from hairpin.graph.axis_labels import (
    Axis,
    Labels,
    Multiple,
    Operation,
    Rule,
    Shape,
    Span,
    TensorRef,
    aligned,
    as_list,
    dims_of,
    for_outputs,
    labelled,
    named,
    whole,
)

# Position by position


def pointwise(operation: Operation) -> tuple[Axis, ...]:
    """Each element by itself, all inputs broadcast."""
    (shape, *others) = operation.outputs or ((),)
    if any(other != shape for other in others):
        return ()
    for source in operation.inputs:
        ends = shape[max(len(shape) - len(source), 0) :]
        if len(source) > len(shape) or any(
            n not in {1, m} for n, m in zip(source, ends, strict=True)
        ):
            return ()
    inputs = {i: aligned(source) for i, source in enumerate(operation.inputs)}
    return labelled(operation, inputs, dict.fromkeys(range(1 + len(others)), aligned(shape)))


def made(operation: Operation) -> tuple[Axis, ...]:
    """Constants: the same at every position, whatever the inputs."""
    return labelled(operation, {}, {0: aligned(operation.outputs[0])})


def selected(operation: Operation) -> tuple[Axis, ...]:
    """``where``; with a condition alone it looks for positions."""
    return pointwise(operation) if "other" in operation.arguments else ()


def along(*names: str) -> Rule:
    """Computes along the dims in the arguments ``names``, and treats all others alike."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        rank = len(operation.inputs[0])
        dims = [d for n in names for d in dims_of(operation.arguments.get(n), rank)]
        labels = whole(range(rank), dims)
        if not dims or any(len(shape) != rank for shape in operation.outputs):
            return ()
        # A tensor joined to the first (as diff does) lies along the same dims.
        inputs = {i: labels for i, shape in enumerate(operation.inputs) if len(shape) == rank}
        return labelled(operation, inputs, for_outputs(operation, labels))

    return rule


def all_but_last(count: int) -> Rule:
    """Computes along the last ``count`` dims of its first input, and treats others alike."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        labels = range(len(operation.inputs[0]) - count)
        return labelled(operation, {0: labels}, for_outputs(operation, labels))

    return rule


def first(count: int) -> Rule:
    """Computes along all dims of its first input but the first ``count``."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        labels = range(min(count, len(operation.inputs[0])))
        return labelled(operation, {0: labels}, for_outputs(operation, labels))

    return rule


# Views


def reshaped(operation: Operation) -> tuple[Axis, ...]:
    """The same elements in the same order, under other dims.

    Dims that together hold the same elements before and after form a group; the slowest of a group
    can be cut wherever the cut falls between positions on both sides. Where dims become one, or one
    becomes several, each of them can be cut; its parts then lie in the one dim in blocks.
    """
    before, after = operation.inputs[0], operation.outputs[0]
    if prod(before) < 1 or min(before + after, default=1) < 1 or prod(before) != prod(after):
        return ()
    axes = []
    for group in _groups(before, after):
        for source, result in _cuts(*group):
            # The other tensor of view_as gives the shape.
            spans = {0: source, 1: result} if len(operation.inputs) > 1 else {0: source}
            axes.append(Axis(spans, {0: result}))
    return tuple(axes)


Dims = list[tuple[int, int]]
"""Dims with their lengths, the slowest first."""


def _groups(before: Shape, after: Shape) -> list[tuple[Dims, Dims]]:
    """Smallest groups of dims that hold the same elements; dims of length 1 are in none."""
    left = [(d, n) for d, n in enumerate(before) if n > 1]
    right = [(d, n) for d, n in enumerate(after) if n > 1]
    groups = []
    while left:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while (n := _size(ours)) != (m := _size(theirs)):
            if n < m:
                ours.append(left.pop(0))
            else:
                theirs.append(right.pop(0))
        groups.append((ours, theirs))
    return groups


def _cuts(ours: Dims, theirs: Dims) -> list[tuple[Span, Span]]:
    """The spans before and after along which a group can be cut."""
    size, (i, n), (j, m) = _size(ours), ours[0], theirs[0]
    step = lcm(size // n, size // m)
    cuts = [(Span(i, step * n // size), Span(j, step * m // size))] if size > step else []
    if len(theirs) == 1:
        cuts += [(Span(d), span) for d, span in _inner(ours, j)]
    elif len(ours) == 1:
        cuts += [(span, Span(d)) for d, span in _inner(theirs, i)]
    return cuts


def _inner(dims: Dims, merged: int) -> list[tuple[int, Span]]:
    """All dims but the slowest, and where their parts lie in the dim ``merged`` of them all."""
    return [
        (d, Span(merged, _size(dims[at + 1 :]), blocks=_size(dims[:at])))
        for at, (d, _) in enumerate(dims)
        if at > 0
    ]


def _size(dims: Dims) -> int:
    return prod(length for _, length in dims)


def squeezed(operation: Operation) -> tuple[Axis, ...]:
    """Dims of length 1 taken away: a part of length 1 must not lose what the whole keeps."""
    if "dim" not in operation.arguments:
        return ()
    dims = dims_of(operation.arguments["dim"], len(operation.inputs[0]))
    return tuple(axis for axis in reshaped(operation) if axis.inputs[0].dim not in dims)


def permuted(operation: Operation) -> tuple[Axis, ...]:
    """Dims in another order: ``permute``, ``transpose``, ``movedim``, ``t`` and their like."""
    rank = len(operation.inputs[0])
    order = list(range(rank))
    names = next((pair for pair in _PAIRS if pair[0] in operation.arguments), None)
    if "dims" in operation.arguments:
        order = dims_of(operation.arguments["dims"], rank)
    elif names is None:
        order = [*order[:-2], *reversed(order[-2:])]
        if operation.name == "aten.numpy_T":
            order = list(reversed(range(rank)))
    elif rank:
        source, target = (dims_of(operation.arguments[name], rank) for name in names)
        if names[0] == "source":
            rest = iter(d for d in order if d not in source)
            order = [source[target.index(d)] if d in target else next(rest) for d in order]
        else:
            order[source[0]], order[target[0]] = target[0], source[0]
    return labelled(operation, {0: range(rank)}, {0: order})


_PAIRS = (("dim0", "dim1"), ("axis0", "axis1"), ("source", "destination"))


def expanded(operation: Operation) -> tuple[Axis, ...]:
    """Dims of length 1 repeated, and new ones in front."""
    return labelled(
        operation,
        {0: aligned(operation.inputs[0])},
        {0: aligned(operation.outputs[0])},
    )


def sliced(operation: Operation) -> tuple[Axis, ...]:
    """A range of positions along ``dim``; all of them keep it."""
    (before, *_), after = operation.inputs, operation.outputs[0]
    (dim,) = dims_of(operation.arguments["dim"], len(before))
    # The length of narrow is a number of its own, which would have to change with the part.
    kept = operation.name == "aten.slice" and before[dim] == after[dim]
    labels = range(len(before)) if kept else whole(range(len(before)), [dim])
    return labelled(operation, {0: labels}, {0: labels})


def picked(operation: Operation) -> tuple[Axis, ...]:
    """``select``, ``unbind``: ``dim`` goes away, in one output or in one for each position."""
    rank = len(operation.inputs[0])
    labels = list(range(rank))
    (dim,) = dims_of(operation.arguments["dim"], rank)
    del labels[dim]
    return labelled(operation, {0: whole(range(rank), [dim])}, for_outputs(operation, labels))


def diagonal(operation: Operation) -> tuple[Axis, ...]:
    """Two dims become one, the last."""
    rank = len(operation.inputs[0])
    dims = [d for n in ("dim1", "dim2") for d in dims_of(operation.arguments[n], rank)]
    rest = [d for d in range(rank) if d not in dims]
    return labelled(operation, {0: whole(range(rank), dims)}, {0: [*rest, None]})


def unfolded(operation: Operation) -> tuple[Axis, ...]:
    """Windows along ``dimension``, each in a new last dim."""
    rank = len(operation.inputs[0])
    (dim,) = dims_of(operation.arguments["dimension"], rank)
    size, step = operation.arguments["size"], operation.arguments["step"]
    labels: list[Hashable] = whole(range(rank), [dim])
    source = list(labels)
    if size == step:  # side by side
        labels[dim], source[dim] = dim, Multiple(dim, size)
    return labelled(operation, {0: source}, {0: [*labels, None]})


# Joining and repeating


def joined(operation: Operation) -> tuple[Axis, ...]:
    """``cat``: all dims but ``dim`` are shared."""
    rank = len(operation.outputs[0])
    labels = whole(range(rank), dims_of(operation.arguments["dim"], rank))
    # Old code concatenates to a tensor without elements, of one dim.
    inputs = {i: labels for i, shape in enumerate(operation.inputs) if len(shape) == rank}
    return labelled(operation, inputs, {0: labels})


def stacked(operation: Operation) -> tuple[Axis, ...]:
    """``stack``: a new dim counts the tensors."""
    rank = len(operation.outputs[0])
    (dim,) = dims_of(operation.arguments["dim"], rank)
    labels = [d for d in range(rank) if d != dim]
    inputs = dict.fromkeys(range(len(operation.inputs)), labels)
    return labelled(operation, inputs, {0: whole(range(rank), [dim])})


def meshed(operation: Operation) -> tuple[Axis, ...]:
    """``meshgrid``: each input is a dim of every output."""
    rank = len(operation.outputs)
    order = list(range(rank))
    if operation.arguments.get("indexing") == "xy":
        order[:2] = reversed(order[:2])
    inputs = {i: [order[i]] for i, shape in enumerate(operation.inputs) if shape}
    return labelled(operation, inputs, dict.fromkeys(range(rank), range(rank)))


def repeated(operation: Operation) -> tuple[Axis, ...]:
    """``repeat``, ``tile``: dims repeated once."""
    before, after = operation.inputs[0], operation.outputs[0]
    start = len(after) - len(before)
    kept = [d if d >= start and before[d - start] == after[d] else None for d in range(len(after))]
    return labelled(operation, {0: kept[start:]}, {0: kept})


def interleaved(operation: Operation) -> tuple[Axis, ...]:
    """``repeat_interleave`` by a number: each position along ``dim`` repeated in place."""
    repeats, dim = operation.arguments["repeats"], operation.arguments.get("dim")
    if not isinstance(repeats, int) or dim is None or repeats < 1:
        return ()
    labels: list[Hashable] = list(range(len(operation.inputs[0])))
    (at,) = dims_of(dim, len(labels))
    if operation.arguments.get("output_size") is not None:
        labels[at] = None  # a number of its own, which would have to change with the part
    return labelled(
        operation,
        {0: labels},
        {0: [Multiple(d, repeats) if d == at else d for d in labels]},
    )


def padded(operation: Operation) -> tuple[Axis, ...]:
    """Dims that are not padded."""
    pad = operation.arguments.get("pad", operation.arguments.get("padding"))
    rank = len(operation.inputs[0])
    dims = [rank - 1 - i // 2 for i, amount in enumerate(pad or []) if amount]
    labels = whole(range(rank), dims)
    return labelled(operation, {0: labels}, {0: labels})


# Looking up and writing


def gathered(operation: Operation) -> tuple[Axis, ...]:
    """Each place of ``index`` looks along the whole of ``dim`` of ``self``."""
    refs = operation.arguments["self"], operation.arguments["index"]
    source, index = (operation.inputs[ref.index] for ref in refs)
    rank = len(index)
    dims = dims_of(operation.arguments["dim"], rank)
    shared = [d for d in range(rank) if d not in dims and source[d] == index[d]]
    labels = [d if d in (*shared, *dims) else None for d in range(rank)]
    inputs: dict[int, Labels] = {refs[0].index: whole(labels, dims), refs[1].index: labels}
    return labelled(operation, inputs, {0: labels})


def written(*names: str) -> Rule:
    """Writes or adds tensors ``names`` into ``self`` at places along ``dim``."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        shape = operation.outputs[0]
        dims = dims_of(operation.arguments["dim"], len(shape))
        refs = [operation.arguments.get(name) for name in ("self", *names)]
        tensors = [ref.index for ref in refs if isinstance(ref, TensorRef)]
        # Lengths may differ: an index covers the first positions, which are no part of each part.
        labels = [
            None if d in dims or any(operation.inputs[i][d] != shape[d] for i in tensors) else d
            for d in range(len(shape))
        ]
        return labelled(operation, dict.fromkeys(tensors, labels), {0: labels})

    return rule


def written_at(operation: Operation) -> tuple[Axis, ...]:
    """``select_scatter``: ``src`` lacks the dim it is written along."""
    rank = len(operation.outputs[0])
    dims = dims_of(operation.arguments["dim"], rank)
    labels = whole(range(rank), dims)
    rest = [d for d in range(rank) if d not in dims]
    return labelled(operation, named(operation, {"self": labels, "src": rest}), {0: labels})


def taken(operation: Operation) -> tuple[Axis, ...]:
    """``index_select``: ``index`` names positions along ``dim``."""
    rank = len(operation.outputs[0])
    dims = dims_of(operation.arguments["dim"], rank)
    inputs = named(operation, {"self": whole(range(rank), dims), "index": dims})
    return labelled(operation, inputs, {0: range(rank)})


def indexed(operation: Operation) -> tuple[Axis, ...]:
    """``x[:, i, j]`` with tensors of positions, which broadcast; their dims come out together."""
    found = _index_labels(operation)
    if found is None or len(found[2]) != len(operation.outputs[0]):
        return ()
    source, indices, result = found
    return labelled(operation, {0: source, **indices}, {0: result})


def index_put(operation: Operation) -> tuple[Axis, ...]:
    """``x[:, i, j] = values``: the dims that no index touches."""
    found = _index_labels(operation)
    values = operation.inputs[operation.arguments["values"].index]
    if found is None or len(found[2]) < len(values):
        return ()
    source, indices, result = found
    places = {label for labels in indices.values() for label in labels}
    kept = [None if label in places else label for label in result[len(result) - len(values) :]]
    inputs = {"self": source, "values": kept}
    return labelled(operation, named(operation, inputs), {0: source})


def _index_labels(
    operation: Operation,
) -> tuple[Labels, dict[int, Labels], Labels] | None:
    """Labels of an indexed tensor, of its indices and of what they select.

    A mask stands for as many dims as it has; which of their positions it selects, only its values
    tell, so nothing is known of the dim of places that comes out.
    """
    refs = as_list(operation.arguments["indices"])
    rank = len(operation.inputs[0])
    tensors = [ref for ref in refs if ref is not None]
    at: list[int] = []
    dim = 0
    for ref in refs:
        count = len(operation.inputs[ref.index]) if ref is not None and ref.mask else 1
        at += range(dim, dim + count) if ref is not None else ()
        dim += count
    if not at:
        return None
    masked = any(ref.mask for ref in tensors)
    shapes = [(1,) if ref.mask else operation.inputs[ref.index] for ref in tensors]
    places: Labels = aligned(max(shapes, key=len))
    indices: dict[int, Labels] = {
        ref.index: [None] * len(operation.inputs[ref.index]) if masked else aligned(shape)
        for ref, shape in zip(tensors, shapes, strict=True)
    }
    rest: list[Hashable] = [d for d in range(rank) if d not in at]
    # They come where the first stood if they stand side by side, otherwise in front.
    place = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    come: Labels = [None] * len(places) if masked else places
    return whole(range(rank), at), indices, [*rest[:place], *come, *rest[place:]]
