"""What an exported graph computes and eager would not: taken out, and losses taken apart.

Export writes what a model does when it cannot look at values: it builds masks that eager finds to
be trivial, it copies where dropout does nothing, it repeats keys for their queries. Which masks are
trivial is proved from lengths alone, by following values that depend on no data (``Affine``,
``Choice``) for every length that the symbols allow, never from the example's.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from hairpin.graph.known import (
    Affine,
    Choice,
    Known,
    argument,
    holds_number,
    is_constant,
    is_pointwise,
    name_of,
    result_of,
    table,
)
from hairpin.graph.lengths import alike, proved

aten = torch.ops.aten

_MOST_PASSES = 4
_LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd")


def simplify(graph: fx.Graph) -> None:
    """Take out of a graph of ATen operations what eager does not compute, in place.

    Copies of what nothing else changes; masks, selections and sums that lengths prove to do
    nothing; causal masks that ``is_causal`` says as well; keys repeated for attention that can
    group its queries; masks written out in full where a broadcast one does. A cross entropy becomes
    a log softmax, a gather and a sum, so that its tokens can be cut, and attention that drops out
    weights is written out. Results stay equal, outputs
    alias what they did, and ``meta["val"]`` of every node is right.

    Args:
        graph: functional, as ``torch.export`` leaves it; one that writes in place is left alone.
    """
    mode = _fake_mode(graph)
    if mode is None or any(_writes(node) for node in graph.nodes):
        return
    work = _Work(graph, mode)
    _repair(work)
    for _ in range(_MOST_PASSES):
        before = work.edits
        for node in list(graph.nodes):
            _visit(work, node)
        graph.eliminate_dead_code()
        if work.edits == before:
            break
    work.refresh()


def _repair(work: "_Work") -> None:
    """Decomposition leaves the shape of a sum on a loss for each token: compute it, and the rest.

    Seen in torch 2.13 for ``reduction="none"``.
    """
    stale: set[fx.Node] = set()
    for node in work.graph.nodes:
        loss = name_of(node) in _LOSSES and argument(node, "reduction", 1) == 0
        if loss or (node.op == "call_function" and not stale.isdisjoint(node.all_input_nodes)):
            result = work.computed(node.target, node.args, node.kwargs, guarded=False)
            if result is not None:
                node.meta["val"] = result
                stale.add(node)


def _visit(work: "_Work", node: fx.Node) -> None:
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.users:
        return
    work.learn(node)
    rewrite = _REWRITES.get(name_of(node))
    if rewrite is not None:
        rewrite(work, node)
    if node.users and is_pointwise(node):
        _absorb_expansions(work, node)


# ------------------------------------------------------------------------------------------ edits


@dataclass
class _Work(Known):
    """A graph while it is changed.

    Attributes:
        edits: changes so far.
        changed: nodes that read others than before.
    """

    graph: fx.Graph
    mode: FakeTensorMode
    edits: int = 0
    changed: set[fx.Node] = field(default_factory=set)

    def computed(
        self,
        target: Any,
        args: Any,
        kwargs: Any,
        *,
        instead: Mapping[fx.Node, Tensor] = MappingProxyType({}),
        guarded: bool = True,
    ) -> Any:
        """The fake result of a call; None where it fails or holds only under a new condition.

        Args:
            instead: results to take for those of nodes.
            guarded: refuse new conditions; otherwise they are known to hold.
        """
        fake_args, fake_kwargs = map_arg(
            (args, kwargs), lambda node: instead.get(node, node.meta["val"])
        )
        env = self.mode.shape_env
        watch = nullcontext() if env is None else env.suppress_guards()
        if env is not None and guarded:
            watch = env.error_on_new_guards()
        try:
            with torch.no_grad(), watch, self.mode:
                return target(*fake_args, **fake_kwargs)
        except Exception:  # noqa: BLE001 - a call that does not work is one not to make
            return None

    def made(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in before.meta.items() if key != "val"}
        node.meta["val"] = self.computed(target, args, kwargs)
        self.learn(node)
        return node

    def forget(self, node: fx.Node) -> None:
        """Take out a new call that nobody reads."""
        self.graph.erase_node(node)
        self.values.pop(node, None)

    def sizes(self, node: fx.Node, small: Tensor) -> list[Any] | None:
        """The shape of a result to expand ``small`` to: -1 where it has it, numbers and nodes.

        Returns:
            None where no node in front of it gives a length.
        """
        lengths = [
            -1 if alike([have], [n]) else self._length(n, node)
            for n, have in zip(result_of(node).shape, small.shape, strict=True)
        ]
        return None if any(n is None for n in lengths) else lengths

    def _length(self, length: Any, before: fx.Node) -> Any:
        if not isinstance(length, SymInt):
            return length
        for node in self.graph.nodes:
            if node is before:
                break
            value = node.meta.get("val")
            if isinstance(value, SymInt) and proved(value == length):
                return node
        return None

    def replace(self, node: fx.Node, by: fx.Node) -> bool:
        """Let all who read ``node`` read ``by``, if they cannot tell the difference."""
        old, new = node.meta["val"], by.meta["val"]
        if old.dtype != new.dtype or old.device != new.device:
            return False
        if not alike(old.shape, new.shape) or not alike(old.stride(), new.stride()):
            return False
        if not self._may_share(node, by):
            return False
        self.changed.update(node.users)
        node.replace_all_uses_with(by)
        self.edits += 1
        return True

    def rewrite(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Give a call other arguments, if its result is of the same shape and strides."""
        old, new = node.meta["val"], self.computed(node.target, args, kwargs)
        if not isinstance(new, Tensor) or old.dtype != new.dtype:
            return False
        if not alike(old.shape, new.shape) or not alike(old.stride(), new.stride()):
            return False
        node.args, node.kwargs = args, kwargs
        node.meta["val"] = new
        self.changed.update(node.users)
        self.edits += 1
        return True

    def _may_share(self, node: fx.Node, by: fx.Node) -> bool:
        """Whether outputs alias inputs and one another as before with ``by`` for ``node``."""
        roots = _roots(by)
        if _roots(node) == roots or not _reaches_output(node):
            return True
        return not any(
            root.op == "placeholder" or _reaches_output(root, without=node) for root in roots
        )

    def refresh(self) -> None:
        """Compute again what views something else than before, so that storages are right.

        The results of all other operations stay what they were, in storages of their own.
        """
        stale: set[fx.Node] = set()
        for node in self.graph.nodes:
            viewed = _may_lie_in(node) if node.op == "call_function" else []
            if not viewed or not (node in self.changed or not stale.isdisjoint(viewed)):
                continue
            if free_unbacked_symbols(node.meta.get("val")):
                continue
            result = self.computed(node.target, node.args, node.kwargs, guarded=False)
            if result is not None:
                node.meta["val"] = result
                stale.add(node)


