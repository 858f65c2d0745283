"""Rules for what computes: products, attention, reductions, norms, losses, neighbourhoods."""

from collections.abc import Hashable, Sequence

from hairpin.graph.axis_labels import (
    Axis,
    Multiple,
    Operation,
    Rule,
    Shape,
    TensorRef,
    aligned,
    as_list,
    dims_of,
    for_outputs,
    labelled,
    name_of,
    named,
    whole,
)
from hairpin.graph.axis_rules import all_but_last, pointwise

# Products


def multiplied(operation: Operation) -> tuple[Axis, ...]:
    """``matmul`` of any ranks: a tensor of one dim is a row on the left, a column on the right."""
    left, right = (len(shape) for shape in operation.inputs)
    rows: list[Hashable] = [*aligned((1,) * (left - 2)), "m", "k"][-left:] if left > 1 else ["k"]
    columns: list[Hashable] = [*aligned((1,) * (right - 2)), "k", "n"] if right > 1 else ["k"]
    batch: list[Hashable] = [*aligned((1,) * (max(left, right, 2) - 2))]
    result = [*batch, *["m"] * (left > 1), *["n"] * (right > 1)]
    return labelled(operation, {0: rows, 1: columns}, {0: result}, sums=True)


def einsum(operation: Operation) -> tuple[Axis, ...]:
    """Every letter is an axis; those that do not come out are summed over."""
    equation = operation.arguments.get("equation")
    if not isinstance(equation, str):
        return ()
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [
        _letters(term, len(shape))
        for term, shape in zip(left.split(","), operation.inputs, strict=True)
    ]
    counted = [letter for letters in terms for letter in letters]
    if arrow:
        result = _letters(right, len(operation.outputs[0]))
    else:
        dots = sorted({letter for letter in counted if isinstance(letter, int)})
        result = [
            *dots,
            *sorted(str(x) for x in counted if counted.count(x) == 1 and x not in dots),
        ]
    if len(result) != len(operation.outputs[0]):
        return ()
    return labelled(operation, dict(enumerate(terms)), {0: result}, sums=True)


def _letters(term: str, rank: int) -> list[Hashable]:
    """The letters of one operand, ``...`` as numbers from the right."""
    before, dots, after = term.partition("...")
    free = rank - len(before) - len(after) if dots else 0
    return [*before, *range(-free, 0), *after]


def attention(operation: Operation) -> tuple[Axis, ...]:
    """Scaled dot product attention: batch dims, heads and, unless causal, queries.

    Where several query heads share a head of keys, an axis has as many of them for each.
    """
    arguments = operation.arguments
    if any(arguments.get(n) for n in ("dropout_p", "return_debug_mask", "dropout_mask")):
        return ()  # dropout within the kernel is drawn for the whole
    query, key = (operation.inputs[arguments[name].index] for name in ("query", "key"))
    groups = 1
    if len(query) > 2 and len(key) > 2 and key[-3] > 1:
        groups = query[-3] // key[-3] or 1
    row = None if arguments.get("is_causal") else "q"
    batch: list[Hashable] = list(aligned(query[:-2]))
    shared = list(batch)
    if batch and groups > 1:
        batch[-1] = Multiple(-1, groups)
    rows, keys = [*batch, row, None], [*shared, None, None]
    inputs: dict[str, Sequence[Hashable]] = {"query": rows, "key": keys, "value": keys}
    for name in ("attn_mask", "attn_bias"):
        if isinstance(ref := arguments.get(name), TensorRef):
            inputs[name] = rows[len(rows) - len(operation.inputs[ref.index]) :]
    outputs = {0: rows}
    if len(operation.outputs) > 1:  # log-sum-exp, or the weights
        outputs[1] = rows[: len(operation.outputs[1])]
    return labelled(operation, named(operation, inputs), outputs)


# Reductions, norms and losses


