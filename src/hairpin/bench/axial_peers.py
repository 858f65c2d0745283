"""One Evoformer block by the two schemes that dynamic axial parallelism is compared with.

* FastFold's own order (Cheng et al. 2022; github.com/hpcaitech/FastFold, ``model/fastnn``): pairs
  turn four times, every operand that must be whole is gathered, and no row is padded here. As in
  its code, the pair bias is gathered behind the queries' projections, the outer product's operand
  behind the left one, triangle operands behind the gate, and ``m`` turns back behind the pair
  updates. Its public code adds up no gradient of what was gathered; here a reduce-scatter does,
  under way behind the same work (as in HelixFold's code).
* Megatron-style tensor parallelism, as the same paper compares with: every rank has ``m`` and ``z``
  whole; heads of attention and hidden channels of transitions are split, and every module's output
  is summed over the ranks. Triangle products and the outer product run whole on every rank. In the
  backward the sum of an input's gradient is under way while gradients of weights are computed.

Dims: s sequences, r residues, i and j residues of a pair, c channels, h heads.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hairpin import kernels
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link, Wait
from hairpin.planning.axial.way import Line

Module = Any
Masks = tuple[Tensor, Tensor]

# ------------------------------------------------------------------------------------- FastFold


def fastfold_block(
    block: Module, m: Tensor, z: Tensor, masks: Masks, way: Line
) -> tuple[Tensor, Tensor]:
    """``m[s, r, c]`` held along s and ``z[i, j, c]`` held along i, to the same."""
    msa_mask, pair_mask = masks
    row = block.msa_row_attention_with_pair_bias
    bias = way.whole(row.pair_bias(z), "h i j", "i")
    update = _attended(row.attention, row.query_norm(m), msa_mask[way.mine("s")], bias)
    m = way.turn(block.msa_dropout(update, m), "s r c", "s", "r").wait()
    name = "msa_column_global_attention" if block.extra else "msa_column_attention"
    own_mask = msa_mask[:, way.mine("r")]
    m = m + getattr(block, name)(m, own_mask)
    m = m + block.msa_transition(m)
    outer = block.outer_product_mean
    normed = outer.norm(m)
    right, _ = outer.right(normed, own_mask)
    coming = way.whole(right, "s r c", "r")
    back = way.turn(m, "s r c", "r", "s")
    left = outer.left(normed, own_mask)
    z = z + outer.update(left, (coming.wait(), msa_mask))
    return back.wait(), _fastfold_pairs(block.pair_stack, z, pair_mask, way)


def _fastfold_pairs(stack: Module, z: Tensor, mask: Tensor, way: Line) -> Tensor:
    """``z`` held along i, to the same, over j, i and j."""
    by_i, by_j = mask[way.mine("i")], mask[:, way.mine("j")]
    z = stack.dropout_row(_multiply(stack.triangle_multiplication_outgoing, z, by_i, way, "i"), z)
    z = way.turn(z, "i j c", "i", "j").wait()
    z = stack.dropout_row(_multiply(stack.triangle_multiplication_incoming, z, by_j, way, "j"), z)
    z = way.turn(z, "i j c", "j", "i").wait()
    z = stack.dropout_row(_around(stack.triangle_attention_starting_node, z, by_i, way), z)
    z = way.turn(z, "i j c", "i", "j").wait()
    ending = stack.triangle_attention_ending_node
    update = _around(ending, z.transpose(0, 1), by_j.T, way).transpose(0, 1)
    z = stack.dropout_column(update, z)
    z = z + stack.pair_transition(z)
    return way.turn(z, "i j c", "j", "i").wait()


def _multiply(module: Module, z: Tensor, mask: Tensor, way: Line, held: str) -> Tensor:
    """A triangle product whose ``z`` and result are held along the same dim."""
    z = module.norm(z)
    a, b = module.operands(z, mask)
    coming = way.whole(b, "i j c", held)
    gate = module.gating_linear(z)
    product = module.product(a, coming.wait())
    update = module.output_projection(module.center_norm(product))
    return kernels.gated_residual(update, gate=gate)


def _around(module: Module, z: Tensor, mask: Tensor, way: Line) -> Tensor:
    """Triangle attention of ``z[i, j, c]`` held along its first dim."""
    z = module.query_norm(z)
    bias = way.whole(module.pair_bias(z), "h i j", "i")
    return _attended(module.attention, z, mask, bias)


def _attended(attention: Module, x: Tensor, mask: Tensor, bias: Pending) -> Tensor:
    """Attention whose bias is awaited after queries, keys, values and the gate are there."""
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)).transpose(-2, -3)
        for layer in (attention.query, attention.key, attention.value)
    )
    gate = attention.gate(x)
    y = kernels.attention(q, k, v, mask=mask, bias=bias.wait()).transpose(-2, -3).flatten(-2)
    return attention.output(kernels.gated_residual(y, gate=gate))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------ tensor parallelism


class Adder:
    """Adds tensors over the ranks of an axis: by our own exchange, or by Gloo's all-reduce."""

    def __init__(self, way: Line, *, gloo: bool = False) -> None:
        self.link, self.gloo = Link(way.mesh, way.axis), gloo

    def start(self, x: Tensor) -> Wait:
        """Start adding contiguous ``x``, in place; 2 M (N-1)/N bytes sent per rank."""
        if self.link.size == 1:
            return _nothing
        if not self.gloo:
            return self.link.sum(x, what="an output is summed")
        sent = 2 * x.nbytes * (self.link.size - 1) // self.link.size
        self.link.mesh.traffic.bytes_sent += sent
        work = dist.all_reduce(x, group=self.link.mesh.group(self.link.axis), async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait


def _nothing() -> None:
    """Done already."""


class TensorParallel:
    """A block whose heads and hidden channels are split over the ranks of an axis."""

    def __init__(self, way: Line, *, gloo: bool = False) -> None:
        self.way, self.adder = way, Adder(way, gloo=gloo)

    def block(self, block: Module, m: Tensor, z: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """``m[s, r, c], z[i, j, c]``, whole on every rank, to the same."""
        msa_mask, pair_mask = masks
        row, column = block.msa_row_attention_with_pair_bias, block.msa_column_attention
        update = self._attend(row.attention, row.query_norm(m), msa_mask, row.pair_bias(z))
        m = block.msa_dropout(update, m)
        columns = column.query_norm(m.transpose(0, 1))
        m = m + self._attend(column.attention, columns, msa_mask.T, None).transpose(0, 1)
        m = m + self._transition(block.msa_transition, m)
        z = z + block.outer_product_mean(m, msa_mask)
        stack = block.pair_stack
        z = stack.dropout_row(stack.triangle_multiplication_outgoing(z, pair_mask), z)
        z = stack.dropout_row(stack.triangle_multiplication_incoming(z, pair_mask), z)
        starting, ending = (
            stack.triangle_attention_starting_node,
            stack.triangle_attention_ending_node,
        )
        z = stack.dropout_row(self._triangle(starting, z, pair_mask), z)
        update = self._triangle(ending, z.transpose(0, 1), pair_mask.T).transpose(0, 1)
        z = stack.dropout_column(update, z)
        return m, z + self._transition(stack.pair_transition, z)

    def _triangle(self, module: Module, z: Tensor, mask: Tensor) -> Tensor:
        z = module.query_norm(z)
        return self._attend(module.attention, z, mask, module.pair_bias(z))

    def _attend(self, attention: Module, x: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        """Attention by this rank's heads, summed."""
        way = _with(self.way, h=attention.heads)
        heads = way.mine("h")
        of_head = attention.query.weight.shape[0] // attention.heads
        own = slice(heads.start * of_head, heads.stop * of_head)
        layers = (attention.query, attention.key, attention.value, attention.gate)
        weight = torch.cat([layer.weight[own] for layer in layers])
        y = _Split.apply(x, weight, self.adder)
        q, k, v, gate = y.chunk(4, -1)
        q, k, v = (t.unflatten(-1, (-1, of_head)).transpose(-2, -3) for t in (q, k, v))
        if bias is not None:
            bias = _OwnHeads.apply(bias, way)
        y = kernels.attention(q, k, v, mask=mask, bias=bias).transpose(-2, -3).flatten(-2)
        y = kernels.gated_residual(y, gate=gate + attention.gate.bias[own])
        return self._summed(attention.output, y, own)

    def _transition(self, module: Module, x: Tensor) -> Tensor:
        """A transition by this rank's hidden channels, summed."""
        way = _with(self.way, c=module.linear_1.weight.shape[0])
        own = way.mine("c")
        hidden = _Split.apply(module.norm(x), module.linear_1.weight[own], self.adder)
        return self._summed(module.linear_2, F.relu(hidden + module.linear_1.bias[own]), own)

    def _summed(self, layer: Module, x: Tensor, own: slice) -> Tensor:
        y: Tensor = _Summed.apply(x @ layer.weight[:, own].T, self.adder)
        return y + layer.bias  # type: ignore[no-any-return]


def _with(way: Line, **lengths: int) -> Line:
    return replace(way, lengths={**way.lengths, **lengths})


class _Split(torch.autograd.Function):
    """``x @ weight.T`` by this rank's rows of a weight; the gradient of x is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, adder: Adder) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.adder = adder
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x = (grad @ weight).contiguous()
        wait = ctx.adder.start(of_x)
        of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        wait()
        return of_x, of_weight, None


class _OwnHeads(torch.autograd.Function):
    """This rank's heads of a bias ``[h, q, k]`` that all ranks have; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, way: Line) -> Tensor:
        ctx.way = way
        return bias[way.mine("h")]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.whole(grad.contiguous(), "h q k", "h").wait(), None


class _Summed(torch.autograd.Function):
    """The sum over the ranks, from which all go on alike: its gradient is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adder: Adder) -> Tensor:
        ctx.mark_dirty(x)
        adder.start(x)()
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
