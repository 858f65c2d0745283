"""The body of a loop as its backward computes it again: without what no gradient asks for.

Two things differ from the body that runs forward. A product whose result only adds to the loop's
results is not computed, since its gradient does not depend on it: its place is taken by a tensor of
that shape without room (a *hollow* one). And gradients of weights that every turn takes whole are
added to their totals inside the product that makes them, so that no turn holds a second copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hairpin.planning.masks import keyed_dropout

_PRODUCTS = frozenset({torch.ops.aten.linear.default, torch.ops.aten.addmm.default})
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
    }
)


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


def _only_weight(node: fx.Node) -> bool:
    """Whether an input serves products as their weight or bias (of one dim), and nothing else."""
    value = node.meta.get("val")
    return bool(node.users) and all(
        user.target in _PRODUCTS
        and not user.kwargs
        and (
            _operands(user)[1] is node
            or (_operands(user)[2] is node and isinstance(value, Tensor) and value.dim() == 1)
        )
        and _operands(user)[0] is not node
        for user in node.users
    )


def _hollow(graph: fx.Graph) -> set[fx.Node]:
    """Results that only end in sums and outputs: nobody's gradient depends on their values."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        target = node.target
        fine = target in _PRODUCTS | _PASSING or (target in _SUMS and _plain_sum(node))
        if fine and not node.kwargs and all(_no_value(user, found) for user in node.users):
            found.add(node)
    return found


def _no_value(user: fx.Node, hollow: set[fx.Node]) -> bool:
    if user.op == "output":
        return True
    return user in hollow and user.target not in _PRODUCTS


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
            total = totals.found.get(weight_place)
            if total is None:
                totals.found[weight_place] = left @ right
            else:
                total.addmm_(left, right)
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
