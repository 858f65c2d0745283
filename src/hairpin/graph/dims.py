"""Which dims an operation computes along: the rules that say where a split gives wrong results.

The same run is recorded twice, at the global shape and at the shape one rank of a split sees. A
dim whose length differs between the two is split there. For each operation a rule says whether a
split dim is one it treats position by position (right on a part) or computes along (wrong on a
part). An operation without a rule is refused where it meets a split.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

import torch

from hairpin.graph.trace import OpCall, Shape


@dataclass(frozen=True)
class Fault:
    """Why a run on a part cannot equal the part of a run on the whole."""

    call: OpCall | None
    module: str
    place: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class Pair:
    """One call in the two runs."""

    whole: OpCall
    part: OpCall

    def shapes(self, name: str) -> tuple[Shape, Shape]:
        """Shapes of the tensor argument ``name`` in both runs."""
        return self.whole.arguments[name], self.part.arguments[name]

    def split(self, name: str) -> list[int]:
        """Dims of tensor argument ``name`` that are split."""
        return differing(*self.shapes(name))

    def get(self, name: str, default: Any = None) -> Any:
        """A plain argument, as the run on the whole had it."""
        value = self.whole.arguments.get(name, default)
        return default if value is None else value


Rule = Callable[[Pair], str | None]


def differing(whole: Shape, part: Shape) -> list[int]:
    """Positions at which two shapes differ."""
    return [i for i, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]


# A reshape is a view or a copy depending on strides, which may change where a length becomes 1.
_STRIDES_ONLY = frozenset(
    f"aten.{name}"
    for name in ["alias", "clone", "contiguous", "detach", "view", "_reshape_alias", "_unsafe_view"]
)


def first_fault(whole: Sequence[OpCall], part: Sequence[OpCall]) -> Fault | None:
    """The first reason why the run on a part is not a part of the run on the whole.

    Compared place by place. Where a rank's part is empty nothing can come out wrong, and kernels
    take other ways, so those places are passed over.
    """
    by_place = {place: list(calls) for place, calls in groupby(part, lambda call: call.place)}
    for place, calls in groupby(whole, lambda call: call.place):
        theirs = by_place.pop(place, [])
        if not any(0 in shape for call in theirs for shape in (*call.shapes, *call.results)):
            fault = _first_fault_at(calls, theirs)
            if fault is not None:
                return fault
    return _diverged(None, next(iter(by_place.values()))[0]) if by_place else None


def _first_fault_at(whole: Iterable[OpCall], part: Iterable[OpCall]) -> Fault | None:
    pairs = zip_longest(
        (call for call in whole if call.name not in _STRIDES_ONLY),
        (call for call in part if call.name not in _STRIDES_ONLY),
    )
    for ours, theirs in pairs:
        if (
            ours is None
            or theirs is None
            or (ours.name, ours.module) != (theirs.name, theirs.module)
        ):
            return _diverged(ours, theirs)
        reason = _judge(Pair(ours, theirs))
        if reason is not None:
            return Fault(theirs, theirs.module, theirs.place, reason)
    return None


def _diverged(whole: OpCall | None, part: OpCall | None) -> Fault:
    here = part or whole
    assert here is not None
    words = [f"{c.name} in '{c.module}'" if c else "nothing more" for c in (whole, part)]
    reason = (
        f"it runs {words[0]} on the whole but {words[1]} on a part: the code branches on a length "
        "that the split changes"
    )
    module = whole.module if whole else here.module
    return Fault(here, module, here.place, reason)


def _judge(pair: Pair) -> str | None:
    """Why this call is wrong on a part, or None."""
    inputs = list(zip(pair.whole.shapes, pair.part.shapes, strict=False))
    outputs = list(zip(pair.whole.results, pair.part.results, strict=False))
    if all(whole == part for whole, part in (*inputs, *outputs)):
        return None
    if any(len(whole) != len(part) for whole, part in (*inputs, *outputs)):
        return f"{pair.whole.name} gives tensors of different rank on the whole and on a part"
    rule = _RULES.get(pair.whole.name.removeprefix("aten."))
    if rule is None and torch.Tag.pointwise in pair.whole.tags:
        rule = _pointwise
    if rule is None and pair.whole.is_view:
        rule = _follows
    if rule is None:
        return f"it uses {pair.whole.name}, for which Hairpin has no rule, on a split tensor"
    return rule(pair)


# Rules. Each gives a reason, or None where the call is right on a part.


def _follows(pair: Pair) -> str | None:
    """Position by position; the split comes out as it went in."""
    return None


def _pointwise(pair: Pair) -> str | None:
    """Broadcasting: at each dim every operand that is longer than 1 is split alike."""
    shapes = list(zip(pair.whole.shapes, pair.part.shapes, strict=True))
    rank = max(len(whole) for whole, _ in shapes)
    for position in range(1, rank + 1):
        lengths = {
            (whole[-position], part[-position])
            for whole, part in shapes
            if len(whole) >= position and whole[-position] != 1
        }
        if len(lengths) > 1:
            return (
                f"{pair.whole.name} meets a split tensor with a whole one along the split dim "
                f"(lengths {sorted(lengths)} as (whole, part))"
            )
    return None


def _along(*names: str, every: bool = False) -> Rule:
    """Computes along the dims in argument ``names``; all dims if absent and ``every``."""

    def rule(pair: Pair) -> str | None:
        tensor = "self" if "self" in pair.whole.arguments else "input"
        rank = len(pair.shapes(tensor)[0])
        given = [pair.get(name) for name in names if pair.get(name) is not None]
        dims = _as_list(given[0]) if given and given[0] != [] else []
        if not dims:
            dims = list(range(rank)) if every else [0 if not given else rank - 1]
        wrong = {d % max(rank, 1) for d in dims} & set(pair.split(tensor))
        return f"{pair.whole.name} computes along it" if wrong else None

    return rule


def _along_if_changed(pair: Pair) -> str | None:
    """Takes a range of positions along ``dim``: right only where it takes all of them."""
    dim = pair.get("dim", 0) % len(pair.shapes("self")[0])
    if dim not in pair.split("self"):
        return None
    kept = all(
        result[dim] == source[dim]
        for source, result in (
            (pair.shapes("self")[0], pair.whole.results[0]),
            (pair.shapes("self")[1], pair.part.results[0]),
        )
    )
    return None if kept else f"{pair.whole.name} picks positions along it"


def _product(left: str, right: str, extra: str | None = None) -> Rule:
    """Matrix product: the contracted dim must be whole, batch dims alike."""

    def rule(pair: Pair) -> str | None:
        (a, a_part), (b, b_part) = pair.shapes(left), pair.shapes(right)
        if a[-1] != a_part[-1] or (b[-2] if len(b) > 1 else b[0]) != (
            b_part[-2] if len(b_part) > 1 else b_part[0]
        ):
            return f"{pair.whole.name} sums over it"
        if len(a) == len(b) == 3 and differing(a[:1], a_part[:1]) != differing(b[:1], b_part[:1]):
            return f"{pair.whole.name} meets a split batch with a whole one"
        if extra and extra in pair.whole.arguments:
            out, out_part = pair.whole.results[0], pair.part.results[0]
            bias, bias_part = pair.shapes(extra)
            for back in range(1, len(bias) + 1):
                if bias[-back] != 1 and (bias[-back] != bias_part[-back]) != (
                    out[-back] != out_part[-back]
                ):
                    return f"{pair.whole.name} adds a whole bias to a split product"
        return None

    return rule


def _linear(pair: Pair) -> str | None:
    """Channels and weights whole."""
    shapes = list(zip(pair.whole.shapes, pair.part.shapes, strict=True))
    if shapes[0][0][-1] != shapes[0][1][-1] or any(whole != part for whole, part in shapes[1:]):
        return "linear sums over it"
    return None


def _matmul(pair: Pair) -> str | None:
    """The contracted dim whole, batch dims alike."""
    (a, a_part), (b, b_part) = zip(pair.whole.shapes, pair.part.shapes, strict=True)
    inner = -2 if len(b) > 1 else -1
    if a[-1] != a_part[-1] or b[inner] != b_part[inner]:
        return "matmul sums over it"
    for back in range(3, min(len(a), len(b)) + 1):
        if 1 not in (a[-back], b[-back]) and (a[-back] == a_part[-back]) != (
            b[-back] == b_part[-back]
        ):
            return "matmul meets a split batch with a whole one"
    return None


def _einsum(pair: Pair) -> str | None:
    """Every letter that is summed over whole; every letter split alike in all operands."""
    equation = pair.get("0", pair.get("equation"))
    if not isinstance(equation, str) or "..." in equation:
        return f"einsum {equation!r} on a split tensor is not understood; write all its letters"
    inputs, _, output = equation.replace(" ", "").partition("->")
    if not output:
        return f"einsum {equation!r} on a split tensor is not understood; write its '->'"
    lengths: dict[str, set[tuple[int, int]]] = {}
    for letters, whole, part in zip(
        inputs.split(","), pair.whole.shapes, pair.part.shapes, strict=True
    ):
        for letter, length in zip(letters, zip(whole, part, strict=True), strict=True):
            lengths.setdefault(letter, set()).add(length)
    for letter, pairs in lengths.items():
        split = any(whole != part for whole, part in pairs)
        if split and letter not in output:
            return f"einsum {equation!r} sums over it ({letter})"
        if len({length for length in pairs if length[0] != 1}) > 1:
            return f"einsum {equation!r} meets a split tensor with a whole one along {letter}"
    return None


def _attention(pair: Pair) -> str | None:
    """Scaled dot product attention: keys and head_dim whole; queries may be split unless causal."""
    if pair.get("dropout_p", 0.0):
        return (
            f"{pair.whole.name} draws dropout inside the attention kernel, which cannot be keyed "
            "by global position; set the attention dropout to 0 or call eval()"
        )
    query, key = pair.split("query"), pair.split("key")
    rank = len(pair.shapes("query")[0])
    if {rank - 2, rank - 1} & set(key) or rank - 1 in query:
        return f"{pair.whole.name} attends along it"
    if rank - 2 in query and pair.get("is_causal", False):
        return f"{pair.whole.name} masks causally by positions along it"
    if [d for d in query if d < rank - 2] != [d for d in key if d < rank - 2]:
        return f"{pair.whole.name} meets split queries with whole keys in a batch dim"
    for name in ("attn_mask", "attn_bias"):
        if isinstance(pair.whole.arguments.get(name), tuple):
            whole, part = pair.shapes(name)
            for d in query:
                back = rank - d
                if len(whole) >= back and whole[-back] != 1 and whole[-back] == part[-back]:
                    return f"{pair.whole.name} meets split queries with a whole mask"
    return None


def _layer_norm(pair: Pair) -> str | None:
    normalized = len(_as_list(pair.get("normalized_shape")))
    rank = len(pair.shapes("input")[0])
    wrong = [d for d in pair.split("input") if d >= rank - normalized]
    return f"{pair.whole.name} normalises along it" if wrong else None


def _only_batch(tensor: str) -> Rule:
    """Computes along every dim of ``tensor`` but the first."""

    def rule(pair: Pair) -> str | None:
        return f"{pair.whole.name} computes along it" if any(pair.split(tensor)) else None

    return rule


def _batch_norm(pair: Pair) -> str | None:
    training = pair.get("training", pair.get("train", False))
    split = pair.split("input")
    if (training and split) or 1 in split:
        return f"{pair.whole.name} takes statistics along it"
    return None


def _convolution(pair: Pair) -> str | None:
    kernel = pair.shapes("weight")[0][2:]
    wrong = [d for d in pair.split("input") if d == 1 or (d > 1 and kernel[d - 2] != 1)]
    return f"{pair.whole.name} mixes neighbours along it" if wrong else None


def _whole(tensor: str) -> Rule:
    """Argument ``tensor`` must be whole, the others are free."""

    def rule(pair: Pair) -> str | None:
        return f"{pair.whole.name} looks up positions along it" if pair.split(tensor) else None

    return rule


def _indexed(pair: Pair) -> str | None:
    """Advanced indexing: a split dim may only be one that no index touches."""
    touched = {d for d, index in enumerate(pair.get("indices", [])) if index is not None}
    if touched & set(pair.split("self")):
        return f"{pair.whole.name} looks up positions along it"
    return None


def _joined(pair: Pair) -> str | None:
    """Concatenation: not along a split dim, and all parts split alike elsewhere."""
    shapes = list(zip(pair.whole.shapes, pair.part.shapes, strict=True))
    rank = len(pair.whole.results[0])
    dim = pair.get("dim", 0) % rank
    if pair.whole.name == "aten.cat" and any(dim in differing(w, p) for w, p in shapes):
        return f"{pair.whole.name} joins along it"
    splits = {tuple(differing(w, p)) for w, p in shapes if len(w) == len(shapes[0][0])}
    return f"{pair.whole.name} joins split and whole tensors" if len(splits) > 1 else None


def _repeated(pair: Pair) -> str | None:
    repeats = _as_list(pair.get("repeats"))
    shape = pair.shapes("self")[0]
    padded = len(repeats) - len(shape)
    wrong = [d for d in pair.split("self") if repeats[d + padded] != 1]
    return f"{pair.whole.name} repeats along it" if wrong else None


def _padded(pair: Pair) -> str | None:
    pad, rank = _as_list(pair.get("pad")), len(pair.shapes("self")[0])
    wrong = [
        d
        for d in pair.split("self")
        if 2 * (rank - 1 - d) < len(pad) and any(pad[2 * (rank - 1 - d) : 2 * (rank - d)])
    ]
    return f"{pair.whole.name} pads along it" if wrong else None


def _positions(pair: Pair) -> str | None:
    return (
        f"{pair.whole.name} makes positions from a length that is split, so every rank would count "
        "from the start"
    )


def _random(pair: Pair) -> str | None:
    return (
        f"{pair.whole.name} draws random numbers of a split shape outside an nn.Dropout, so ranks "
        "would not draw what one process draws; use nn.Dropout, set it to 0, or call eval()"
    )


def _reads(pair: Pair) -> str | None:
    return f"{pair.whole.name} reads values of a split tensor into Python"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _table(*families: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in families for name in names.split()}


_REDUCED = (
    "sum mean amax amin var std prod any all var_mean std_mean logsumexp norm linalg_vector_norm"
)
_RULES = _table(
    (
        _follows,
        (
            "permute transpose t unsqueeze squeeze expand expand_as _to_copy lift_fresh "
            "lift_fresh_copy zeros ones empty full "
            "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full "
            "scalar_tensor view_as_real view_as_complex empty_strided new_empty_strided fill "
            "fill_ zero_ "
            "_conj unsqueeze_ squeeze_ t_ transpose_"
        ),
    ),
    (_pointwise, "copy_ copy where masked_fill masked_fill_ lerp bitwise_and bitwise_or"),
    (_along("dim", every=True), _REDUCED),
    (
        _along("dim", every=True),
        "argmax argmin count_nonzero nansum median mode max min",
    ),
    (
        _along("dim"),
        (
            "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod "
            "logcumsumexp cummax "
            "cummin sort topk kthvalue gather scatter scatter_add index_select index_add glu "
            "select "
            "unbind split split_with_sizes chunk index_copy scatter_ select_scatter slice_scatter"
        ),
    ),
    (_along("dims"), "flip roll"),
    (_along_if_changed, "slice narrow unfold"),
    (_along("dim1", every=True), "diagonal tril triu trace"),
    (_linear, "linear"),
    (_matmul, "matmul"),
    (_einsum, "einsum"),
    (_product("self", "mat2"), "mm bmm"),
    (_product("mat1", "mat2", "self"), "addmm"),
    (_product("batch1", "batch2", "self"), "baddbmm"),
    (_product("self", "vec"), "mv"),
    (_product("self", "tensor"), "dot"),
    (
        _attention,
        (
            "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
            "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
            "_scaled_dot_product_fused_attention_overrideable"
        ),
    ),
    (_layer_norm, "native_layer_norm layer_norm rms_norm _fused_rms_norm"),
    (_only_batch("input"), "native_group_norm group_norm"),
    (_only_batch("self"), "upsample_nearest2d upsample_bilinear2d pixel_shuffle pixel_unshuffle"),
    (
        _batch_norm,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
    ),
    (_batch_norm, "cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm"),
    (_convolution, "convolution"),
    (_whole("weight"), "embedding"),
    (_indexed, "index index_put index_put_ _unsafe_index"),
    (_joined, "cat stack"),
    (_repeated, "repeat tile"),
    (_padded, "constant_pad_nd pad"),
    (_positions, "arange linspace logspace eye tril_indices triu_indices"),
    (
        _random,
        (
            "native_dropout bernoulli bernoulli_ rand randn randint rand_like randn_like "
            "randint_like "
            "normal normal_ uniform uniform_ randperm multinomial"
        ),
    ),
    (_reads, "_local_scalar_dense item is_nonzero nonzero masked_select"),
)
