"""Bytes that CPU kernels take for themselves while they run, beyond inputs and results.

A kernel that reads its operand row by row copies a strided one first; operands of different dtypes
are converted; blocked attention keeps one block of scores per thread. Each formula was found by
running the operation under the profiler (``torch.profiler``, ``profile_memory=True``) and reading
the kernel in torch 2.13 (ATen/native/cpu, ATen/native/mkl); tests/graph/test_workspace.py compares
them to the byte. What oneDNN takes for bfloat16 products and convolutions depends on the processor
and is not here, except for float32 convolutions.

Operations without a formula take nothing, or what they take depends on values.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Formula = Callable[[tuple[Any, ...], Mapping[str, Any], Any], int]
_Rule = Callable[[tuple[Any, ...], Any], int]  # all arguments in schema order, result


def workspace_formula(func: Any) -> Formula | None:
    """How to compute what the overload ``func`` takes for itself; None for nothing, ever."""
    if func.namespace != "aten":
        return None
    name = func._schema.name.removeprefix("aten::")
    rule = RULES.get(name)
    if rule is None and (torch.Tag.pointwise in func.tags or "floor_divide" in func.name()):
        rule = _pointwise(func)
    if rule is None:
        return None
    names = [argument.name for argument in func._schema.arguments]
    defaults = [argument.default_value for argument in func._schema.arguments]

    def formula(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
        if not _on_cpu(out):
            return 0
        if len(args) < len(names):
            rest = zip(names[len(args) :], defaults[len(args) :], strict=True)
            args = (*args, *(kwargs.get(name, default) for name, default in rest))
        return rule(args, out)

    return formula


def workspace_bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that ``func(*args, **kwargs)`` holds at its worst moment beyond inputs and results.

    Args:
        func: an ``OpOverload`` such as ``torch.ops.aten.mm.default``.
        out: its result; tensors may be fake. 0 for results on other devices than the CPU.
    """
    formula = workspace_formula(func)
    return formula(args, kwargs, out) if formula is not None else 0


def _on_cpu(out: Any) -> bool:
    first = out
    if not isinstance(out, Tensor):
        first = next((x for x in out or () if isinstance(x, Tensor)), None)
        if first is None:
            return False
    device = getattr(first, "fake_device", None)  # a fake tensor's own .device is slow
    return bool((device or first.device).type == "cpu")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor) -> int:
    """Of ``tensor.contiguous()``."""
    return 0 if tensor.is_contiguous() else _bytes(tensor) + _transposing(tensor)


def _transposing(x: Tensor) -> int:
    """Of making a transposed matrix contiguous: a tile of 60 x 60 (Copy.cpp, copy_transpose_valid).

    The tile is gone before anything else is taken, so it counts where only a copy is made.
    """
    transposed = x.dim() == 2 and x.stride(0) == 1 and x.stride(1) == x.shape[0]
    return 3600 * x.element_size() if transposed and x.numel() >= 3600 else 0


def _clone(x: Tensor, memory_format: torch.memory_format | None) -> int:
    return _transposing(x) if memory_format == torch.contiguous_format else 0


def _dense(x: Tensor) -> bool:
    """Whether an image or volume lies in memory as kernels want it: channels first or last."""
    return x.is_contiguous() or _channels_last(x)


def _channels_last(x: Tensor) -> bool:
    if x.dim() not in {4, 5} or x.shape[1] == 1:
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=last)


