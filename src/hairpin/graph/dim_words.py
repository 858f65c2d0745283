"""Words for why an operation is wrong on a part of its inputs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hairpin.graph.axes import Axis, Operation, has_rule


def reason(
    name: str, whole: Operation, part: Operation, found: Sequence[Axis], *, draws: bool
) -> str:
    """Why a call is wrong on a part, where no axis covers what is split.

    Args:
        name: what the call is known by to its user.
        whole: the call at the global shapes, by the name that the table has for it.
        part: the call at the shapes of a part.
        found: all axes of the call, those that are summed over too.
        draws: it draws random numbers.
    """
    base = whole.name.removeprefix("aten.")
    if base in _SENTENCES:
        return f"{name} {_SENTENCES[base]}"
    if draws:
        return f"{name} {_DROPOUT if 'dropout_p' in whole.arguments else _RANDOM}"
    if not has_rule(whole.name) and not whole.pointwise and base not in _VERBS:
        return f"it uses {name}, for which Hairpin has no rule, on a split tensor"
    if whole.inputs == part.inputs:
        return f"{name} takes a part of a whole tensor by a length that is split"
    if base == "reshape":
        return (
            f"{name} from {whole.inputs[0]} to {whole.outputs[0]} regroups it with other dims (on "
            f"a part, from {part.inputs[0]} to {part.outputs[0]}): a hard-coded length, or a view "
            "across dims"
        )
    if base == "expand":
        return f"{base} gives it the whole length again: a hard-coded length"
    if base == "einsum":
        name = f"einsum {whole.arguments.get('equation')!r}"
    lengths = _meeting(whole, part, found)
    if lengths:
        return (
            f"{name} meets a split tensor with a whole one along the split dim (lengths {lengths} "
            "as (whole, part))"
        )
    return f"{name} {_along(whole, part, found)} it"


Lengths = list[tuple[int, int]]


def _meeting(whole: Operation, part: Operation, found: Sequence[Axis]) -> Lengths:
    """Lengths, whole and of a part, of the inputs along an axis that cuts some and not others."""
    for axis in found:
        lengths = _lengths(axis, whole, part)
        if len({ours == theirs for ours, theirs in lengths}) > 1:
            return sorted(set(lengths))
    return []


def _lengths(axis: Axis, whole: Operation, part: Operation) -> Lengths:
    return [
        (whole.inputs[at][span.dim], part.inputs[at][span.dim]) for at, span in axis.inputs.items()
    ]


def _along(whole: Operation, part: Operation, found: Sequence[Axis]) -> str:
    """What it does along the split dim."""
    if whole.arguments.get("is_causal") and whole.inputs[1] == part.inputs[1]:
        return "masks causally by positions along"
    name = whole.name.removeprefix("aten.")
    summed = (_lengths(axis, whole, part) for axis in found if axis.sums)
    is_summed = any(all(n != m for n, m in pairs) for pairs in summed)
    is_product = len(whole.inputs) > 1 or name == "einsum"
    return _VERBS.get(name, "sums over" if is_summed and is_product else "computes along")


def _by_name(words: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name: text for text, names in words.items() for name in names.split()})


_RANDOM = (
    "draws random numbers of a split shape outside an nn.Dropout, so ranks would not draw what one "
    "process draws; use nn.Dropout, set it to 0, or call eval()"
)
_DROPOUT = (
    "draws dropout inside the attention kernel, which cannot be keyed by global position; set the "
    "attention dropout to 0 or call eval()"
)
_SENTENCES = _by_name(
    {
        "makes positions from a length that is split, so every rank would count from the start": (
            "arange linspace logspace eye tril_indices triu_indices"
        ),
        "reads values of a split tensor into Python": (
            "_local_scalar_dense item is_nonzero nonzero masked_select"
        ),
    }
)
_VERBS = _by_name(
    {
        "attends along": (
            "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
            "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
            "_scaled_dot_product_fused_attention_overrideable"
        ),
        "normalises along": "native_layer_norm layer_norm rms_norm _fused_rms_norm",
        "takes statistics along": (
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
            "cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm"
        ),
        "mixes neighbours along": "convolution",
        "looks up positions along": "embedding gather index _unsafe_index",
        "joins along": "cat",
        "repeats along": "repeat tile",
        "pads along": "constant_pad_nd pad",
        "picks positions along": "slice narrow unfold",
    }
)
