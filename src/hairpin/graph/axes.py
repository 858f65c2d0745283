"""What each ATen operation does to each dim: the table that loops and splits rely on.

``axes`` gives, for one call, the dims along which its result can be computed part by part: cut the
named inputs, run the operation on each part, put the outputs side by side or add them up. An
operation without a rule has no axes, which is always right: it is then needed whole.

Calls that take a length as a number must be given the length of the part: the sizes of ``view``,
``reshape``, ``_unsafe_view``, ``unflatten``, ``expand``, ``broadcast_to``, ``full`` and its like,
and the N of ``native_group_norm``. No axis changes any other argument.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import OpOverload

from hairpin.graph import axis_math as math
from hairpin.graph import axis_rules as moves
from hairpin.graph.axis_labels import Axis, Operation, Rule, Shape, Span, TensorRef, pattern

__all__ = [
    "Axis",
    "Operation",
    "Shape",
    "Span",
    "TensorRef",
    "axes",
    "composite",
    "has_rule",
    "operation",
    "reads_nothing",
]


def axes(operation: Operation, *, in_blocks: bool = False) -> tuple[Axis, ...]:
    """The axes of one call; none where the operation is unknown or needs everything whole.

    Args:
        operation: the call.
        in_blocks: also the axes whose parts do not lie in one piece, as those of t in a dim
            ``(b t)``. No loop can cut these, but a rank of a split may hold such a part.
    """
    rule = _rule(operation.name)
    if rule is None and operation.pointwise and not _is_excluded(operation.name):
        rule = moves.pointwise
    found = rule(operation) if rule is not None else ()
    return found if in_blocks else tuple(axis for axis in found if not _lies_in_blocks(axis))


def _lies_in_blocks(axis: Axis) -> bool:
    return any(span.blocks > 1 for side in (axis.inputs, axis.outputs) for span in side.values())


def reads_nothing(name: str) -> bool:
    """Whether ``name`` makes a constant: its tensor inputs, if any, give a dtype alone."""
    return _rule(name) is moves.made


def has_rule(name: str) -> bool:
    """Whether there is a rule for ``name``, such as ``"aten.linear"``, or torch's tag serves."""
    if _rule(name) is not None:
        return True
    space, _, base = name.rpartition(".")
    packet = getattr(getattr(torch.ops, space or "aten"), base, None)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet else []
    tagged = any(torch.Tag.pointwise in overload.tags for overload in overloads)
    return tagged and not _is_excluded(name)


def operation(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any
) -> Operation:
    """A call as the rules see it.

    Args:
        func: the overload called.
        args: its positional arguments, tensors real or fake, symbolic lengths with their hints.
        kwargs: its keyword arguments.
        outputs: what it returned: a tensor, or a sequence of tensors and others.
    """
    inputs: list[Shape] = []
    given = [_concrete(value, inputs) for value in args]
    by_name = {name: _concrete(value, inputs) for name, value in kwargs.items()}
    arguments = {}
    for place, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        arguments[argument.name] = (
            given[place] if place < len(given) else by_name.get(argument.name, default)
        )
    return Operation(
        name=str(func.overloadpacket),
        arguments=MappingProxyType(arguments),
        inputs=tuple(inputs),
        outputs=_results(outputs),
        pointwise=torch.Tag.pointwise in func.tags,
    )


def composite(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Operation:
    """A call of a function that torch takes apart, as the rules see it.

    Args:
        name: ATen's name for it, such as ``"aten.einsum"``.
        args: its positional arguments; where the rules know no name, they go by their places.
        kwargs: its keyword arguments.
        outputs: what it returned.
    """
    inputs: list[Shape] = []
    names = _NAMES.get(name, ())
    given = {names[at] if at < len(names) else str(at): value for at, value in enumerate(args)}
    arguments = {key: _concrete(value, inputs) for key, value in {**given, **kwargs}.items()}
    return Operation(
        name, MappingProxyType(arguments), tuple(inputs), _results(outputs), pointwise=False
    )


_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"aten.linear": ("input", "weight", "bias"), "aten.einsum": ("equation",)}
)


def _results(outputs: Any) -> tuple[Shape, ...]:
    listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return tuple(_shape(value) if isinstance(value, Tensor) else () for value in listed)