def _fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _may_lie_in(node: fx.Node) -> list[fx.Node]:
    """Inputs in whose memory the result may lie."""
    sources = node.all_input_nodes
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return sources  # an item of several results
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return sources[:1]
    composite = node.target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )
    return sources if composite and name_of(node) not in _MAKES else []


_MAKES = frozenset(
    (
        *("linear", "matmul", "conv1d", "conv2d", "conv3d", "outer", "embedding", "one_hot"),
        *("layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm"),
        *("softmax", "log_softmax", "cross_entropy_loss", "nll_loss", "nll_loss_nd"),
        *("scaled_dot_product_attention", "diff", "pad", "where", "__and__", "__or__"),
    )
)


def _roots(node: fx.Node) -> set[fx.Node]:
    """Nodes that may have made the memory in which a result lies."""
    ahead, seen, roots = [node], {node}, set()
    while ahead:
        current = ahead.pop()
        sources = _may_lie_in(current)
        if not sources:
            roots.add(current)
        ahead += [source for source in sources if source not in seen]
        seen.update(sources)
    return roots


def _reaches_output(node: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether a node or a view of it is an output, not counting by way of ``without``."""
    ahead, seen = [node], {node}
    while ahead:
        current = ahead.pop()
        for user in current.users:
            if user.op == "output":
                return True
            if user not in seen and user is not without and current in _may_lie_in(user):
                seen.add(user)
                ahead.append(user)
    return False


# --------------------------------------------------------------------------------------- rewrites

Rewrite = Callable[[_Work, fx.Node], None]


def _drop_copy(work: _Work, node: fx.Node) -> None:
    if isinstance(node.args[0], fx.Node):
        work.replace(node, node.args[0])


def _drop_view(work: _Work, node: fx.Node) -> None:
    """A view of the same shape, such as a slice of everything."""
    source = node.args[0]
    if isinstance(source, fx.Node) and not any(user.op == "output" for user in node.users):
        work.replace(node, source)


def _drop_neutral(number: float, *, commutes: bool = True) -> Rewrite:
    """``x + 0``, ``x * 1`` and the like."""

    def rule(work: _Work, node: fx.Node) -> None:
        left, right = node.args[:2]
        if isinstance(number, bool) and node.meta["val"].dtype != torch.bool:
            return
        if argument(node, "rounding_mode") is not None:
            return
        if isinstance(left, fx.Node) and _is_number(work, right, number):
            _drop_for(work, node, left)
        elif (
            commutes
            and isinstance(right, fx.Node)
            and _is_number(work, left, number)
            and argument(node, "alpha", 1) == 1
        ):
            _drop_for(work, node, right)

    return rule


def _drop_for(work: _Work, node: fx.Node, operand: fx.Node) -> None:
    """An operation that gives its operand, which it may have broadcast."""
    if not work.replace(node, operand) and _is_expandable(work, node, result_of(operand)):
        _expand_instead(work, node, operand)


def _is_number(work: _Work, arg: Any, number: float) -> bool:
    if isinstance(arg, fx.Node):
        return holds_number(work.of(arg), number)
    return isinstance(arg, (bool, int, float)) and arg == number


def _drop_where(work: _Work, node: fx.Node) -> None:
    condition = work.of(node.args[0])
    if is_constant(condition) and isinstance(condition, Affine) and len(node.args) == 3:
        side = node.args[1 if condition.start else 2]
        if isinstance(side, fx.Node):
            _drop_for(work, node, side)


def _drop_fill(work: _Work, node: fx.Node) -> None:
    if holds_number(work.of(node.args[1]), False):
        _drop_copy(work, node)


def _simplify_attention(work: _Work, node: fx.Node) -> None:
    _drop_mask(work, node)
    mask = argument(node, "attn_mask")
    narrow = _unexpanded(work, mask)
    if narrow is not mask:
        _attend(work, node, attn_mask=narrow)
    _group_queries(work, node)
    if argument(node, "dropout_p", 0.0) and node.users:
        _split_attention(work, node)


def _split_attention(work: _Work, node: fx.Node) -> None:
    """Attention that drops weights out, as products, softmax and a dropout of their own.

    One with a mask stays: rows that see nothing are zero in its kernel.
    """
    query, key, value = node.args[:3]
    if argument(node, "attn_mask") is not None or argument(node, "enable_gqa", False):
        return
    made: list[fx.Node] = []

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made.append(work.made(node, target, *args, **kwargs))
        return made[-1]

    scale = argument(node, "scale") or result_of(query).shape[-1] ** -0.5
    scores = add(aten.matmul.default, query, add(aten.transpose.int, key, -2, -1))
    scores = add(aten.mul.Tensor, scores, scale)
    if argument(node, "is_causal", False):
        scores = add(aten.where.ScalarOther, _seen(work, node, add), scores, -math.inf)
    weights = add(aten.softmax.int, scores, -1)
    weights = add(aten.dropout.default, weights, argument(node, "dropout_p"), True)
    mixed = add(aten.matmul.default, weights, value)
    if not alike(result_of(node).stride(), result_of(mixed).stride()):  # heads behind positions
        order = add(aten.transpose.int, mixed, 1, 2)
        order = add(aten.clone.default, order, memory_format=torch.contiguous_format)
        mixed = add(aten.transpose.int, order, 1, 2)
    if any(each.meta["val"] is None for each in made) or not work.replace(node, mixed):
        for each in reversed(made):
            work.forget(each)
    else:
        work.forget(node)  # a random step does not go for want of readers


def _seen(work: _Work, node: fx.Node, add: Callable[..., fx.Node]) -> fx.Node:
    """Which keys each query of causal attention sees, ``bool[q, k]``."""
    device = result_of(node).device
    places = []
    for operand in node.args[:2]:
        assert isinstance(operand, fx.Node)
        length: Any = result_of(operand).shape[-2]
        if isinstance(length, SymInt):
            length = work._length(length, node) or add(aten.sym_size.int, operand, -2)
        places.append(add(aten.arange.default, length, device=device))
    return add(aten.ge.Tensor, add(aten.unsqueeze.default, places[0], 1), places[1])


def _drop_mask(work: _Work, node: fx.Node) -> None:
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node) or argument(node, "is_causal", False):
        return
    value, dtype = work.of(mask), result_of(mask).dtype
    if holds_number(value, dtype == torch.bool):
        _attend(work, node, attn_mask=None)
    elif isinstance(value, Choice) and _is_causal(work, node, mask, value):
        _attend(work, node, attn_mask=None, is_causal=True)


def _is_causal(work: _Work, node: fx.Node, mask: fx.Node, value: Choice) -> bool:
    """Query q sees keys k <= q, and there are as many of both."""
    query, key = (result_of(arg) for arg in node.args[:2])
    kept = (True, False) if result_of(mask).dtype == torch.bool else (0.0, -math.inf)
    if (value.yes, value.no) != kept or not alike(query.shape[-2:-1], key.shape[-2:-1]):
        return False
    rank = result_of(mask).dim()
    bounds = value.bounds
    return (
        rank >= 2
        and len(bounds) == 1
        and dict(bounds[0].steps) == {rank - 1: 1, rank - 2: -1}
        and proved(bounds[0].start == 0)
    )


def _attend(work: _Work, node: fx.Node, **given: Any) -> bool:
    """The same attention with some arguments given anew."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs, **given}
    args = tuple(arguments.pop(name) for name in ("query", "key", "value"))
    return work.rewrite(node, args, {k: v for k, v in arguments.items() if v is not None})


def _shrink_unread(work: _Work, node: fx.Node) -> None:
    """A product that is added to 0 times an empty tensor needs no memory for it."""
    unread = node.args[0]
    if argument(node, "beta", 1) != 0 or not isinstance(unread, fx.Node):
        return
    if name_of(unread) != "empty" or argument(unread, "memory_format") is not None:
        return
    like = result_of(unread)
    one = work.made(
        node, aten.empty.memory_format, [1] * like.dim(), dtype=like.dtype, device=like.device
    )
    wide = work.made(node, aten.expand.default, one, unread.args[0])
    if not work.rewrite(node, (wide, *node.args[1:]), dict(node.kwargs)):
        work.forget(wide)
        work.forget(one)


def _group_queries(work: _Work, node: fx.Node) -> None:
    """Keys and values that were repeated for their queries, as they were before.

    On CPU only: kernels elsewhere may not group, and then take the memory of the whole matrix.
    """
    query, key, value = node.args[:3]
    before = [_unrepeated(work, arg) for arg in (key, value)]
    if None in before or argument(node, "enable_gqa", False):
        return
    if result_of(query).device.type == "cpu":
        _attend(work, node, key=before[0], value=before[1], enable_gqa=True)


def _unrepeated(work: _Work, node: Any) -> fx.Node | None:
    """``x[b, h, n, c]`` of which ``node`` is ``[b, h * r, n, c]``, each head r times over."""
    chain = []
    for names in (("_unsafe_view", "view", "reshape"), ("clone",), ("expand",)):
        if names == ("clone",) and isinstance(node, fx.Node) and name_of(node) != "clone":
            continue
        if not isinstance(node, fx.Node) or name_of(node) not in names:
            return None
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or name_of(node) != "unsqueeze" or node.args[1] != 2:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    b, h, n, c = result_of(source).shape
    wide = result_of(chain[-1]).shape
    flat = result_of(chain[0]).shape
    if not alike(wide, [b, h, wide[2], n, c]) or not alike(flat, [b, h * wide[2], n, c]):
        return None
    return source


def _absorb_expansions(work: _Work, node: fx.Node) -> None:
    """An operation that broadcasts by itself needs no operand expanded.

    Where its result is smaller without, the result is expanded instead, if all who read it can do
    with that.
    """
    args = tuple(_unexpanded(work, arg) for arg in node.args)
    if all(new is old for new, old in zip(args, node.args, strict=True)):
        return
    if work.rewrite(node, args, dict(node.kwargs)):
        return
    small = work.computed(node.target, args, node.kwargs)
    if isinstance(small, Tensor) and _is_expandable(work, node, small):
        _expand_instead(work, node, work.made(node, node.target, *args, **node.kwargs))


def _is_expandable(work: _Work, node: fx.Node, small: Tensor) -> bool:
    """Whether all who read a result can do with a smaller one that is expanded."""
    wanted = result_of(node)
    if small.dtype != wanted.dtype or small.device != wanted.device or small.dim() != wanted.dim():
        return False
    if work.sizes(node, small) is None or alike(small.shape, wanted.shape):
        return False
    wide = work.computed(aten.expand.default, (small, wanted.shape), {})
    return wide is not None and all(_accepts(work, user, {node: wide}) for user in node.users)


def _expand_instead(work: _Work, node: fx.Node, small: fx.Node) -> None:
    users = list(node.users)
    wide = work.made(node, aten.expand.default, small, work.sizes(node, result_of(small)))
    node.replace_all_uses_with(wide)
    work.changed.update(users)
    work.edits += 1


def _unexpanded(work: _Work, arg: Any) -> Any:
    """What was expanded, without new dims."""
    while isinstance(arg, fx.Node) and name_of(arg) == "expand":
        source = arg.args[0]
        assert isinstance(source, fx.Node)
        if result_of(source).dim() != result_of(arg).dim():
            break
        arg = source
    return arg


def _accepts(work: _Work, user: fx.Node, instead: Mapping[fx.Node, Tensor]) -> bool:
    """Whether an operation's result, or all that is made of its view, stays as it is."""
    name = name_of(user)
    view = name in {"expand", "unsqueeze", "slice", "transpose", "permute"}
    attends = name == "scaled_dot_product_attention" and not any(
        arg in instead for arg in user.args[:3]
    )
    if not (view or attends or is_pointwise(user)):
        return False
    old, new = user.meta["val"], work.computed(user.target, user.args, user.kwargs, instead=instead)
    if not isinstance(new, Tensor) or not alike(old.shape, new.shape):
        return False
    if view:
        return all(_accepts(work, reader, {user: new}) for reader in user.users)
    return alike(old.stride(), new.stride())


def _split_loss(work: _Work, node: fx.Node) -> None:
    """Cross entropy of tokens, as sums over tokens that may be taken part by part."""
    logits, labels = node.args[:2]
    scores, classes = result_of(logits), result_of(labels)
    if (
        (scores.dim(), classes.dim(), classes.dtype) != (2, 1, torch.int64)
        or argument(node, "weight") is not None
        or argument(node, "label_smoothing", 0.0) != 0.0
    ):
        return
    ignored = argument(node, "ignore_index", -100)
    made: list[fx.Node] = []

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made.append(work.made(node, target, *args, **kwargs))
        return made[-1]

    if name_of(node) == "cross_entropy_loss":
        logits = add(aten.log_softmax.int, logits, 1)
    kept = add(aten.ne.Scalar, labels, ignored)
    places = add(aten.unsqueeze.default, add(aten.where.ScalarOther, kept, labels, 0), 1)
    picked = add(aten.squeeze.dim, add(aten.gather.default, logits, 1, places), 1)
    loss = add(aten.where.ScalarOther, kept, add(aten.neg.default, picked), 0.0)
    if argument(node, "reduction", 1) != 0:
        wide = torch.promote_types(scores.dtype, torch.float32)
        loss = add(aten.sum.default, loss, dtype=wide)
        if argument(node, "reduction", 1) == 1:
            count = add(aten.sum.default, kept)
            loss = add(aten.div.Tensor, loss, add(aten._to_copy.default, count, dtype=wide))
        if wide != scores.dtype:
            loss = add(aten._to_copy.default, loss, dtype=scores.dtype)
    if any(each.meta["val"] is None for each in made) or not work.replace(node, loss):
        for each in reversed(made):
            work.forget(each)


_REWRITES: Mapping[str, Rewrite] = table(
    ("clone _to_copy", _drop_copy),
    ("slice expand view", _drop_view),
    ("add", _drop_neutral(0)),
    ("sub", _drop_neutral(0, commutes=False)),
    ("mul", _drop_neutral(1)),
    ("div", _drop_neutral(1, commutes=False)),
    ("__and__ bitwise_and logical_and", _drop_neutral(True)),
    ("__or__ bitwise_or logical_or", _drop_neutral(False)),
    ("where", _drop_where),
    ("masked_fill", _drop_fill),
    ("scaled_dot_product_attention", _simplify_attention),
    ("baddbmm addmm", _shrink_unread),
    *((name, _split_loss) for name in _LOSSES),
)