def _reduced(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


# ------------------------------------------------------------------- element by element: conversion

_WRITTEN = ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod")
_WRAPS_SCALARS = frozenset(
    (*_WRITTEN, *(f"{name}_" for name in _WRITTEN), "rsub", "floor_divide", "bitwise_and")
)
_CONVERTS_NOTHING = frozenset(
    ("_to_copy", "copy", "fill", "fill_", "zero_", "masked_fill_", "bernoulli", "bernoulli_")
)


def _pointwise(func: Any) -> _Rule | None:
    """Operands are converted to the common dtype whole; a number first becomes a 0-dim tensor."""
    name = func._schema.name.removeprefix("aten::")
    if name in _CONVERTS_NOTHING:
        return None
    arguments = list(enumerate(func._schema.arguments))
    tensors = [
        i
        for i, a in arguments
        if str(a.type) in {"Tensor", "Optional[Tensor]"} and a.name not in {"out", "condition"}
    ]
    numbers = [i for i, a in arguments if str(a.type) == "number" and a.name != "alpha"]
    by_number = func._schema.overload_name == "Scalar" and name not in {"lerp", "lerp_"}
    wraps = name in _WRAPS_SCALARS or by_number
    writes = any(a.is_write for _, a in arguments)

    def rule(args: tuple[Any, ...], out: Any) -> int:
        if not isinstance(out, Tensor):
            return 0
        operands = [args[i] for i in tensors if args[i] is not None]
        scalars = [args[i] for i in numbers if args[i] is not None] if numbers else []
        dtype = operands[0].dtype if isinstance(operands[0], Tensor) else None
        alike = all(isinstance(x, Tensor) and x.dtype == dtype for x in operands)
        if alike and not scalars and dtype == out.dtype:
            return 0
        common = _common_dtype([*operands, *scalars])
        if out.dtype.is_floating_point and not (common.is_floating_point or common.is_complex):
            common = out.dtype
        converted = [*operands, *scalars] if wraps else operands
        taken = sum(_converted(operand, common) for operand in converted)
        if writes and out.dtype != common:
            taken += out.numel() * common.itemsize
        return taken

    return rule


def _isinf(x: Tensor) -> int:
    """|x| == inf."""
    if not x.dtype.is_floating_point:
        return 0
    return _bytes(x) + _converted(math.inf, x.dtype)


def _common_dtype(operands: list[Any]) -> torch.dtype:
    """As ``torch.result_type``, of any number: tensors with dims before 0-dim before numbers."""
    tensors = [x for x in operands if isinstance(x, Tensor)]
    groups = (
        [x.dtype for x in tensors if x.dim()],
        [x.dtype for x in tensors if not x.dim()],
        [_number_dtype(x) for x in operands if not isinstance(x, Tensor)],
    )
    common: torch.dtype | None = None
    for group in groups:
        promoted = _promote_all(group)
        if promoted is not None and (common is None or _category(promoted) > _category(common)):
            common = promoted
    assert common is not None
    return common


def _promote_all(dtypes: list[torch.dtype]) -> torch.dtype | None:
    if not dtypes:
        return None
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


def _category(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return 3
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _number_dtype(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, complex):
        return torch.complex64
    return torch.get_default_dtype() if isinstance(number, float) else torch.int64


def _converted(operand: Any, common: torch.dtype) -> int:
    if isinstance(operand, Tensor):
        return 0 if operand.dtype == common else operand.numel() * common.itemsize
    own = {bool: torch.bool, int: torch.int64, complex: torch.complex128}
    dtype = own.get(type(operand), torch.float64)
    return dtype.itemsize + (common.itemsize if dtype != common else 0)


# --------------------------------------------------------------------------------- matrix products


def _blas(matrix: Tensor) -> bool:
    """Whether BLAS can read the last two dims as they lie: one has stride 1, the other steps on."""
    rows, columns = matrix.shape[-2:]
    by_row, by_column = matrix.stride()[-2:]
    return (by_row == 1 and by_column >= max(1, rows)) or (
        by_column == 1 and by_row >= max(1, columns)
    )


def _operands(*matrices: Tensor) -> int:
    return sum(0 if _blas(matrix) else _bytes(matrix) for matrix in matrices)


def _result(out: Tensor) -> int:
    rows, columns = out.shape
    by_row, by_column = out.stride()
    fits = (by_row == 1 and (columns == 1 or by_column >= max(1, rows))) or (
        by_column == 1 and (rows == 1 or by_row >= max(1, columns))
    )
    return 0 if fits else _bytes(out)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> int:
    if 0 in (*a.shape, *b.shape):
        return 0
    return _operands(a, b) + _result(out)


def _mv(a: Tensor) -> int:
    return _operands(a)


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> int:
    """One product per item where MKL's batched product cannot read an operand; tiny ones by hand.

    ``bmm_out_or_baddbmm_`` in ATen/native/LinearAlgebra.cpp.
    """
    (_, rows, inner), columns = a.shape, b.shape[-1]
    if 0 in (*a.shape, *b.shape):
        return 0
    if _reduced(out.dtype):
        return _operands(a, b)
    if inner * rows * columns < 400:
        return 0
    if _batched(a) and _batched(b) and out.is_contiguous():
        return 0
    return _mm(a[0], b[0], out[0])


def _batched(batch: Tensor) -> bool:
    _, rows, columns = batch.shape
    _, by_row, by_column = batch.stride()
    return (by_column == 1 and by_row >= columns) or (by_row == 1 and by_column >= rows)


# -------------------------------------------------------------------------------------- reductions


_GRAIN = 32768  # elements below which torch does not split a loop over threads


def _two_pass(x: Tensor, out: Tensor) -> int:
    """Of a reduction to one number: a partial result per thread (TensorIteratorReduce.cpp)."""
    threads = torch.get_num_threads()
    return threads * out.element_size() if _splits(x, out) and threads > 1 else 0


def _splits(x: Tensor, out: Tensor) -> bool:
    return out.numel() == 1 and x.numel() >= _GRAIN


def _cast_to(x: Tensor, dtype: torch.dtype | None, out: Tensor) -> int:
    """A reduction in another dtype than its operand's converts the whole operand first."""
    wanted = dtype or out.dtype
    return 0 if x.dtype == wanted else x.numel() * wanted.itemsize


def _sum(x: Tensor, dims: Any, dtype: torch.dtype | None, out: Tensor) -> int:
    taken = _cast_to(x, dtype, out)
    if not taken and _reduced(x.dtype) and _sums_inside(x, dims):
        taken = out.numel() * 4 + x.numel() * 4
    return taken + _two_pass(x, out)


def _sums_inside(x: Tensor, dims: Any) -> bool:
    """Whether two or more loops are summed over: torch then keeps the sums in float32.

    ``should_use_acc_buffer`` in ATen/native/ReduceOps.cpp; dims that lie end to end are one loop.
    """
    summed = {d % x.dim() for d in dims} if dims else range(x.dim())
    return _loops(x, summed) > 1


def _loops(x: Tensor, dims: Iterable[int]) -> int:
    """How many nested loops run over these dims when dims that lie end to end are joined."""
    steps = sorted((x.stride(d), x.shape[d]) for d in dims if x.shape[d] > 1)
    pairs = pairwise(steps)
    return min(1, len(steps)) + sum(inner[0] * inner[1] != outer[0] for inner, outer in pairs)


def _flattened(x: Tensor) -> int:
    """Of ``x.flatten()``: a view where the dims lie end to end in order."""
    steps = [(x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1]
    pairs = pairwise(steps)
    if all(outer[0] == inner[0] * inner[1] for outer, inner in pairs):
        return 0
    return _bytes(x) + _transposing(x)


def _mean(x: Tensor, dtype: torch.dtype | None, out: Tensor) -> int:
    """The sum, divided by a count that is a tensor: 8 bytes, and once more in the sum's dtype."""
    if _reduced(out.dtype):
        return out.numel() * 4 + max(
            x.numel() * 4 + _two_pass(x, out) // out.element_size() * 4, 12
        )
    return max(_cast_to(x, dtype, out) + _two_pass(x, out), 8 + out.dtype.itemsize)


def _spread(args: tuple[Any, ...], out: Tensor) -> int:
    """A variance of everything: the mean first, as a tensor."""
    x, dims = args[:2]
    whole = not isinstance(dims, list | tuple) or len(dims) in {0, x.dim()}
    if not whole or x.dtype not in {torch.float32, torch.float64}:
        return 0
    return out.element_size() + max(_mean(x, None, out), _two_pass(x, out))


def _logsumexp(x: Tensor, out: Tensor) -> int:
    maxima, item = out.numel(), out.element_size()
    wrapped = 8 + (item if out.dtype != torch.float64 else 0)
    return maxima * item + max(maxima + wrapped, x.numel() * item + _two_pass(x, out))


def _safe_softmax(x: Tensor, dim: int, out: Tensor) -> int:
    rows = out.numel() // max(1, out.shape[dim])
    wrapped = 8 + (out.element_size() if out.dtype != torch.float64 else 0)
    return max(_copy(x), out.numel() + max(wrapped, rows + out.element_size()))


# --------------------------------------------------------------------------------------- attention


def _blocks(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Lengths of the blocks of queries and keys (FlashAttentionKernel.cpp)."""
    queries, keys = q.shape[-2], k.shape[-2]
    split = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(split, queries), min(512, keys)


def _flash(q: Tensor, k: Tensor) -> int:
    """Scores, maxima and sums, and results of one block, per thread, in at least float32."""
    rows, columns = _blocks(q, k)
    item = max(4, q.element_size())
    block = rows * (columns + 2 + q.shape[-1]) * item
    if _reduced(q.dtype):
        block += rows * columns * q.element_size()
    return torch.get_num_threads() * block


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor) -> int:
    """Scores and their gradients of one block per thread, and one sum for each of its rows."""
    rows, columns = _blocks(q, k)
    item = max(4, q.element_size())
    block = 2 * rows * columns * item
    if _reduced(q.dtype):
        block += 2 * rows * columns * q.element_size()
    return torch.get_num_threads() * block + rows * item + _copy(grad)


# ----------------------------------------------------------------------------------- normalisation


def _layer_norm_backward(grad: Tensor, x: Tensor, shape: list[int], wanted: list[bool]) -> int:
    taken = sum(_bytes(tensor) for tensor in (grad, x) if not tensor.is_contiguous())
    if wanted[1] or wanted[2]:
        taken += 2 * torch.get_num_threads() * math.prod(shape) * x.element_size()
    return taken


def _group_norm(x: Tensor) -> int:
    """Channels first, nothing; last, a scale and a shift for each image and channel."""
    if x.is_contiguous() or not _channels_last(x):
        return 0
    return 2 * x.shape[0] * x.shape[1] * max(4, x.element_size())


def _batch_norm(x: Tensor, *, training: bool) -> int:
    channel = x.shape[1] * max(4, x.element_size())
    if training and not x.is_contiguous() and _channels_last(x):
        return (2 + torch.get_num_threads()) * channel
    return 2 * channel if _dense(x) else 0 if training else 3 * channel


def _batch_norm_backward(x: Tensor) -> int:
    return _bytes(x) if _dense(x) else x.shape[1] * max(4, x.element_size())


# ------------------------------------------------------------------------------------------ losses


def _loss(x: Tensor, reduction: int) -> int:
    """Of reducing a loss per element: 1 is the mean, 2 the sum."""
    scalar = x.new_empty(())
    return _mean(x, None, scalar) if reduction == 1 else _sum(x, None, None, scalar)


def _difference(args: tuple[Any, ...], out: Tensor) -> int:
    """The mean is written to the storage of the squares, which lives on as long as it does."""
    x, reduction = args[0], args[2]
    if reduction == 0:
        return 0
    return 2 * _bytes(x) + _loss(x, reduction) - out.untyped_storage().nbytes()


def _huber(args: tuple[Any, ...], out: Tensor) -> int:
    return _bytes(args[0]) + _loss(args[0], args[2]) if args[2] else 0


def _logits(args: tuple[Any, ...], out: Tensor) -> int:
    x, reduction = args[0], args[4]
    taken = 2 * _bytes(x) + _loss(x, reduction) if reduction else _bytes(x)
    if x.is_contiguous():
        return taken
    return max(taken, 3 * _bytes(x) + _transposing(x) - _bytes(out))


# ------------------------------------------------------------------------------- moving and picking


def _upsample(kept: int) -> _Rule:
    """A table of positions and weights along each dim: ``kept`` neighbours each."""

    def rule(args: tuple[Any, ...], out: Tensor) -> int:
        if kept < 4 and _channels_last(args[0]) and not args[0].is_contiguous():
            return 0
        return sum(size * kept * (8 + max(2, out.element_size())) for size in out.shape[2:])

    return rule


def _dropout(x: Tensor, p: float, train: Any) -> int:
    if train is False or not 0 < p < 1:
        return 0
    return max(_bytes(x), _converted(p, x.dtype))


def _index(x: Tensor, indices: list[Tensor | None]) -> int:
    given = (i for i in indices if i is not None)
    return sum(8 * i.numel() for i in given if i.dtype == torch.int32)


def _patches(
    x: Tensor, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> int:
    """Patches that touch neither each other nor a margin are only reordered."""
    apart = list(kernel) == list(stride) and not any(padding) and set(dilation) == {1}
    return _copy(x) + (0 if apart else _bytes(x))


def _roll(x: Tensor, dims: list[int]) -> int:
    """Dims one after another; without dims, of the flattened tensor."""
    if dims:
        return _bytes(x) if len(dims) > 1 else 0
    return 0 if x.is_contiguous() else max(_bytes(x), _transposing(x))


def _packed(x: Tensor) -> bool:
    """Whether matrices lie end to end, whatever the order in each (TriangularOpsUtils.h)."""
    expected = math.prod(x.shape[-2:])
    for size, stride in zip(x.shape[-3::-1], x.stride()[-3::-1], strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _median(args: tuple[Any, ...], out: Any) -> int:
    if len(args) == 1:
        return _bytes(args[0])
    x, dim = args[:2]
    return 0 if x.dim() == 0 or x.stride(dim) == 1 else _bytes(x)


def _float_buffer(out: Tensor) -> int:
    return out.numel() * 4 if _reduced(out.dtype) else 0


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _copies(*places: int) -> _Rule:
    """The kernel makes these arguments contiguous first, one after another."""

    def rule(args: tuple[Any, ...], out: Any) -> int:
        held = most = 0
        for x in (args[place] for place in places):
            if isinstance(x, Tensor) and not x.is_contiguous():
                held += _bytes(x)
                most = max(most, held + _transposing(x))
        return most

    return rule


def _image(args: tuple[Any, ...], out: Any) -> int:
    """The kernel makes its image contiguous first, channels first or last."""
    return 0 if _dense(args[0]) else _bytes(args[0])


# -------------------------------------------------------------------------------------- convolution


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """By the back end that torch would choose.

    Its own copy the image into columns, one for each tap; oneDNN's lay channels in blocks that one
    vector register holds.
    """
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if 0 in (*x.shape, *weight.shape):
        return 0
    copied = _image(args, out)
    backend = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    ).name
    if backend.startswith("Slow"):
        return copied + _columns(backend, args, out)
    if transposed:
        return copied + _onednn_transposed(args, out)
    if backend == "Mkldnn":
        return copied + _onednn(x, weight, bias, groups, out)
    return copied


def _columns(backend: str, args: tuple[Any, ...], out: Tensor) -> int:
    x, weight, bias, stride, padding, *_, groups = args
    taps = math.prod(weight.shape[2:])
    if backend in {"Slow2d", "Slow3d"}:
        point = taps == 1 and set(stride) == {1} and not any(padding)
        columns = 0 if point else x.shape[0] * x.shape[1] * taps * math.prod(out.shape[2:])
        return _in_columns(x, weight, columns, 1 if backend == "Slow3d" else groups, out)
    if backend == "SlowTranspose2d":
        columns = x.shape[0] * out.shape[1] * taps * math.prod(x.shape[2:])
        return _in_columns(x, weight, columns, groups, out)
    if backend == "SlowTranspose3d":
        ones = math.prod(out.shape[2:]) if bias is not None else 0
        columns = out.shape[1] // groups * taps * math.prod(x.shape[2:]) + ones
        taken = columns * x.element_size()
        last = _copy(x) if _dense(x) else 0
        first = max(_bytes(x), taken) if groups == 1 else _bytes(x) // groups + taken
        return int(last + first)
    if backend in {"SlowDilated2d", "SlowDilated3d"}:
        columns = x.shape[1] * taps * math.prod(out.shape[2:])
        return _in_columns(x, weight, columns, groups, out)
    return 0


def _in_columns(x: Tensor, weight: Tensor, columns: int, groups: int, out: Tensor) -> int:
    """``columns`` elements; groups go one by one and are joined at the end."""
    taken = columns * x.element_size()
    if groups > 1:
        return max(_bytes(out), (_bytes(x) + taken) // groups)
    if x.dim() == 5:
        return taken + (_copy(x) if _dense(x) else 0)
    return taken + (_unlike(weight) if _channels_last(x) and not x.is_contiguous() else 0)


def _unlike(weight: Tensor) -> int:
    """Of laying a weight channels last."""
    same = _channels_last(weight) or (weight.shape[1] == 1 and weight.is_contiguous())
    return 0 if same else _bytes(weight)


def _block() -> int:
    """Channels in a block: the float32 that one vector register holds."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 16)


def _padded(channels: int) -> int:
    return -(-channels // _block()) * _block()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, out: Tensor) -> int:
    item, taps, channels = x.element_size(), math.prod(weight.shape[2:]), out.shape[1]
    images = x.shape[0] * item
    result = images * _padded(channels) * math.prod(out.shape[2:])
    odd = bias is not None and channels % _block() != 0
    margin = _padded(channels) * item + 128 if odd else 0  # a padded bias, aligned
    if not x.is_contiguous() and _channels_last(x):
        return _onednn_last(weight, groups)
    if groups == 1:
        blocked = x.shape[1] >= _block()
        source = images * _padded(x.shape[1]) * math.prod(x.shape[2:]) if blocked else 0
        inner = _padded(x.shape[1]) if blocked else x.shape[1]
        packed = _padded(channels) * inner * taps * item
    elif groups == x.shape[1] == channels:
        if x.dim() == 5:
            return 2 * _bytes(out)
        source = images * _padded(channels) * math.prod(x.shape[2:])
        packed = _padded(channels) * taps * item
    else:  # a product of columns, one image (of a volume: one slice) at a time
        columns = weight.shape[1] * taps * math.prod(out.shape[2:][-2:])
        return max(columns * item * torch.get_num_threads() + 128, _bytes(out))
    return max(source + packed + margin + result - _bytes(out), result)


def _onednn_last(weight: Tensor, groups: int) -> int:
    """Image and result stay as they are; the weight is packed, and each thread has a page."""
    channels, inner, *kernel = weight.shape
    taps, threads = math.prod(kernel) * weight.element_size(), torch.get_num_threads()
    if groups == 1:
        pages = 4096 * (threads + 1) + 24 * threads
        return _unlike(weight) + pages + _padded(channels) * inner * taps
    if groups == channels:
        return _padded(channels) * taps
    return _unlike(weight) + groups * _padded(channels // groups) * _padded(inner) * taps


def _onednn_transposed(args: tuple[Any, ...], out: Tensor) -> int:
    """To the byte for many shapes, and near it for others."""
    x, weight, bias, stride, *_, groups = args
    if set(stride) != {1}:
        return 2 * _bytes(out)
    margin = 128 if bias is not None else 0
    if not x.is_contiguous() and _channels_last(x) and groups == 1:
        return _onednn_last(weight.transpose(0, 1), groups) + margin
    item = x.element_size()
    source = x.shape[0] * _padded(x.shape[1]) * math.prod(x.shape[2:]) * item
    result = x.shape[0] * _padded(out.shape[1]) * math.prod(out.shape[2:]) * item
    packed = _padded(x.shape[1]) * _padded(out.shape[1]) * math.prod(weight.shape[2:]) * item
    margin += result if bias is not None else 0
    return int(max(source + packed + margin + result - _bytes(out), result))


RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        "mm": lambda a, out: _mm(a[0], a[1], out),
        "addmm": lambda a, out: _mm(a[1], a[2], out),
        "addmm_": lambda a, out: _mm(a[1], a[2], out),
        "mv": lambda a, out: _mv(a[0]),
        "addmv": lambda a, out: _mv(a[1]),
        "bmm": lambda a, out: _bmm(a[0], a[1], out),
        "baddbmm": lambda a, out: _bmm(a[1], a[2], out),
        "baddbmm_": lambda a, out: _bmm(a[1], a[2], out),
        "sum": lambda a, out: _sum(a[0], a[1] if len(a) > 2 else None, a[-1], out),
        "mean": lambda a, out: _mean(a[0], a[-1] if isinstance(a[-1], torch.dtype) else None, out),
        "prod": lambda a, out: _cast_to(a[0], a[-1], out) + _two_pass(a[0], out),
        "amax": lambda a, out: _two_pass(a[0], out),
        "amin": lambda a, out: _two_pass(a[0], out),
        "var": _spread,
        "std": _spread,
        "cumsum": lambda a, out: _cast_to(a[0], a[2], out),
        "cumprod": lambda a, out: _cast_to(a[0], a[2], out),
        "any": lambda a, out: _cast_to(a[0], torch.bool, out) + _two_pass(a[0], out),
        "all": lambda a, out: _cast_to(a[0], torch.bool, out) + _two_pass(a[0], out),
        "max": lambda a, out: _copy(a[0]) if len(a) == 1 else 0,
        "min": lambda a, out: _copy(a[0]) if len(a) == 1 else 0,
        "argmax": lambda a, out: _flattened(a[0]) if a[1] is None else 0,
        "argmin": lambda a, out: _flattened(a[0]) if a[1] is None else 0,
        "logsumexp": lambda a, out: _logsumexp(a[0], out),
        "_softmax": _copies(0),
        "_log_softmax": _copies(0),
        "_softmax_backward_data": _copies(0, 1),
        "_log_softmax_backward_data": _copies(0, 1),
        "_safe_softmax": lambda a, out: _safe_softmax(a[0], a[1], out),
        "_scaled_dot_product_flash_attention_for_cpu": lambda a, out: _flash(a[0], a[1]),
        "_scaled_dot_product_flash_attention_for_cpu_backward": lambda a, out: _flash_backward(
            a[0], a[1], a[2]
        ),
        "native_layer_norm": lambda a, out: 0 if a[0].is_contiguous() else _bytes(a[0]),
        "native_layer_norm_backward": lambda a, out: _layer_norm_backward(a[0], a[1], a[2], a[7]),
        "native_group_norm_backward": lambda a, out: 2 * a[5] * a[6] * max(4, a[1].element_size()),
        "native_batch_norm": lambda a, out: _batch_norm(a[0], training=a[5]),
        "_native_batch_norm_legit_no_training": lambda a, out: _batch_norm(a[0], training=False),
        "native_batch_norm_backward": lambda a, out: _batch_norm_backward(a[1]),
        "native_group_norm": lambda a, out: _group_norm(a[0]),
        "index": lambda a, out: _index(a[0], a[1]),
        "index_select": lambda a, out: _copy(a[0]) if a[1] % a[0].dim() else 0,
        "gather": lambda a, out: _float_buffer(out),
        "scatter": lambda a, out: _float_buffer(out),
        "scatter_add": lambda a, out: _float_buffer(out),
        "scatter_reduce": lambda a, out: _float_buffer(out),
        "sort": lambda a, out: 8 * a[0].shape[next(d for d in a[1:] if type(d) is int)],
        "kthvalue": lambda a, out: a[0].numel() * (a[0].element_size() + 8),
        "median": _median,
        "clone": lambda a, out: _clone(a[0], a[1]),
        "copy_": lambda a, out: (
            _transposing(a[1]) if out.is_contiguous() and a[1].dtype == out.dtype else 0
        ),
        "masked_fill": lambda a, out: _transposing(a[0]) if out.is_contiguous() else 0,
        "unfold_backward": lambda a, out: 8 * a[1][a[2]],
        "gelu_backward": lambda a, out: (
            _copy(a[0]) if a[1].is_contiguous() and a[1].dtype == torch.float32 else 0
        ),
        "aminmax": lambda a, out: _copy(a[0]) if a[1] is None else 0,
        "roll": lambda a, out: _roll(a[0], a[2]),
        "tril": lambda a, out: 0 if _packed(a[0]) else _bytes(a[0]),
        "triu": lambda a, out: 0 if _packed(a[0]) else _bytes(a[0]),
        "repeat": lambda a, out: 32 * len(a[1]),
        "isinf": lambda a, out: _isinf(a[0]),
        "log_sigmoid_forward": _copies(0),
        "mse_loss": _difference,
        "smooth_l1_loss": _difference,
        "huber_loss": _huber,
        "binary_cross_entropy_with_logits": _logits,
        "im2col": lambda a, out: _patches(*a),
        "searchsorted": _copies(0, 1),
        "abs": lambda a, out: _bytes(a[0]) if a[0].is_complex() else 0,
        "native_dropout": lambda a, out: _dropout(a[0], a[1], a[2]),
        "convolution": _convolution,
        "nll_loss_forward": _copies(0, 1),
        "embedding_dense_backward": _copies(0),
        "avg_pool2d": _image,
        "max_pool2d_with_indices": _image,
        "_adaptive_avg_pool2d": _image,
        "pixel_shuffle": lambda a, out: _bytes(out),
        "channel_shuffle": _image,
        "replication_pad1d": _copies(0),
        "reflection_pad1d": _copies(0),
        "reflection_pad2d": _image,
        "replication_pad2d": _image,
        "upsample_nearest1d": _upsample(1),
        "upsample_nearest2d": _upsample(1),
        "upsample_nearest3d": _upsample(1),
        "_upsample_nearest_exact2d": _upsample(1),
        "upsample_bilinear2d": _upsample(2),
        "upsample_bicubic2d": _upsample(4),
    }
)