def _concrete(value: Any, inputs: list[Shape]) -> Any:
    """``value`` with numbers for symbols and references for tensors, added to ``inputs``."""
    if isinstance(value, Tensor):
        inputs.append(_shape(value))
        return TensorRef(len(inputs) - 1, mask=value.dtype in {torch.bool, torch.uint8})
    if isinstance(value, (list, tuple)):
        return [_concrete(item, inputs) for item in value]
    return _hint(value)


def _shape(tensor: Tensor) -> Shape:
    return tuple(int(_hint(length)) for length in tensor.shape)


def _hint(value: Any) -> Any:
    """The number a symbol had when it was traced, -1 for one that depends on data."""
    if isinstance(value, (SymInt, SymFloat, SymBool)):
        return value.node.hint if value.node.has_hint() else -1
    return value


def _is_excluded(name: str) -> bool:
    """Tagged pointwise, but drawing random numbers or writing into its input."""
    base = name.rpartition(".")[2]
    return base == "rrelu" or (base.endswith("_") and not base.endswith("__"))


def _rule(name: str) -> Rule | None:
    base = name.removeprefix("aten.")
    return _RULES.get(base) or _RULES.get(base.removesuffix("_copy"))


def _table(*families: tuple[Rule | str, *tuple[str, ...]]) -> Mapping[str, Rule]:
    """Rules by name from families of operations; a string is a pattern."""
    return MappingProxyType(
        {
            name: pattern(rule) if isinstance(rule, str) else rule
            for rule, *lines in families
            for line in lines
            for name in line.split()
        }
    )


