"""Which dims an operation computes along: the rules that say where a split gives wrong results.

The same run is recorded twice, at the global shape and at the shape one rank of a split sees. A
dim whose length differs between the two is split there. For each operation a rule says whether a
split dim is one it treats position by position (right on a part) or computes along (wrong on a
part). An operation without a rule is refused where it meets a split.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from math import prod
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
Place = tuple[int, int]


def differing(whole: Shape, part: Shape) -> list[int]:
    """Positions at which two shapes differ."""
    return [i for i, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]


# A reshape is a view or a copy depending on strides, which may change where a length becomes 1.
_STRIDES_ONLY = frozenset(
    f"aten.{name}"
    for name in ["alias", "clone", "contiguous", "detach", "view", "_reshape_alias", "_unsafe_view"]
)


def first_fault(
    whole: Sequence[OpCall], part: Sequence[OpCall], *, passed_over: Container[Place] = ()
) -> Fault | None:
    """The first reason why the run on a part is not a part of the run on the whole.

    Args:
        passed_over: places where this rank's part is empty: nothing can come out wrong there, and
            kernels take other ways.
    """
    by_place = {place: list(calls) for place, calls in groupby(part, lambda call: call.place)}
    for place, calls in groupby(whole, lambda call: call.place):
        theirs = by_place.pop(place, [])
        fault = None if place in passed_over else _first_fault_at(calls, theirs)
        if fault is not None:
            return fault
    for place, left in by_place.items():
        fault = None if place in passed_over else _first_fault_at([], left)
        if fault is not None:
            return fault
    return None


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
    name = pair.whole.name
    number = _changed_number(pair)
    if number is not None:
        return f"{name} is given {number}, a number taken from a length that is split"
    inputs = list(zip(pair.whole.shapes, pair.part.shapes, strict=False))
    outputs = list(zip(pair.whole.results, pair.part.results, strict=False))
    if all(whole == part for whole, part in (*inputs, *outputs)):
        return None
    if any(len(whole) != len(part) for whole, part in (*inputs, *outputs)):
        return f"{name} gives tensors of different rank on the whole and on a part"
    rule = _RULES.get(name.removeprefix("aten."))
    if rule is None and torch.Tag.pointwise in pair.whole.tags:
        rule = _pointwise
    if rule is None and pair.whole.is_view:
        rule = _follows
    if rule is None:
        return f"it uses {name}, for which Hairpin has no rule, on a split tensor"
    if rule not in (_positions, _random, _constant) and all(w == p for w, p in inputs):
        return f"{name} takes a part of a whole tensor by a length that is split"
    return rule(pair)


# Arguments that give lengths, which are compared through the shapes that come out.
_LENGTHS = frozenset(["size", "shape", "sizes", "split_sizes", "output_size", "length", "N", "HxW"])


def _changed_number(pair: Pair) -> str | None:
    """The first plain argument that differs between the runs, as ``name=whole or part``."""
    if pair.whole.name == "reshape":
        return None
    for name, ours in pair.whole.arguments.items():
        theirs = pair.part.arguments.get(name)
        is_length = name in _LENGTHS or (name == "end" and pair.whole.name == "aten.slice")
        if not is_length and not _is_tensor(pair, name) and repr(ours) != repr(theirs):
            return f"{name}={ours} on the whole and {name}={theirs} on a part"
    return None


def _is_tensor(pair: Pair, name: str) -> bool:
    """Whether an argument holds tensors, which stand as shapes among the arguments."""
    value = pair.whole.arguments[name]
    leaves = value if isinstance(value, list) else [value]
    return any(isinstance(leaf, tuple) and leaf in pair.whole.shapes for leaf in leaves)


# Rules. Each gives a reason, or None where the call is right on a part.


def _constant(pair: Pair) -> str | None:
    """The same value at every position, however many there are."""
    return None


def _follows(pair: Pair) -> str | None:
    """Position by position; the split comes out as it went in."""
    before = sum(map(len, map(differing, pair.whole.shapes, pair.part.shapes)))
    after = len(differing(pair.whole.results[0], pair.part.results[0]))
    if before and not after:
        return f"{pair.whole.name} gives it the whole length again: a hard-coded length"
    return None


def _reshaped(pair: Pair) -> str | None:
    """Merging dims and taking them apart again; not regrouping across a split one."""
    whole = _segments(pair.whole.shapes[0], pair.whole.results[0])
    source = (pair.whole.shapes[0], pair.part.shapes[0])
    result = (pair.whole.results[0], pair.part.results[0])
    for before, after in whole:
        lengths = [[shape[d] for d in before] for shape in source]
        new = [[shape[d] for d in after] for shape in result]
        if lengths[0] == lengths[1] and new[0] == new[1]:
            continue
        regrouped = len(before) > 1 and len(after) > 1
        uneven = prod(lengths[1]) != prod(new[1])
        moved = sum(map(int.__ne__, *new)) != 1 or sum(map(int.__ne__, *lengths)) != 1
        if regrouped or uneven or moved:
            return (
                f"{pair.whole.name} from {source[0]} to {result[0]} regroups it with other dims "
                f"(on a part, from {source[1]} to {result[1]}): a hard-coded length, or a view "
                "across dims"
            )
    return None


def _segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims before and after a reshape that hold the same elements."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while prod(before[d] for d in left) != prod(after[d] for d in right):
            if prod(before[d] for d in left) < prod(after[d] for d in right) and i < len(before):
                left.append(i)
                i += 1
            elif j < len(after):
                right.append(j)
                j += 1
            else:
                left.extend(range(i, len(before)))
                i = len(before)
                break
        segments.append((left, right))
    return segments


def _pointwise(pair: Pair) -> str | None:
    """Broadcasting: at each dim every operand that is longer than 1 is split alike."""
    return _broadcast(pair, list(zip(pair.whole.shapes, pair.part.shapes, strict=True)))


def _broadcast(pair: Pair, shapes: Sequence[tuple[Shape, Shape]]) -> str | None:
    rank = max((len(whole) for whole, _ in shapes), default=0)
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
    """Computes along the dims in the arguments ``names``; along all if they name none.

    ``every`` says so of an absent or empty argument, as reductions have it.
    """

    def rule(pair: Pair) -> str | None:
        tensor = "self" if "self" in pair.whole.arguments else "input"
        rank = len(pair.shapes(tensor)[0])
        dims = [d for n in names if pair.get(n) is not None for d in _as_list(pair.get(n))]
        if not dims:
            dims = list(range(rank)) if every else [rank - 1]
        wrong = {d % max(rank, 1) for d in dims} & set(pair.split(tensor))
        return f"{pair.whole.name} computes along it" if wrong else None

    return rule


def _last_two(pair: Pair) -> str | None:
    rank = len(pair.shapes("self")[0])
    wrong = {rank - 2, rank - 1} & set(pair.split("self"))
    return f"{pair.whole.name} computes along it" if wrong else None


def _expanded(pair: Pair) -> str | None:
    """A dim of length 1 repeated: right for a whole one at any length, for a split one never."""
    (whole, part), results = pair.shapes("self"), (pair.whole.results[0], pair.part.results[0])
    for back in range(1, len(whole) + 1):
        pair_in, pair_out = (whole[-back], part[-back]), (results[0][-back], results[1][-back])
        if pair_in[0] != pair_in[1] and pair_in != pair_out:
            return "expand gives it the whole length again: a hard-coded length"
    return None


def _alike(*names: str, but: str | None = None) -> Rule:
    """Operands ``names`` must be split alike, and not along the dim in argument ``but``."""

    def rule(pair: Pair) -> str | None:
        splits = [pair.split(n) for n in names if isinstance(pair.whole.arguments.get(n), tuple)]
        if any(split != splits[0] for split in splits):
            return f"{pair.whole.name} meets split operands with whole ones"
        dim = pair.get(but, 0) % max(len(pair.shapes(names[0])[0]), 1) if but else None
        return f"{pair.whole.name} computes along it" if dim in splits[0] else None

    return rule


def _gathered(pair: Pair) -> str | None:
    """Looks up along a whole dim, at any number of places; other dims alike."""
    dim = pair.get("dim", 0) % max(len(pair.shapes("self")[0]), 1)
    if dim in pair.split("self"):
        return "aten.gather looks up positions along it"
    if {d for d in pair.split("index") if d != dim} != set(pair.split("self")):
        return "aten.gather meets split operands with whole ones"
    return None


def _refused(pair: Pair) -> str | None:
    return f"{pair.whole.name} on a split tensor is not understood"


def _along_if_changed(pair: Pair) -> str | None:
    """Takes a range of positions along ``dim``: right only where it takes all of them."""
    dim = pair.get("dim", pair.get("dimension", 0)) % len(pair.shapes("self")[0])
    if dim not in pair.split("self"):
        return _follows(pair)
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
    plain = not pair.get("transposed", False)
    stride, padding = _as_list(pair.get("stride", [1])), _as_list(pair.get("padding", [0]))

    def is_pointwise(d: int) -> bool:
        at = [values[(d - 2) % len(values)] for values in (list(kernel), stride, padding)]
        return plain and at == [1, 1, 0]

    wrong = [d for d in pair.split("input") if d == 1 or (d > 1 and not is_pointwise(d))]
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
    if pair.split("self") and any(map(differing, pair.whole.shapes[1:], pair.part.shapes[1:])):
        return f"{pair.whole.name} looks up split positions in a split tensor"
    return _broadcast(pair, list(zip(pair.whole.shapes[1:], pair.part.shapes[1:], strict=True)))


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
            "permute transpose t unsqueeze squeeze _to_copy zeros_like ones_like empty_like "
            "full_like view_as_real view_as_complex fill fill_ zero_ _conj unsqueeze_ squeeze_ t_ "
            "transpose_ expand_as"
        ),
    ),
    (
        _expanded,
        "expand",
    ),
    (
        _constant,
        (
            "zeros ones empty full new_zeros new_ones new_empty new_full scalar_tensor "
            "empty_strided new_empty_strided lift_fresh lift_fresh_copy tensor"
        ),
    ),
    (_reshaped, "reshape"),
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
            "cummin sort topk kthvalue index_select glu select unbind split split_with_sizes chunk"
        ),
    ),
    (_along("dims", every=True), "flip roll"),
    (_gathered, "gather"),
    (_alike("self", "index", "src", but="dim"), "scatter scatter_ scatter_add scatter_add_"),
    (_alike("self", "source", but="dim"), "index_add index_add_ index_copy index_copy_"),
    (_alike("self", "src", but="dim"), "select_scatter slice_scatter"),
    (_refused, "index_put index_put_ as_strided masked_scatter masked_scatter_"),
    (_along_if_changed, "slice narrow unfold"),
    (_along("dim1", "dim2"), "diagonal"),
    (_last_two, "tril triu trace"),
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
    (_indexed, "index _unsafe_index"),
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
