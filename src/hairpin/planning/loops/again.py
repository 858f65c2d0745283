"""The body of a loop as its backward computes it again: without what no gradient asks for.

Two things differ from the body that runs forward. A product whose result only adds to the loop's
results is not computed, since its gradient does not depend on it: its place is taken by a tensor of
that shape without room (a *hollow* one). And gradients of weights that every turn takes whole are
added to their totals inside the product that makes them, so that no turn holds a second copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hairpin.graph.lengths import alike
from hairpin.planning.loops.masks import keyed_dropout

_PRODUCTS = frozenset({torch.ops.aten.linear.default, torch.ops.aten.addmm.default})
_BATCHED = frozenset({torch.ops.aten.matmul.default, torch.ops.aten.bmm.default})
_SUMS = frozenset({torch.ops.aten.add.Tensor})
_PASSING = frozenset(
    {
        keyed_dropout,  # its gradient needs its mask alone
        torch.ops.aten.view.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.unsqueeze.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.clone.default,
    }
)
_COPIES = frozenset({torch.ops.aten.clone.default})


@dataclass(eq=False)
class Totals:
    """Gradients that are added up over the turns of a backward.

    Attributes:
        wanted: places of the loop's inputs that need a gradient.
        found: place -> its total so far.
        anchor: makes the products part of the way back where only their weights are.
    """

    wanted: frozenset[int]
    found: dict[int, Tensor] = field(default_factory=dict)
    anchor: Tensor | None = None

    def add_product(self, place: int, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, matrices or batches of them, to the total at a place."""
        total = self.found.get(place)
        if total is None:
            self.found[place] = left @ right
        elif left.dim() == 2:
            total.addmm_(left, right)
        else:
            one, other = (x.reshape(-1, *x.shape[-2:]) for x in (left, right))
            total.view(-1, *total.shape[-2:]).baddbmm_(one, other)


@dataclass(frozen=True, eq=False)
class Again:
    """A body for the backward: it takes a :class:`Totals`, then what the body takes.

    Attributes:
        summed: places of the inputs whose gradients go to the totals, not through autograd.
    """

    body: fx.GraphModule
    summed: frozenset[int]


def again(body: fx.GraphModule, cuts: Sequence[Any], before: int) -> Again:
    """Write the body for the backward.

    Args:
        cuts: of the body's inputs; None where every turn takes the whole.
        before: inputs of the body ahead of those.
    """
    places = {
        node: place - before
        for place, node in enumerate(n for n in body.graph.nodes if n.op == "placeholder")
    }
    whole = {node for node, place in places.items() if place >= 0 and cuts[place] is None}
    summed = {node for node in whole if _only_weight(node)}
    hollow = _hollow(body.graph)
    graph = fx.Graph()
    totals = graph.placeholder("totals")
    made: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        if node.target in _PRODUCTS and not node.kwargs:
            left, weight, bias = _operands(node)
            transposed = node.target is torch.ops.aten.linear.default
            args = (totals, transposed, node in hollow)
            to = tuple(places[x] if x in summed else None for x in (weight, bias))
            tensors = tuple(None if x is None else made[x] for x in (left, weight, bias))
            made[node] = graph.call_function(product, (*args, *to, *tensors))
        elif _is_batched(node):
            to = tuple(places[x] if x in summed else None for x in node.args)
            pair = (made[x] for x in node.args)
            made[node] = graph.call_function(batched, (totals, node in hollow, *to, *pair))
        elif node.target in _COPIES and node in hollow:
            made[node] = made[node.args[0]]
        elif node.target in _SUMS and node in hollow:
            made[node] = graph.call_function(hollow_sum, tuple(made[x] for x in node.args))
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    return Again(fx.GraphModule(nn.Module(), graph), frozenset(places[x] for x in summed))


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Rows, weight and bias of a product."""
    if node.target is torch.ops.aten.linear.default:
        return (*node.args, None)[:3]  # type: ignore[return-value]
    bias, left, weight = node.args
    return left, weight, bias


def _is_batched(node: fx.Node) -> bool:
    """Whether a step is a product of two batches of matrices, of the same length."""
    if node.target not in _BATCHED or node.kwargs:
        return False
    left, right = (x.meta.get("val") for x in node.args)  # type: ignore[union-attr]
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dim() < 3:
        return False
    return alike(left.shape[:-2], right.shape[:-2])


def _only_weight(node: fx.Node) -> bool:
    """Whether an input is whole in products, as weight, bias (of one dim) or matrices, only."""
    return bool(node.users) and all(_weighs(node, user) for user in node.users)


def _weighs(node: fx.Node, user: fx.Node) -> bool:
    if _is_batched(user):
        return sum(x is node for x in user.args) == 1
    if user.target not in _PRODUCTS or user.kwargs:
        return False
    left, weight, bias = _operands(user)
    value = node.meta.get("val")
    flat = isinstance(value, Tensor) and value.dim() == 1
    return left is not node and (weight is node or (bias is node and flat))


def _hollow(graph: fx.Graph) -> set[fx.Node]:
    """Results that only end in sums and outputs: nobody's gradient depends on their values."""
    found: set[fx.Node] = set()

    def valueless(user: fx.Node) -> bool:
        return user.op == "output" or (user in found and not is_product(user))

    for node in reversed(graph.nodes):
        if is_hollow(node, valueless):
            found.add(node)
    return found