def reduced(*, sums: bool = False) -> Rule:
    """Reduces over the dims in ``dim``, all of them if it is left out."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        rank = len(operation.inputs[0])
        dims = dims_of(operation.arguments.get("dim"), rank) or list(range(rank))
        keeps = operation.arguments.get("keepdim", False)
        left = [None if d in dims else d for d in range(rank) if keeps or d not in dims]
        if any(len(shape) != len(left) for shape in operation.outputs):
            return ()
        return labelled(operation, {0: range(rank)}, for_outputs(operation, left), sums=sums)

    return rule


def similarity(operation: Operation) -> tuple[Axis, ...]:
    """``cosine_similarity``: two tensors broadcast, then reduced over ``dim``."""
    labels = list(aligned((1,) * max(map(len, operation.inputs))))
    (dim,) = dims_of(operation.arguments["dim"], len(labels))
    inputs = {
        i: whole(labels, [dim])[len(labels) - len(shape) :]
        for i, shape in enumerate(operation.inputs)
    }
    del labels[dim]
    return labelled(operation, inputs, {0: labels})


def extremes(operation: Operation) -> tuple[Axis, ...]:
    """``max``, ``min``: of two tensors, or over dims of one."""
    return pointwise(operation) if operation.pointwise else reduced()(operation)


def layer_norm(operation: Operation) -> tuple[Axis, ...]:
    """Normalises over the last dims, as many as ``normalized_shape`` has."""
    return all_but_last(len(as_list(operation.arguments["normalized_shape"])))(operation)


def batch_norm(operation: Operation) -> tuple[Axis, ...]:
    """With given statistics every element by itself; in training nothing."""
    arguments = operation.arguments
    if arguments.get("training", arguments.get("train", False)):
        return ()
    channel = ["c"]
    labels = ["n", *channel, *map(str, range(len(operation.outputs[0]) - 2))]
    names = ("weight", "bias", "running_mean", "running_var")
    inputs = named(operation, {"input": labels, **dict.fromkeys(names, channel)})
    return labelled(operation, inputs, {0: labels})


def instance_norm(operation: Operation) -> tuple[Axis, ...]:
    """Normalises each channel of each sample; running statistics would be written."""
    arguments = operation.arguments
    if arguments.get("use_input_stats") and arguments.get("running_mean") is not None:
        return ()
    names = ("weight", "bias", "running_mean", "running_var")
    labels, channel = ["n", "c"], ["c"]
    inputs = named(operation, {"input": labels, **dict.fromkeys(names, channel)})
    return labelled(operation, inputs, for_outputs(operation, labels))


def elementwise_loss(operation: Operation) -> tuple[Axis, ...]:
    """A loss of each element, not reduced or added up."""
    labels = {i: aligned(shape) for i, shape in enumerate(operation.inputs)}
    reduction = operation.arguments["reduction"]
    if reduction == _NO_REDUCTION:
        return pointwise(operation)
    return labelled(operation, labels, {0: ()}, sums=reduction == _SUM)


_NO_REDUCTION, _SUM = 0, 2


def class_loss(operation: Operation) -> tuple[Axis, ...]:
    """A loss of each sample over the classes in dim 1, not reduced or added up."""
    scores, target = (
        operation.inputs[operation.arguments[name].index] for name in ("self", "target")
    )
    labels: list[Hashable] = [d if d != 1 else None for d in range(len(scores))]
    if len(scores) == 1:
        return ()
    rest = [label for label in labels if label is not None]
    targets = labels if len(target) == len(scores) else rest
    inputs = named(operation, {"self": labels, "target": targets})
    reduction = operation.arguments["reduction"]
    result = rest if reduction == _NO_REDUCTION else []
    return labelled(operation, inputs, {0: result}, sums=reduction == _SUM)


def prelu(operation: Operation) -> tuple[Axis, ...]:
    """One slope, or one for each channel in dim 1."""
    rank = len(operation.inputs[0])
    labels = named(operation, {"self": range(rank), "weight": [1] if rank > 1 else [None]})
    return labelled(operation, labels, {0: range(rank)})


# Neighbourhoods


def convolution(operation: Operation) -> tuple[Axis, ...]:
    """Batch and, without groups, channels; space where windows do not overlap."""
    arguments = operation.arguments
    weight = operation.inputs[arguments["weight"].index]
    transposed = arguments.get("transposed", "output_padding" in arguments)
    plain = arguments["groups"] == 1
    channels: list[Hashable] = ["i", "o"] if transposed else ["o", "i"]
    space: list[Hashable] = [None] * (len(weight) - 2)
    if not transposed:
        space = _windows(operation, weight[2:])
    source = ["n", "i" if plain else None, *space]
    result = ["n", "o" if plain else None, *[name_of(label) for label in space]]
    start = len(source) - len(operation.inputs[arguments["input"].index])  # 1 without a batch
    inputs = named(
        operation,
        {
            "input": source[start:],
            "weight": [*(channels if plain else [None, None]), *[None] * len(space)],
            "bias": ["o" if plain else None],
        },
    )
    biased = isinstance(arguments.get("bias"), TensorRef)
    return labelled(operation, inputs, {0: result[start:]}, sums=plain and not biased)


def _windows(operation: Operation, kernel: Shape) -> list[Hashable]:
    """Labels of the spatial dims on which windows stand side by side and cover the whole."""
    count = len(kernel)
    values = []
    for name in ("stride", "padding", "dilation"):
        value = operation.arguments[name]
        if isinstance(value, str):  # "same" pads nothing around a kernel of 1
            value = [0 if value == "valid" or k == 1 else None for k in kernel]
        listed = as_list(value)
        values.append(listed * count if len(listed) == 1 else listed)
    return [
        Multiple(("s", d), kernel[d])
        if (stride, padding) == (kernel[d], 0) and (dilation == 1 or kernel[d] == 1)
        else None
        for d, (stride, padding, dilation) in enumerate(zip(*values, strict=True))
    ]


def shuffled(*, up: bool) -> Rule:
    """``pixel_shuffle`` and back: channels become blocks of pixels."""

    def rule(operation: Operation) -> tuple[Axis, ...]:
        rank = len(operation.inputs[0])
        factor = operation.arguments["upscale_factor" if up else "downscale_factor"]
        fine = [*range(rank - 3), None, Multiple("h", factor), Multiple("w", factor)]
        coarse = [*range(rank - 3), None, "h", "w"]
        before, after = (coarse, fine) if up else (fine, coarse)
        return labelled(operation, {0: before}, {0: after})

    return rule