_RULES = _table(
    # Products
    ("input(... k) weight(n k) +bias(n) -> (... n)", "linear"),
    ("self(m k) mat2(k n) -> (m n)", "mm"),
    ("self(b m k) mat2(b k n) -> (b m n)", "bmm"),
    ("+self(m n) mat1(m k) mat2(k n) -> (m n)", "addmm _addmm_activation"),
    ("+self(b m n) batch1(b m k) batch2(b k n) -> (b m n)", "baddbmm"),
    ("+self(m n) batch1(b m k) batch2(b k n) -> (m n)", "addbmm"),
    ("self(m k) vec(k) -> (m)", "mv"),
    ("+self(m) mat(m k) vec(k) -> (m)", "addmv"),
    ("self(k) tensor(k) -> ()", "dot"),
    ("self(k) other(k) -> ()", "vdot"),
    ("self(m) vec2(n) -> (m n)", "outer ger"),
    ("+self(m n) vec1(m) vec2(n) -> (m n)", "addr"),
    ("input1(... i) input2(... j) weight(o i j) +bias(o) -> (... o)", "bilinear"),
    ("x1(... p M) x2(... r M) -> (... p r)", "cdist _cdist_forward"),
    (math.multiplied, "matmul linalg_matmul"),
    (math.einsum, "einsum"),
    (
        math.attention,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    # Position by position, beside all that torch tags so
    (
        moves.pointwise,
        "dropout native_dropout contiguous detach alias lift_fresh lift_fresh_copy lift copy fill",
        "zero masked_fill rsub lerp hardswish log_sigmoid complex polar real imag _conj conj",
        "resolve_conj resolve_neg isclose isreal absolute arccos arccosh arcsin arcsinh arctan",
        "arctan2 arctanh divide floor_divide multiply subtract negative greater greater_equal less",
        "less_equal not_equal fix special_expit __and__ __or__ __xor__ __lshift__ __rshift__",
        "expand_as broadcast_tensors _prelu_kernel",
    ),
    (
        "self(...) -> (...)",
        "_to_copy to type_as zeros_like ones_like empty_like full_like bucketize",
    ),
    (moves.selected, "where"),
    (math.extremes, "max min"),
    (math.prelu, "prelu"),
    (moves.made, "full zeros ones empty new_full new_zeros new_ones new_empty scalar_tensor"),
    # Views
    (
        moves.reshaped,
        "view reshape _unsafe_view flatten unflatten unsqueeze view_as reshape_as",
        "ravel",
    ),
    (moves.squeezed, "squeeze"),
    (
        moves.permuted,
        "permute transpose t swapaxes swapdims movedim moveaxis mT numpy_T mH adjoint",
    ),
    (moves.expanded, "expand broadcast_to"),
    (moves.sliced, "slice narrow"),
    (moves.picked, "select unbind"),
    (moves.diagonal, "diagonal linalg_diagonal"),
    (moves.unfolded, "unfold"),
    (
        moves.along("dim"),
        "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
        "tensor_split",
    ),
    ("self(...) -> (... I)", "view_as_real one_hot"),
    ("self(... I) -> (...)", "view_as_complex"),
    # Joining and repeating
    (moves.joined, "cat concat concatenate"),
    (moves.stacked, "stack"),
    (moves.meshed, "meshgrid"),
    (moves.repeated, "repeat tile"),
    (moves.interleaved, "repeat_interleave"),
    (
        moves.padded,
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d",
        "replication_pad2d replication_pad3d",
    ),
    # Looking up and writing
    ("weight(V d) indices(...) -> (... d)", "embedding"),
    ("index(...) -> (...)", "take"),
    ("elements(...) -> (...)", "isin"),
    ("sorted_sequence(... S) self(... v) sorter(... S) -> (... v)", "searchsorted"),
    (moves.gathered, "gather"),
    (moves.taken, "index_select"),
    (moves.indexed, "index _unsafe_index"),
    (moves.index_put, "index_put _unsafe_index_put"),
    (moves.written("index", "src"), "scatter scatter_add scatter_reduce"),
    (moves.written("source"), "index_add index_copy"),
    (moves.written(), "index_fill"),
    (moves.written("src"), "slice_scatter"),
    (moves.written_at, "select_scatter"),
    # Along a dim
    (
        moves.along("dim"),
        "softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp",
        "cummax cummin sort argsort topk glu diff linalg_cross _fft_r2c _fft_c2r _fft_c2c fft_fft",
        "fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn",
        "fft_rfftn fft_irfftn fft_fftshift fft_ifftshift",
    ),
    (moves.along("dims"), "flip roll rot90"),
    (moves.all_but_last(2), "tril triu trace"),
    (
        moves.all_but_last(2),
        "linalg_inv linalg_inv_ex linalg_cholesky linalg_qr linalg_svd _linalg_svd linalg_svdvals",
        "linalg_eigh _linalg_eigh linalg_eigvalsh linalg_det _linalg_det linalg_slogdet",
        "_linalg_slogdet linalg_matrix_exp",
    ),
    # Reductions
    (math.reduced(sums=True), "sum nansum count_nonzero"),
    (
        math.reduced(),
        "mean nanmean amax amin any all prod logsumexp var std var_mean std_mean norm",
        "linalg_vector_norm argmax argmin median nanmedian mode kthvalue aminmax",
    ),
    (math.similarity, "cosine_similarity"),
    # Norms
    (math.layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    (moves.first(1), "group_norm native_group_norm"),
    (
        math.batch_norm,
        "batch_norm native_batch_norm _native_batch_norm_legit_no_training",
        "_native_batch_norm_legit _batch_norm_no_update cudnn_batch_norm",
    ),
    (math.instance_norm, "instance_norm"),
    # Losses
    (
        math.elementwise_loss,
        "mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy",
        "binary_cross_entropy_with_logits soft_margin_loss",
    ),
    (
        math.class_loss,
        "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward",
    ),
    # Neighbourhoods
    (
        math.convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    (
        moves.first(2),
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d",
        "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d",
        "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    (math.shuffled(up=True), "pixel_shuffle"),
    (math.shuffled(up=False), "pixel_unshuffle"),
    (moves.all_but_last(1), "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d"),
    (
        moves.all_but_last(2),
        "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d",
        "_adaptive_avg_pool2d",
    ),
    (
        moves.all_but_last(3),
        "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d adaptive_max_pool3d",
        "_adaptive_avg_pool3d im2col channel_shuffle",
    ),
    ("input(n c H W) grid(n h w I) -> (n c h w)", "grid_sampler_2d"),
    ("input(n c D H W) grid(n d h w I) -> (n c d h w)", "grid_sampler_3d"),
)