def is_hollow(node: fx.Node, valueless: Callable[[fx.Node], bool]) -> bool:
    """Whether a loop's backward can do without the value of a step.

    Args:
        valueless: whether a reader of it can do without, too.
    """
    target = node.target
    dropped = str(getattr(target, "overloadpacket", "")) == "aten.dropout"  # to be keyed
    fine = target in _PRODUCTS | _PASSING or dropped or _is_batched(node)
    fine = fine or (target in _SUMS and _plain_sum(node))
    bare = not node.kwargs or target in _COPIES
    return fine and bare and all(valueless(user) for user in node.users)


def is_product(node: fx.Node) -> bool:
    """Whether a step multiplies matrices in a way that can be left out."""
    return node.target in _PRODUCTS | _BATCHED


def _plain_sum(node: fx.Node) -> bool:
    """Whether a sum is of two tensors of the type that it has itself."""
    values = [x.meta.get("val") for x in (*node.args, node) if isinstance(x, fx.Node)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return len(tensors) == 3 and len({tensor.dtype for tensor in tensors}) == 1


def product(  # noqa: PLR0917 - called by graphs, by place
    totals: Totals,
    transposed: bool,  # noqa: FBT001
    hollow: bool,  # noqa: FBT001
    weight_place: int | None,
    bias_place: int | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``x @ weight.T + bias`` (or ``x @ weight``), gradients of its weights added to the totals."""
    out: Tensor = _Product.apply(
        totals.anchor, totals, (transposed, hollow, weight_place, bias_place), x, weight, bias
    )
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, anchor: Any, totals: Totals, how: Any, x: Tensor, weight: Tensor, bias: Any
    ) -> Tensor:
        ctx.totals, ctx.how = totals, how
        transposed, hollow = how[:2]
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = None if bias is None else bias.shape
        if hollow:
            width = weight.shape[0] if transposed else weight.shape[1]
            return x.new_empty(()).expand(*x.shape[:-1], width)
        if transposed:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        transposed, _, weight_place, bias_place = ctx.how
        totals: Totals = ctx.totals
        rows, across = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        found: list[Any] = [None, None, None]
        left, right = (across.t(), rows) if transposed else (rows.t(), across)
        if weight_place in totals.wanted:
            totals.add_product(weight_place, left, right)
        elif ctx.needs_input_grad[4]:
            found[1] = left @ right
        if bias_place in totals.wanted or ctx.needs_input_grad[5]:
            found[2] = across.sum(0).sum_to_size(ctx.bias_shape)
        if bias_place in totals.wanted:
            total = totals.found.get(bias_place)
            if total is None:
                totals.found[bias_place] = found[2]
            else:
                total.add_(found[2])
            found[2] = None
        if ctx.needs_input_grad[3]:
            found[0] = (across @ (weight if transposed else weight.t())).view(x.shape)
        return (None, None, None, *found)


def batched(  # noqa: PLR0917 - called by graphs, by place
    totals: Totals,
    hollow: bool,  # noqa: FBT001
    left_place: int | None,
    right_place: int | None,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    """``left @ right`` of batches of matrices, gradients of whole ones added to the totals."""
    how = (hollow, left_place, right_place)
    out: Tensor = _Batched.apply(totals.anchor, totals, how, left, right)
    return out


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, anchor: Any, totals: Totals, how: Any, left: Tensor, right: Tensor
    ) -> Tensor:
        ctx.totals, ctx.how = totals, how
        ctx.save_for_backward(left, right)
        if how[0]:
            return left.new_empty(()).expand(*left.shape[:-1], right.shape[-1])
        return left @ right

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        left, right = ctx.saved_tensors
        _, left_place, right_place = ctx.how
        totals: Totals = ctx.totals
        found: list[Any] = [None, None]
        if right_place in totals.wanted:
            totals.add_product(right_place, left.mT, grad)
        elif ctx.needs_input_grad[4]:
            found[1] = left.mT @ grad
        if left_place in totals.wanted:
            totals.add_product(left_place, grad, right.mT)
        elif ctx.needs_input_grad[3]:
            found[0] = grad @ right.mT
        return (None, None, None, *found)


def hollow_sum(one: Tensor, other: Tensor) -> Tensor:
    """A sum whose value nobody looks at."""
    out: Tensor = _HollowSum.apply(one, other)
    return out


class _HollowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        ctx.shapes = one.shape, other.shape
        shape = torch.broadcast_shapes(one.shape, other.shape)
        return one.new_empty(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return tuple(
            grad.sum_to_size(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )
