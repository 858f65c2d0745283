"""The axes of operations: every one against the operation run on parts, and none forgotten.

Expected axes are written ``a0b0>1``: dim 0 of inputs a and b is dim 1 of the output; ``a1*2>0``
has two elements a position; ``a0>0,1`` names two outputs, ``>0,_`` leaves the second out; ``a1b0+``
sums; ``>0`` needs no input.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

from hairpin.graph import axes as module
from hairpin.graph.axes import (
    Axis,
    Operation,
    Span,
    TensorRef,
    axes,
    composite,
    has_rule,
    operation,
)
from hairpin.graph.axis_labels import labelled

aten = torch.ops.aten
LENGTHS = ("size", "shape", "sizes")


def x(*shape, seed=0):
    """Random numbers."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)), dtype=torch.float64
    )


def i(*shape, below=3):
    """Random positions."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def b(*shape):
    """Random truths."""
    return x(*shape) > 0


@dataclass(frozen=True)
class Call:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.func)

    def run(self):
        result = self.func(*self.args, **self.kwargs)
        return result if isinstance(result, (list, tuple)) else [result]

    def axes(self) -> tuple[Axis, ...]:
        return axes(operation(self.func, self.args, self.kwargs, self.run()))

    def part(self, axis: Axis, start: int, stop: int):
        """The outputs on part ``[start, stop)`` of an axis."""
        place = iter(range(100))

        def cut(tensor: Tensor) -> Tensor:
            span = axis.inputs.get(next(place))
            if span is None:
                return tensor
            return tensor.narrow(span.dim, start * span.unit, (stop - start) * span.unit)

        args, kwargs = tree_map_only(Tensor, cut, (self.args, self.kwargs))
        args = list(args)
        for at, argument in enumerate(self.func._schema.arguments[: len(args)]):
            if argument.name in LENGTHS and isinstance(args[at], list) and 0 in axis.outputs:
                span = axis.outputs[0]
                lengths = list(args[at])
                offset = args[at - 1] if argument.name == "sizes" else 0
                if 0 <= span.dim - offset < len(lengths):
                    lengths[span.dim - offset] = (stop - start) * span.unit
                args[at] = lengths
            elif argument.name == "N":
                args[at] = stop - start
        return Call(self.func, tuple(args), kwargs).run()


def written(axis: Axis, outputs: int) -> str:
    def term(span):
        return f"{span.dim}" + (f"*{span.unit}" if span.unit > 1 else "")

    left = "".join(f"{'abcdefghij'[at]}{term(span)}" for at, span in axis.inputs.items())
    if axis.sums:
        return left + "+"
    spans = [axis.outputs.get(at) for at in range(outputs)]
    if len({term(s) if s else "_" for s in spans}) == 1:
        spans = spans[:1]
    return left + ">" + ",".join(term(span) if span else "_" for span in spans)


def length(axis: Axis, call: Call, outputs) -> int:
    """Number of positions along an axis."""
    tensors = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    counts = {tensors[at].shape[span.dim] / span.unit for at, span in axis.inputs.items()}
    counts |= {outputs[at].shape[span.dim] / span.unit for at, span in axis.outputs.items()}
    (count,) = counts
    assert count == int(count)
    return int(count)


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.dtype.is_floating_point or want.dtype.is_complex:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    else:
        assert torch.equal(got, want)


def assert_right(call: Call, axis: Axis) -> None:
    """Running on uneven parts gives what running on the whole gives."""
    outputs = call.run()
    count = length(axis, call, outputs)
    bounds = sorted({0, 1, 1 + 2 * (count - 1) // 3, count})
    parts = [call.part(axis, *pair) for pair in pairwise(bounds)]
    assert len(parts) >= 2
    for at, want in enumerate(outputs):
        pieces = [part[at] for part in parts]
        if axis.sums:
            same(torch.stack(pieces).sum(0).to(want.dtype), want)
        elif at in axis.outputs and "empty" in call.name:
            assert torch.cat(pieces, axis.outputs[at].dim).shape == want.shape
        elif at in axis.outputs:
            same(torch.cat(pieces, axis.outputs[at].dim), want)


def products():
    yield "a0>0 a1>1 a2b1+ b0>2", aten.linear.default, x(3, 5, 4), x(7, 4)
    yield "a0>0 a1>1 b0c0>2", aten.linear.default, x(3, 5, 4), x(7, 4), x(7)
    yield "a0b1+ b0>0", aten.linear.default, x(4), x(7, 4)
    yield "a0>0 a1b0+ b1>1", aten.mm.default, x(3, 4), x(4, 5)
    yield "a0b0>0 a1>1 a2b1+ b2>2", aten.bmm.default, x(2, 3, 4), x(2, 4, 5)
    yield "a0c1>1 b0>0", aten.addmm.default, x(5), x(3, 4), x(4, 5)
    yield "a0b0>0 c1>1", aten.addmm.default, x(3, 1), x(3, 4), x(4, 5)
    yield "a0b0>0 a1c1>1", aten.addmm.default, x(3, 5), x(3, 4), x(4, 5), {"beta": 2, "alpha": 0.5}
    yield "a0b0c0>0 b1>1 a2c2>2", aten.baddbmm.default, x(2, 1, 5), x(2, 3, 4), x(2, 4, 5)
    yield "a0c2>2 b0c0>0 b1>1", aten.baddbmm.default, x(5), x(2, 3, 4), x(2, 4, 5)
    yield "a0b1>0 a1c2>1", aten.addbmm.default, x(3, 5), x(2, 3, 4), x(2, 4, 5)
    yield "a0>0 a1b0+", aten.mv.default, x(3, 4), x(4)
    yield "a0b0>0", aten.addmv.default, x(3), x(3, 4), x(4)
    yield "a0b0+", aten.dot.default, x(5), x(5, seed=1)
    yield "a0b0+", aten.vdot.default, x(5), x(5, seed=1)
    yield "a0>0 b0>1", aten.outer.default, x(3), x(5)
    yield "a0>0 b0>1", aten.ger.default, x(3), x(5)
    yield "a0b0>0 a1c0>1", aten.addr.default, x(3, 5), x(3), x(5)
    yield "a0b0>0 a1c1+ b1c2+ c0>1", aten.bilinear.default, x(6, 3), x(6, 4), x(5, 3, 4)
    yield "a0b0>0 c0d0>1", aten.bilinear.default, x(6, 3), x(6, 4), x(5, 3, 4), x(5)
    yield "a0b0>0 a1>1 b1>2", aten.cdist.default, x(2, 5, 3), x(2, 7, 3)
    yield "a0>0 b0>1", aten._cdist_forward.default, x(5, 3), x(7, 3), 2.0, 1
    yield "a0b0+", aten.matmul.default, x(4), x(4, seed=1)
    yield "a0>0 a1b0+", aten.matmul.default, x(3, 4), x(4)
    yield "a0b0+ b1>0", aten.matmul.default, x(4), x(4, 5)
    yield "a0>0 a1b0+ b1>1", aten.matmul.default, x(3, 4), x(4, 5)
    yield "a0>0 a1>1 a2b0+ b1>2", aten.matmul.default, x(6, 3, 4), x(4, 5)
    yield "a0>1 a1b1+ b0>0 b2>2", aten.matmul.default, x(3, 4), x(6, 4, 5)
    yield "a0>0 a1>1 a2b0+", aten.matmul.default, x(6, 3, 4), x(4)
    yield "a0b1+ b0>0 b2>1", aten.matmul.default, x(4), x(6, 4, 5)
    yield "a0>0 b0>1 a2>2 a3b1+ b2>3", aten.matmul.default, x(2, 1, 3, 4), x(6, 4, 5)
    yield "a0b0>0 a1b1>1 a2>2 a3b2+ b3>3", aten.matmul.default, x(2, 6, 3, 4), x(2, 6, 4, 5)
    yield "a0b0>0 a1b1>1 a2>2 b3>3", aten.matmul.default, x(2, 6, 3, 1), x(2, 6, 1, 5)
    yield "a0>0 a1b0+ b1>1", aten.linalg_matmul.default, x(3, 4), x(4, 5)
    yield (
        "a0b0+ a1>0 a2>2 b1>1 b2>3",
        aten.einsum.default,
        "sic,sjd->ijcd",
        [x(4, 3, 5), x(4, 6, 2)],
    )
    yield "a0>0 a1b1+ a2b2>2 b0>1", aten.einsum.default, "ikc,jkc->ijc", [x(3, 4, 5), x(6, 4, 5)]
    yield "a0>0 a1b0+ b1>1", aten.einsum.default, "ij,jk", [x(3, 4), x(4, 5)]
    yield "a0b1+ a1>1 b0>0", aten.einsum.default, "kj,ik", [x(4, 5), x(3, 4)]
    yield "b1>0", aten.einsum.default, "ii,ij->j", [x(4, 4), x(4, 5)]
    yield "a2>1", aten.einsum.default, "iij->ij", [x(3, 3, 5)]
    yield (
        "a0>0 a1b0>1 a2>2 a3b2+ b1>3",
        aten.einsum.default,
        "...id,...jd->...ij",
        [x(2, 6, 3, 4), x(6, 5, 4)],
    )
    yield "a0b1>0 a1b2>1 a2b0+", aten.einsum.default, "...i,i...", [x(2, 6, 3), x(3, 2, 6)]
    yield "a0>0 a1+ a2>1", aten.einsum.default, "b...i->bi", [x(2, 6, 3)]
    yield "a0>0 a1b0+ b1c0+ c1>1", aten.einsum.default, "ij,jk,kl->il", [x(3, 4), x(4, 5), x(5, 6)]
    yield "b0+ a1b1+", aten.einsum.default, "ij,ij->", [x(1, 4), x(3, 4)]
    q, k = x(2, 4, 5, 8), x(2, 4, 7, 8)
    yield "a0b0c0>0 a1b1c1>1 a2>2", aten.scaled_dot_product_attention.default, q, k, k
    yield "a0b0c0>0 a1b1c1>1", aten.scaled_dot_product_attention.default, q, k, k, None, 0.0, True
    yield "a0b0c0>0 a1b1c1>1 a2d0>2", aten.scaled_dot_product_attention.default, q, k, k, x(5, 7)
    yield (
        "a0b0c0d0>0 a1b1c1>1 a2d2>2",
        aten.scaled_dot_product_attention.default,
        q,
        k,
        k,
        x(2, 1, 5, 7),
    )
    yield "a0b0c0>0 a1b1c1d0>1 a2>2", aten.scaled_dot_product_attention.default, q, k, k, x(4, 1, 7)
    yield (
        "a0b0c0d0>0 a1b1c1d1>1 a2d2>2",
        aten.scaled_dot_product_attention.default,
        q,
        k,
        k,
        b(2, 4, 5, 7),
    )
    yield "", aten.scaled_dot_product_attention.default, q, k, k, None, 0.5
    yield (
        "a0b0c0>0 a1>1",
        aten.scaled_dot_product_attention.default,
        x(3, 5, 8),
        x(3, 7, 8),
        x(3, 7, 8),
    )
    yield "a0>0", aten.scaled_dot_product_attention.default, x(5, 8), x(7, 8), x(7, 8)
    gqa = {"enable_gqa": True}
    few, one, wide = x(2, 2, 7, 8), x(2, 1, 7, 8), x(2, 6, 5, 8)
    yield (
        "a0b0c0>0 a1*3b1c1>1*3 a2>2",
        aten.scaled_dot_product_attention.default,
        wide,
        few,
        few,
        gqa,
    )
    yield (
        "a0b0c0>0 a1*3b1c1d0*3>1*3 a2d1>2",
        aten.scaled_dot_product_attention.default,
        wide,
        few,
        few,
        x(6, 5, 7),
        gqa,
    )
    yield (
        "a0b0c0d0>0 a1*3b1c1>1*3 a2d2>2",
        aten.scaled_dot_product_attention.default,
        wide,
        few,
        few,
        x(2, 1, 5, 7),
        gqa,
    )
    yield "a0b0c0>0 a1>1 a2>2", aten.scaled_dot_product_attention.default, q, one, one, gqa
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    yield "a0b0c0>0 a1b1c1>1 a2>2", flash, q, k, k
    yield "a0b0c0>0 a1b1c1>1", flash, q, k, k, 0.0, True
    yield "a0b0c0d0>0 a1b1c1>1 a2d2>2", flash, q, k, k, {"attn_mask": x(2, 1, 5, 7)}
    yield (
        "a0b0c0>0 a1b1c1>1 a2d0>2",
        aten._scaled_dot_product_attention_math.default,
        q,
        k,
        k,
        x(5, 7),
    )


def elements():
    yield "a0>0 a1b0>1", aten.add.Tensor, x(3, 5), x(5)
    yield "a0b0>0 a1>1", aten.add.Tensor, x(3, 5), x(3, 1)
    yield "a0>0 b0>1 a2>2", aten.mul.Tensor, x(3, 1, 5), x(4, 1)
    yield "a0>0 a1>1", aten.mul.Tensor, x(3, 5), torch.tensor(2.0)
    yield "a0>0 a1>1", aten.mul.Scalar, x(3, 5), 2
    yield "a0>0 a1b0>1", aten.mul.Tensor, torch.complex(x(3, 5), x(3, 5)), torch.complex(x(5), x(5))
    yield "a0>0 a1b0>1", aten.rsub.Tensor, x(3, 5), x(5)
    yield "a0>0 a1>1", aten.gelu.default, x(3, 5)
    yield "a0>0", aten.silu.default, x(5)
    yield "a0c0>0 a1b0>1", aten.clamp.Tensor, x(3, 5), x(5), x(3, 1)
    yield "a0b0>0 b1c0>1", aten.where.self, b(3, 1), x(3, 5), x(5)
    yield "a0b0>0 a1b1>1", aten.where.ScalarOther, b(3, 5), x(3, 5), 0
    yield "", aten.where.default, b(5)
    yield "a0>0 a1b0>1 a2b1>2", aten.masked_fill.Scalar, x(2, 3, 5), b(3, 5), 0
    yield (
        "a0b0>0 a1>1",
        aten.masked_fill.Tensor,
        x(3, 5),
        b(3, 1),
        torch.tensor(1.0, dtype=torch.float64),
    )
    yield "a0c0>0 a1b0>1", aten.lerp.Tensor, x(3, 5), x(5), x(3, 1)
    yield "a0c0>0 a1b0>1", aten.addcmul.default, x(3, 5), x(5), x(3, 1)
    yield "a0>0 a1b0>1", aten.eq.Tensor, x(3, 5), x(5)
    yield "a0>0 a1>1", aten.logical_not.default, b(3, 5)
    yield "a0>0 b0>1", aten.bitwise_and.Tensor, b(3, 1), b(5)
    yield "a0>0 b0>1", aten.__and__.Tensor, b(3, 1), b(5)
    yield "a0>0 a1>1", aten._to_copy.default, x(3, 5), {"dtype": torch.float32}
    yield "a0>0 a1>1", aten.to.dtype, x(3, 5), torch.float32
    yield "a0>0 a1>1", aten.to.other, x(3, 5), x(3, 5)
    yield "a0>0 a1>1", aten.type_as.default, x(3, 5), x(3, 5)
    yield "a0>0 a1>1", aten.clone.default, x(3, 5)
    yield "a0>0 a1>1", aten.contiguous.default, x(3, 5)
    yield "a0>0 a1b0>1", aten.copy.default, x(3, 5), x(5)
    yield "a0>0 a1>1", aten.fill.Scalar, x(3, 5), 2
    yield "a0>0 a1>1", aten.dropout.default, x(3, 5), 0.0, True
    yield "a0>0 a1>1", aten.native_dropout.default, x(3, 5), 0.5, False
    yield "", aten.rrelu.default, x(3, 5)
    yield "", aten.bernoulli.default, x(3, 5).sigmoid()
    yield "a0>0 a1b0>1 a2>2", aten.prelu.default, x(2, 3, 5), x(3)
    yield "a0>0 a1>1 a2>2", aten.prelu.default, x(2, 3, 5), x(1)
    yield "a0>0", aten.prelu.default, x(5), x(1)
    yield "a0>0 a1b0>1", aten._prelu_kernel.default, x(3, 5), x(5)
    yield "a0>0 a1b0>1", aten.max.other, x(3, 5), x(5)
    yield "a0>0 a1b0>1", aten.complex.default, x(3, 5), x(5)
    yield "a0>0 a1>1", aten.view_as_real.default, torch.complex(x(3, 5), x(3, 5))
    yield "a0>0 a1>1", aten.view_as_complex.default, x(3, 5, 2)
    yield "a0>0 b0>1", aten.broadcast_tensors.default, [x(3, 1), x(5)]
    yield "a0b1>1 b2>2 b0>0", aten.expand_as.default, x(3, 1), x(2, 3, 5)
    yield "a0>0 a1>1", aten.zeros_like.default, x(3, 5)
    yield "a0>0 a1>1", aten.full_like.default, x(3, 5), 2
    yield ">0 >1", aten.full.default, [3, 5], 2
    yield ">0 >1", aten.zeros.default, [3, 5]
    yield ">0", aten.ones.default, [5]
    yield ">0 >1", aten.empty.memory_format, [3, 5]
    yield ">0 >1", aten.new_zeros.default, x(4), [3, 5]
    yield ">0 >1", aten.new_full.default, x(4), [3, 5], 2
    yield "", aten.scalar_tensor.default, 2.0
    yield "", aten.arange.default, 5
    yield "a0>0 a1>1", aten.frexp.Tensor, x(3, 5)


def views():
    yield "a0>0*5", aten.view.default, x(3, 5), [15]
    yield "a0*5>0", aten.view.default, x(15), [3, 5]
    yield "a0>0*3 a2>1*5", aten.view.default, x(2, 3, 4, 5), [6, 20]
    yield "a0*3>0 a1*5>2", aten.view.default, x(6, 20), [2, 3, -1, 5]
    yield "a0>0 a1>1*4", aten.view.default, x(2, 3, 4), [2, 12]
    yield "a0>0 a1*4>1", aten.view.default, x(2, 12), [2, 3, 4]
    yield "a0*3>0*2", aten.view.default, x(6, 4), [4, 6]
    yield "a0*3>0", aten.view.default, x(12, 2), [4, 6]
    yield "a0>1 a2>2", aten.view.default, x(3, 1, 5), [1, 3, 5, 1]
    yield "a0>0*3 a3>2", aten.view.default, x(2, 3, 1, 5), [6, 1, 5]
    yield "a1>0", aten.view.default, x(1, 6), [6]
    yield "", aten.view.default, x(0, 3), [0, 3]
    yield "", aten.view.default, x(1), []
    yield "a0>0 a1>1", aten.view.dtype, x(3, 5), torch.int64
    yield "", aten.view.dtype, x(3, 5), torch.int32
    yield "a0>0 a1>1*5", aten.reshape.default, x(2, 3, 5), [2, 15]
    yield "a0*3>0 a1>2", aten._unsafe_view.default, x(6, 5), [2, 3, 5]
    yield "a0>0 a1>1*5", aten.flatten.using_ints, x(2, 3, 5), 1
    yield "a0>0 a1*3>1 a2>3", aten.unflatten.int, x(4, 6, 5), 1, [2, 3]
    yield "a0*3b0>0 a1b2>2", aten.view_as.default, x(6, 5), x(2, 3, 5)
    yield "", aten.squeeze.default, x(3, 1, 5, 1)
    yield "a0>0 a2>1", aten.squeeze.dim, x(3, 1, 5), 1
    yield "a0>0 a2>1", aten.squeeze.dims, x(3, 1, 5, 1), [1, 3]
    yield "a0>0 a1>1", aten.unsqueeze.default, x(3, 5), -1
    yield "a0>1 a1>2", aten.unsqueeze.default, x(3, 5), 0
    yield "a0>1 a1>2 a2>0", aten.permute.default, x(2, 3, 5), [2, 0, -2]
    yield "a0>2 a1>1 a2>0", aten.transpose.int, x(2, 3, 5), 0, -1
    yield "a0>1 a1>0", aten.t.default, x(3, 5)
    yield "a0>0", aten.t.default, x(5)
    yield "a0>1 a1>0 a2>2", aten.swapaxes.default, x(2, 3, 5), 0, 1
    yield "a0>2 a1>0 a2>1", aten.movedim.int, x(2, 3, 5), 0, -1
    yield "a0>3 a1>0 a2>1 a3>2", aten.movedim.intlist, x(2, 3, 5, 4), [0, 1], [3, 0]
    yield "a0>0 a1>2 a2>1", aten.mT.default, x(2, 3, 5)
    yield "a0>1 a1>0", aten.numpy_T.default, x(3, 5)
    yield "a0>1 a1>2 a2>0", aten.permute_copy.default, x(2, 3, 5), [2, 0, 1]
    yield "a0>1 >2 a2>3 >0", aten.expand.default, x(3, 1, 5), [2, 3, 4, -1]
    yield ">0", aten.expand.default, x(1), [4]
    yield "a0>1 >0", aten.broadcast_to.default, x(5), [3, 5]
    yield "a0>0", aten.slice.Tensor, x(3, 5), 1, 1, 4
    yield "a0>0 a1>1", aten.slice.Tensor, x(3, 5), 1, 0, 9223372036854775807
    yield "a0>0 a1>1", aten.slice.Tensor, x(3, 5), -2, 0, 3
    yield "a0>0", aten.slice.Tensor, x(3, 5), 1, 0, 5, 2
    yield "a0>0", aten.narrow.default, x(3, 5), 1, 1, 3
    yield "a0>0", aten.narrow.default, x(3, 5), 1, 0, 5
    yield "a0>0 a2>1", aten.select.int, x(2, 3, 5), -2, 1
    yield "a0>0 a2>1", aten.unbind.int, x(2, 3, 5), 1
    yield "a1>0", aten.diagonal.default, x(3, 4, 5), 0, 0, 2
    yield "a0>0", aten.unfold.default, x(3, 9), 1, 3, 2
    yield "a0>0 a1*3>1", aten.unfold.default, x(4, 9), 1, 3, 3
    yield "a0>0", aten.unfold.default, x(4, 10), 1, 3, 3
    yield "a0>0 a1>1", aten.unfold.default, x(4, 5), 1, 1, 1
    yield "a0>0", aten.split.Tensor, x(3, 5), 2, 1
    yield "a0>0", aten.split.sizes, x(3, 5), [1, 4], -1
    yield "a0>0", aten.split_with_sizes.default, x(3, 5), [1, 4], -1
    yield "a0>0 a2>2", aten.chunk.default, x(3, 5, 4), 2, 1
    yield "a0>0", aten.unsafe_split.Tensor, x(3, 5), 2, 1
    yield "a1>1", aten.unsafe_chunk.default, x(3, 5), 2
    yield "a0>0", aten.tensor_split.sections, x(3, 5), 2, 1
    yield "a0b0>0", aten.cat.default, [x(3, 5), x(3, 2)], 1
    yield "b0>0", aten.cat.default, [x(0), x(3, 5)], -1
    yield "a0b0>0 a1b1>2", aten.stack.default, [x(3, 5), x(3, 5)], 1
    yield "a0>0 b0>1", aten.meshgrid.indexing, [x(3), x(5)], {"indexing": "ij"}
    yield "a0>1 b0>0 c0>2", aten.meshgrid.indexing, [x(3), x(5), x(4)], {"indexing": "xy"}
    yield "a0>1", aten.repeat.default, x(3, 5), [2, 1, 2]
    yield "a0>0 a1>1", aten.tile.default, x(3, 4, 5), [2]
    yield "a0>0 a1>1*2", aten.repeat_interleave.self_int, x(3, 5), 2, 1
    yield "", aten.repeat_interleave.self_int, x(3, 5), 2
    yield "a0>0", aten.repeat_interleave.self_int, x(3, 5), 2, 1, {"output_size": 10}
    yield "", aten.repeat_interleave.self_Tensor, x(3, 5), i(5), 1
    yield "a0>0 a1>1", aten.constant_pad_nd.default, x(2, 3, 5), [1, 2]
    yield "a0>0 a2>2", aten.constant_pad_nd.default, x(2, 3, 5), [0, 0, 1, 0], 2.0
    yield "a0>0 a1>1", aten.pad.default, x(2, 3, 5), [1, 1], "reflect"
    yield "a0>0 a1>1", aten.reflection_pad2d.default, x(2, 3, 5, 4), [1, 1, 0, 1]
    yield "a0>0 a1>1", aten.replication_pad1d.default, x(2, 3, 5), [1, 1]


def lookups():
    yield "a1>2 b0>0 b1>1", aten.embedding.default, x(9, 4), i(3, 5)
    yield "a0b0>0 b1>1", aten.gather.default, x(3, 5), 1, i(3, 4)
    yield "b1>1", aten.gather.default, x(3, 5), 1, i(2, 4)
    yield "b0>0", aten.gather.default, x(3, 5), 0, i(4, 1)
    yield "b0>0 b1>1", aten.take.default, x(3, 5), i(2, 4)
    yield "a0>0 a2>2 b0>1", aten.index_select.default, x(3, 5, 2), 1, i(4)
    yield "a1>1 a2>2 b0>0", aten.index.Tensor, x(4, 5, 3), [i(6)]
    yield "a0>0 a2>3 b0>1 b1>2", aten.index.Tensor, x(4, 5, 3), [None, i(6, 2)]
    yield "a2>2 b0>0 c0>1", aten.index.Tensor, x(4, 5, 3), [i(6, 1), i(7)]
    yield "a1>1 b0c0>0", aten.index.Tensor, x(4, 5, 3), [i(6), None, i(6)]
    yield "a0>1 a2>2 b0c0>0", aten.index.Tensor, x(4, 5, 3, 6), [None, i(7), None, i(7)]
    yield "a0>0 b0>1 c0>2", aten.index.Tensor, x(4, 5, 3), [None, i(2, 1), i(6)]
    yield "a1>1 a2>2", aten.index.Tensor, x(4, 5, 3), [b(4)]
    yield "a2>1", aten.index.Tensor, x(4, 5, 3), [b(4, 5)]
    yield "a0>0", aten.index.Tensor, x(4, 5, 3), [None, b(5, 3)]
    yield "a1>1", aten.index.Tensor, x(4, 5, 3), [torch.arange(4) < 2, None, i(2)]
    yield "a2>1", aten.index.Tensor, x(4, 5, 3), [torch.arange(4) < 1, i(2)]
    yield "a1>2", aten.index.Tensor, x(4, 5, 3), [torch.arange(4) < 1, None, i(6, 2)]
    yield "a0>0 a1>1", aten.isin.Tensor_Tensor, i(3, 5), i(4)
    yield "a0>0 a1>1", aten.bucketize.Tensor, x(3, 5), x(4).sort().values
    yield "a0b0>0 b1>1", aten.searchsorted.Tensor, x(3, 4).sort().values, x(3, 5)
    yield "b0>0 b1>1", aten.searchsorted.Tensor, x(4).sort().values, x(3, 5)
    yield "a0>0 a1>1", aten.one_hot.default, i(3, 5), 4
    yield "a0b0c0>0", aten.scatter.src, x(3, 5), 1, i(3, 2), x(3, 2)
    yield "", aten.scatter.src, x(3, 5), 1, i(3, 2), x(4, 2)
    yield "a0b0>0", aten.scatter.value, x(3, 5, 4), 1, i(3, 2, 1), 2.0
    yield "a1b1c1>1", aten.scatter_add.default, x(3, 5), 0, i(4, 5), x(4, 5)
    yield "a1b1c1>1", aten.scatter_reduce.two, x(3, 5), 0, i(4, 5), x(4, 5), "amax"
    yield "a1c1>1", aten.index_add.default, x(3, 5), 0, i(4), x(4, 5)
    yield "a1c1>1", aten.index_copy.default, x(3, 5), 0, torch.tensor([2, 0]), x(2, 5)
    yield "a1>1", aten.index_fill.int_Scalar, x(3, 5), 0, i(2), 1.0
    yield "a0b0>0 a2b1>2", aten.select_scatter.default, x(3, 4, 5), x(3, 5), 1, 2
    yield "a0b0>0", aten.slice_scatter.default, x(3, 5), x(3, 2), 1, 0, 2
    yield "a1c1>1", aten.index_put.default, x(3, 5), [i(2)], x(2, 5)
    yield "a1c1>1", aten.index_put.default, x(3, 5), [torch.arange(3) < 2], x(2, 5)
    yield "a2>2", aten.index_put.default, x(3, 5, 4), [b(3, 5)], torch.tensor(2.0).double()


def along():
    yield "a0>0 a1>1", aten.softmax.int, x(2, 3, 5), -1
    yield "a0>0 a2>2", aten.softmax.int, x(2, 3, 5), 1
    yield "a1>1", aten.log_softmax.int, x(3, 5), 0
    yield "a0>0 a1>1", aten._softmax.default, x(2, 3, 5), -1, False
    yield "a0>0", aten._log_softmax.default, x(3, 5), 1, False
    yield "a0>0", aten._safe_softmax.default, x(3, 5), 1
    yield "a0>0", aten.cumsum.default, x(3, 5), 1
    yield "a1>1", aten.cumprod.default, x(3, 5), 0
    yield "a1>1", aten.logcumsumexp.default, x(3, 5), 0
    yield "a1>1", aten.cummax.default, x(3, 5), 0
    yield "a0>0", aten.sort.default, x(3, 5)
    yield "a0>0", aten.argsort.default, x(3, 5)
    yield "a0>0", aten.topk.default, x(3, 5), 2
    yield "a1>1", aten.flip.default, x(2, 3, 5), [0, 2]
    yield "a0>0 a2>2", aten.roll.default, x(2, 3, 5), [1], [1]
    yield "", aten.roll.default, x(3, 5), [1]
    yield "a0>0", aten.tril.default, x(2, 3, 5)
    yield "", aten.trace.default, x(3, 3)
    yield "", aten.triu.default, x(3, 5)
    yield "a0>0 a1>1", aten.glu.default, x(2, 3, 4), -1
    yield "a0>0", aten.diff.default, x(3, 5), 1, -1
    yield "a0b0>0", aten.diff.default, x(3, 5), 1, -1, x(3, 2)
    yield "a0>0 a1>1", aten.fft_rfft.default, x(2, 3, 5)
    yield "a0>0 a2>2", aten._fft_r2c.default, x(2, 3, 5), [1], 0, True
    yield "a0>0", aten._fft_c2c.default, torch.complex(x(2, 3, 5), x(2, 3, 5)), [1, 2], 0, True


def reductions():
    yield "a0+ a1+", aten.sum.default, x(3, 5)
    yield "a0>0 a1+ a2>1", aten.sum.dim_IntList, x(2, 3, 5), [1]
    yield "a0+ a1>1 a2+", aten.sum.dim_IntList, x(2, 3, 5), [0, -1], True
    yield "a0>0 a1+", aten.sum.dim_IntList, b(3, 5), [1]
    yield "", aten.mean.default, x(3, 5)
    yield "a0>0 a1>1", aten.mean.dim, x(2, 3, 5), [-1], True
    yield "a1>0", aten.mean.dim, x(2, 3, 5), [0, 2]
    yield "a0>0", aten.amax.default, x(3, 5), [1]
    yield "", aten.amin.default, x(3, 5)
    yield "", aten.max.default, x(3, 5)
    yield "a0>0", aten.max.dim, x(3, 5), 1
    yield "a1>1", aten.min.dim, x(3, 5), 0, True
    yield "a0>0", aten.any.dim, b(3, 5), 1
    yield "", aten.all.default, b(3, 5)
    yield "a0>0", aten.prod.dim_int, x(3, 5), 1
    yield "a0>0", aten.logsumexp.default, x(3, 5), [1]
    yield "a0>0", aten.var.correction, x(3, 5), [1], {"correction": 0}
    yield "", aten.var.default, x(3, 5)
    yield "a0>0 a2>2", aten.var_mean.correction, x(2, 3, 5), [1], {"correction": 0, "keepdim": True}
    yield "a0>0", aten.std.dim, x(3, 5), [1]
    yield "a0>0", aten.norm.ScalarOpt_dim, x(3, 5), 2, [1]
    yield "", aten.norm.Scalar, x(3, 5)
    yield "a0>0", aten.linalg_vector_norm.default, x(3, 5), 2, [-1], True
    yield "a0>0", aten.argmax.default, x(3, 5), 1
    yield "", aten.argmax.default, x(3, 5)
    yield "a0>0 a1+", aten.count_nonzero.default, x(3, 5), 1
    yield "a0>0", aten.median.dim, x(3, 5), 1
    yield "a0>0", aten.aminmax.default, x(3, 5), {"dim": 1}


def norms():
    yield "a0>0 a1>1", aten.layer_norm.default, x(2, 3, 5), [5], x(5), x(5, seed=1)
    yield "a0>0", aten.layer_norm.default, x(2, 3, 5), [3, 5]
    yield "a0>0 a1>1", aten.native_layer_norm.default, x(2, 3, 5), [5], x(5), None, 1e-5
    yield "a0>0 a1>1", aten.rms_norm.default, x(2, 3, 5), [5], x(5)
    yield "a0>0 a1>1", aten._fused_rms_norm.default, x(2, 3, 5), [5], x(5), 1e-6
    yield "a0>0", aten.group_norm.default, x(3, 6, 5), 2, x(6), x(6)
    yield "a0>0", aten.native_group_norm.default, x(3, 6, 5), x(6), x(6), 3, 6, 5, 2, 1e-5
    mean, var = x(4), x(4).abs() + 1
    yield (
        "a0>0 a1b0c0d0e0>1 a2>2",
        aten.batch_norm.default,
        x(3, 4, 5),
        x(4),
        x(4),
        mean,
        var,
        False,
        0.1,
        1e-5,
        False,
    )
    yield (
        "a0>0 a1b0c0>1 a2>2 a3>3",
        aten.batch_norm.default,
        x(3, 4, 5, 2),
        None,
        None,
        mean,
        var,
        False,
        0.1,
        1e-5,
        False,
    )
    yield "", aten.batch_norm.default, x(3, 4, 5), x(4), x(4), None, None, True, 0.1, 1e-5, False
    yield (
        "a0>0 a1b0c0d0e0>1",
        aten.batch_norm.default,
        x(3, 4),
        x(4),
        x(4),
        mean,
        var,
        False,
        0.1,
        1e-5,
        False,
    )
    legit = aten._native_batch_norm_legit_no_training.default
    yield "a0>0,_,_ a1b0c0d0e0>1,_,_ a2>2,_,_", legit, x(3, 4, 5), x(4), x(4), mean, var, 0.1, 1e-5
    for norm in (aten.native_batch_norm, aten._native_batch_norm_legit):
        statistics = x(3, 4, 5), x(4), x(4), mean.clone(), var.clone()
        yield "", norm.default, *statistics, True, 0.1, 1e-5
        yield "a0>0,_,_ a1b0c0d0e0>1,_,_ a2>2,_,_", norm.default, *statistics, False, 0.1, 1e-5
    yield (
        "a0>0,_,_,_ a1b0c0d0e0>1,_,_,_ a2>2,_,_,_",
        aten._batch_norm_no_update.default,
        *(x(3, 4, 5), x(4), x(4), mean, var),
        0.1,
        1e-5,
    )
    yield (
        "a0>0,_,_ a1b0c0d0e0>1,_,_ a2>2,_,_",
        aten.native_batch_norm.default,
        x(3, 4, 5),
        x(4),
        x(4),
        mean,
        var,
        False,
        0.1,
        1e-5,
    )
    yield (
        "a0>0 a1b0c0>1",
        aten.instance_norm.default,
        x(3, 4, 5),
        x(4),
        x(4),
        None,
        None,
        True,
        0.1,
        1e-5,
        False,
    )
    yield "", aten.instance_norm.default, x(3, 4, 5), x(4), x(4), mean, var, True, 0.1, 1e-5, False
    yield (
        "a0>0 a1b0c0d0>1",
        aten.instance_norm.default,
        x(3, 4, 5),
        x(4),
        None,
        mean,
        var,
        False,
        0.1,
        1e-5,
        False,
    )


def losses():
    yield "a0b0>0 a1b1>1", aten.mse_loss.default, x(3, 5), x(3, 5, seed=1), 0
    yield "", aten.mse_loss.default, x(3, 5), x(3, 5, seed=1), 1
    yield "a0+ a1b0+", aten.mse_loss.default, x(3, 5), x(5), 2
    yield "a0b0>0 a1b1>1", aten.kl_div.default, x(3, 5), x(3, 5).sigmoid(), 0
    yield (
        "a0b0>0 a1b1c0>1",
        aten.binary_cross_entropy_with_logits.default,
        x(3, 5),
        x(3, 5).sigmoid(),
        None,
        x(5),
        0,
    )
    yield "a0b0>0", aten.cross_entropy_loss.default, x(4, 3), i(4), None, 0
    yield "a0b0>0 a2b1>1", aten.cross_entropy_loss.default, x(4, 3, 5), i(4, 5), x(3).abs(), 0
    yield "a0b0>0", aten.cross_entropy_loss.default, x(4, 3), x(4, 3).softmax(1), None, 0, -100, 0.1
    yield "a0b0+", aten.cross_entropy_loss.default, x(4, 3), i(4), x(3).abs(), 2, -100, 0.1
    yield "", aten.cross_entropy_loss.default, x(4, 3), i(4)
    yield "", aten.cross_entropy_loss.default, x(3), torch.tensor(1), None, 0
    yield "a0b0>0,_", aten.nll_loss_forward.default, x(4, 3), i(4), None, 0, -100
    yield "a0b0+", aten.nll_loss_forward.default, x(4, 3), i(4), x(3), 2, -100
    yield "", aten.nll_loss_forward.default, x(4, 3), i(4), None, 1, -100
    yield (
        "a0b0>0,_ a2b1>1,_ a3b2>2,_",
        aten.nll_loss2d_forward.default,
        x(2, 3, 4, 5),
        i(2, 4, 5),
        None,
        0,
        -100,
    )
    yield "a0b0>0", aten.nll_loss_nd.default, x(4, 3), i(4), None, 0


def neighbourhoods():
    conv = aten.convolution.default
    ones = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    yield "a0>0 a2>2 a3>3 b0c0>1", conv, x(2, 3, 6, 7), x(5, 3, 1, 1), x(5), *ones
    yield "a0>0 a1b1+ a2>2 a3>3 b0>1", conv, x(2, 3, 6, 7), x(5, 3, 1, 1), None, *ones
    yield "a0>0 a2*3>2 a3*2>3 b0c0>1", conv, x(2, 3, 6, 8), x(5, 3, 3, 2), x(5), [3, 2], *ones[1:]
    yield "a0>0 a2*3>2 b0c0>1", conv, x(2, 3, 6, 7), x(5, 3, 3, 2), x(5), [3, 2], *ones[1:]
    yield "a0>0 b0c0>1", conv, x(2, 3, 6, 7), x(5, 3, 3, 3), x(5), [1, 1], [1, 1], *ones[2:]
    yield "a0>0", conv, x(2, 4, 6, 7), x(6, 2, 3, 3), x(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 2
    yield (
        "a0>0 b1c0>1",
        conv,
        x(2, 3, 6, 7),
        x(3, 5, 2, 2),
        x(5),
        [2, 2],
        [0, 0],
        [1, 1],
        True,
        [0, 0],
        1,
    )
    yield "a0>0 a1b1+ a2*3>2 b0>1", aten.conv1d.default, x(2, 3, 9), x(5, 3, 3), None, [3]
    yield "a0>0 b0c0>1", aten.conv1d.default, x(2, 3, 9), x(5, 3, 3), x(5), [3], [1]
    yield "a0>0 b0c0>1", aten.conv1d.default, x(2, 3, 9), x(5, 3, 3), x(5), [3], [0], [2]
    yield "a0b1+ b0>0", aten.conv1d.default, x(3, 9), x(5, 3, 3)
    yield "a0>0 a1b1+ a2>2 b0>1", aten.conv1d.padding, x(2, 3, 9), x(5, 3, 1), None, [1], "same"
    yield "a0>0 a1b1+ b0>1", aten.conv1d.padding, x(2, 3, 9), x(5, 3, 3), None, [1], "same"
    yield (
        "a0>0 a2*2>2 a3*2>3 b0c0>1",
        aten.conv2d.default,
        x(2, 3, 6, 8),
        x(5, 3, 2, 2),
        x(5),
        [2, 2],
    )
    yield "a1*2>1 a2*2>2 b0c0>0", aten.conv2d.default, x(3, 6, 8), x(5, 3, 2, 2), x(5), [2, 2]
    yield (
        "a0>0 a2>2 a3*2>3 a4*2>4 b0c0>1",
        aten.conv3d.default,
        x(2, 3, 4, 6, 8),
        x(5, 3, 1, 2, 2),
        x(5),
        [1, 2, 2],
    )
    yield "a0>0 b1c0>1", aten.conv_transpose1d.default, x(2, 3, 5), x(3, 4, 2), x(4), [2]
    yield "a0>0 a1b0+ b1>1", aten.conv_transpose2d.input, x(2, 3, 5, 4), x(3, 4, 2, 2), None, [2, 2]
    yield "a0>0 a1>1", aten.avg_pool2d.default, x(2, 3, 6, 8), [2, 2]
    yield "a0>0 a1>1", aten.avg_pool1d.default, x(2, 3, 6), [2]
    yield "a0>0 a1>1", aten.max_pool2d.default, x(2, 3, 6, 8), [2, 2]
    yield "a0>0 a1>1", aten.max_pool2d_with_indices.default, x(2, 3, 6, 8), [2, 2]
    yield "a0>0 a1>1", aten.max_pool3d_with_indices.default, x(2, 3, 4, 6, 8), [2, 2, 2]
    yield "a0>0 a1>1", aten.adaptive_avg_pool2d.default, x(2, 3, 6, 8), [2, 2]
    yield "a0>0", aten._adaptive_avg_pool2d.default, x(3, 6, 8), [2, 3]
    yield "a0>0 a1>1", aten.upsample_nearest2d.default, x(2, 3, 4, 5), [8, 10]
    yield "a0>0 a1>1", aten.upsample_nearest2d.vec, x(2, 3, 4, 5), None, [2.0, 2.0]
    yield "a0>0 a1>1", aten.upsample_bilinear2d.default, x(2, 3, 4, 5), [8, 9], False
    yield "a0>0 a1>1", aten.upsample_linear1d.default, x(2, 3, 4), [8], False
    yield "a0>0 a1>1", aten.upsample_bicubic2d.default, x(2, 3, 4, 5), [8, 9], False
    yield "a0>0 a2>2*2 a3>3*2", aten.pixel_shuffle.default, x(3, 8, 5, 6), 2
    yield "a0>0 a2*2>2 a3*2>3", aten.pixel_unshuffle.default, x(3, 2, 10, 6), 2
    yield "a0>0", aten.channel_shuffle.default, x(3, 4, 5, 6), 2
    yield "a0>0", aten.im2col.default, x(3, 4, 6, 6), [2, 2], [1, 1], [0, 0], [2, 2]
    yield (
        "a0b0>0 a1>1 b1>2 b2>3",
        aten.grid_sampler_2d.default,
        x(2, 3, 4, 5),
        x(2, 6, 7, 2).tanh(),
        0,
        0,
        False,
    )


def more():
    yield "a0>0", aten.squeeze.dim, x(3, 5), 1
    yield "a0c0>0 a2c2>2", aten.index_put.default, x(3, 5, 2), [None, i(4)], x(3, 4, 2)
    yield "a0>0 a2c0>2", aten.index_put.default, x(3, 5, 2), [None, i(4)], x(2)
    yield "a0>0 a2>1", aten.cosine_similarity.default, x(2, 3, 5), x(3, 1), 1
    yield "a0b0>0 a1b1>1", aten.cosine_similarity.default, x(2, 3, 5), x(2, 3, 5, seed=1), -1
    yield "a0>0", aten.linalg_cross.default, x(5, 3), x(1, 3)
    yield "a0>0", aten.linalg_svd.default, x(4, 3, 3)
    yield "a0>0", aten.linalg_det.default, x(4, 3, 3)
    yield "a0>0 a1>1", aten.linalg_inv.default, x(2, 4, 3, 3)
    yield "", aten.add_.Tensor, x(3, 5), x(5)


def edges():
    """Tensors without dims, without elements, with one element."""
    zero, one = x(), torch.tensor(1)
    yield "", aten.softmax.int, zero, -1
    yield "", aten.sum.default, zero
    yield "", aten.cumsum.default, zero, 0
    yield "", aten.transpose.int, zero, 0, -1
    yield "", aten.permute.default, zero, []
    yield "", aten.unsqueeze.default, zero, 0
    yield "", aten.add.Tensor, zero, zero
    yield "", aten.gather.default, zero, 0, one * 0
    yield "", aten.sort.default, zero
    yield ">0 >1", aten.expand.default, zero, [3, 5]
    yield "a1>0", aten.index.Tensor, x(3, 5), [one]
    yield "a1>0", aten.embedding.default, x(3, 5), one
    yield "", aten.add.Tensor, x(0, 1), x(1, 1)
    yield "a1>1", aten.add.Tensor, x(1, 5), x(1, 1)
    yield "", aten.mm.default, x(0, 4), x(4, 5)
    yield "a1b0+ b1>1", aten.mm.default, x(1, 4), x(4, 5)


def each(want, names, *args, overload="default"):
    """The same call of several operations."""
    for name in names.split():
        yield want, getattr(getattr(aten, name), overload), *args


def aliases():
    """The rest of the table: other names of what stands above, and other ranks."""
    both = "a0>0 a1>1"
    yield from each(
        both,
        (
            "absolute arccos arcsin arcsinh arctan arctanh fix hardswish log_sigmoid negative "
            "special_expit isreal alias detach lift lift_fresh lift_fresh_copy zero resolve_conj "
            "resolve_neg conj real empty_like ones_like"
        ),
        x(3, 5).tanh(),
    )
    yield both, aten.arccosh.default, x(3, 5).abs() + 1
    yield both, aten._conj.default, torch.complex(x(3, 5), x(3, 5))
    yield both, aten.imag.default, torch.complex(x(3, 5), x(3, 5))
    yield from each(
        "a0>0 a1b0>1",
        ("divide multiply subtract greater greater_equal less less_equal not_equal"),
        x(3, 5),
        x(5),
        overload="Tensor",
    )
    yield from each("a0>0 a1b0>1", "arctan2 floor_divide isclose polar", x(3, 5), x(5))
    yield from each(
        "a0>0 a1b0>1", "__or__ __xor__ __lshift__ __rshift__", i(3, 5), i(5), overload="Tensor"
    )
    losses = "l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy"
    args = x(3, 5).sigmoid(), x(3, 5, seed=1).sigmoid()
    yield from each("a0b0>0 a1b1>1", losses, *args, {"reduction": 0})
    yield from each("", losses, *args, {"reduction": 1})
    yield from each("a0b0+ a1b1+", losses, *args, {"reduction": 2})

    yield "a0b0>0 a1c1>1", aten._addmm_activation.default, x(3, 5), x(3, 4), x(4, 5)
    yield "a0>0 a1>2 a2>1", aten.adjoint.default, x(2, 3, 5)
    yield "a0>1 a1>0", aten.mH.default, x(3, 5)
    yield "a0>1 a1>0", aten.swapdims.default, x(3, 5), 0, 1
    yield "a0>2 a1>0 a2>1", aten.moveaxis.int, x(2, 3, 5), 0, -1
    yield "a0>0*5", aten.ravel.default, x(3, 5)
    yield "a0*3b0>0 a1b2>2", aten.reshape_as.default, x(6, 5), x(2, 3, 5)
    yield "a0>0", aten.linalg_diagonal.default, x(4, 3, 3)
    yield "a0>0", aten.unsafe_split_with_sizes.default, x(3, 5), [1, 4], 1
    yield "a0b0>0", aten.concat.default, [x(3, 5), x(3, 2)], 1
    yield "a1b1>1", aten.concatenate.default, [x(3, 5), x(2, 5)]
    yield ">0 >1", aten.new_ones.default, x(4), [3, 5]
    yield ">0 >1", aten.new_empty.default, x(4), [3, 5]

    yield "a1>1 a2>2 b0>0", aten._unsafe_index.Tensor, x(4, 5, 3), [i(6)]
    yield "a1c1>1", aten._unsafe_index_put.default, x(3, 5), [i(2)], x(2, 5)

    yield "a1>1", aten.cummin.default, x(3, 5), 0
    yield "a2>2", aten.rot90.default, x(3, 5, 4)
    complex_ = torch.complex(x(2, 3, 5), x(2, 3, 5))
    yield "a0>0 a2>2", aten._fft_c2r.default, complex_, [1], 0, 5
    yield from each("a0>0 a1>1", "fft_fft fft_ifft fft_irfft", complex_)
    yield from each("a0>0", "fft_fft2 fft_ifft2 fft_irfft2", complex_)
    yield from each("a1>1", "fft_fftn fft_ifftn fft_irfftn", complex_, None, [0, 2])
    yield from each("", "fft_fftn fft_ifftn fft_irfftn", complex_)
    yield "a0>0", aten.fft_rfft2.default, x(2, 3, 5)
    yield "a0>0", aten.fft_rfftn.default, x(2, 3, 5), None, [1, 2]
    yield from each("a0>0", "fft_fftshift fft_ifftshift", x(3, 5), [1])
    yield from each("", "fft_fftshift fft_ifftshift", x(3, 5))

    spd = x(4, 3, 3) @ x(4, 3, 3).mT + torch.eye(3, dtype=torch.float64)
    yield from each(
        "a0>0",
        (
            "linalg_cholesky linalg_eigh linalg_eigvalsh linalg_inv_ex linalg_matrix_exp linalg_qr "
            "linalg_slogdet linalg_svdvals _linalg_det _linalg_eigh _linalg_slogdet _linalg_svd"
        ),
        spd,
    )

    yield "a0>0", aten.argmin.default, x(3, 5), 1
    yield "a0>0", aten.kthvalue.default, x(3, 5), 2
    yield "a0>0", aten.mode.default, x(3, 5)
    yield "a0>0", aten.nanmean.default, x(3, 5), [1]
    yield "a0>0", aten.nanmedian.dim, x(3, 5), 1
    yield "a0>0 a1+", aten.nansum.default, x(3, 5), [1]
    yield "a0>0", aten.std_mean.correction, x(3, 5), [1]
    yield "a0b0>0", aten.nll_loss.default, x(4, 3), i(4), None, 0
    yield "a0b0+ a2b1+", aten.nll_loss2d.default, x(2, 3, 4, 1), i(2, 4, 1), None, 2

    volume = x(2, 3, 4, 6, 8)
    yield "a0>0 b1c0>1", aten.conv_transpose3d.input, volume, x(3, 4, 1, 2, 2), x(4)
    yield from each(
        both, "adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d max_pool1d", x(2, 3, 6), [2]
    )
    yield both, aten.adaptive_max_pool2d.default, x(2, 3, 6, 8), [2, 2]
    yield from each(
        both,
        ("adaptive_avg_pool3d adaptive_max_pool3d _adaptive_avg_pool3d avg_pool3d max_pool3d"),
        volume,
        [2, 2, 2],
    )
    yield both, aten.reflection_pad1d.default, x(2, 3, 5), [1, 1]
    yield f"{both} a2>2", aten.replication_pad2d.default, x(2, 3, 5, 4), [1, 1, 0, 0]
    yield f"{both} a3>3", aten.reflection_pad3d.default, volume, [1, 1, 0, 0, 1, 1]
    yield both, aten.replication_pad3d.default, volume, [1, 1, 1, 1, 1, 1]
    yield both, aten.upsample_nearest1d.default, x(2, 3, 5), [10]
    yield both, aten._upsample_nearest_exact1d.default, x(2, 3, 5), [10]
    yield both, aten._upsample_nearest_exact2d.default, x(2, 3, 4, 5), [8, 10]
    yield from each(
        both, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa", x(2, 3, 4, 5), [8, 10], False
    )
    yield from each(both, "upsample_nearest3d _upsample_nearest_exact3d", volume, [8, 12, 16])
    yield both, aten.upsample_trilinear3d.default, volume, [8, 12, 16], False
    grid = x(2, 3, 6, 7, 3).tanh()
    want = "a0b0>0 a1>1 b1>2 b2>3 b3>4"
    yield want, aten.grid_sampler_3d.default, volume, grid, 0, 0, False


def table():
    families = [
        products,
        elements,
        views,
        lookups,
        along,
        reductions,
        norms,
        losses,
        neighbourhoods,
        more,
        aliases,
        edges,
    ]
    for family in families:
        for want, func, *args in family():
            kwargs = args.pop() if isinstance(args[-1], dict) else {}
            yield pytest.param(Call(func, tuple(args), kwargs), want, id=str(func)[5:])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize(("call", "want"), [*table()])
def test_every_axis_is_found_and_right(call, want):
    found = call.axes()
    outputs = len(call.run())
    assert sorted(written(axis, outputs) for axis in found) == sorted(want.split())
    for axis in found:
        assert_right(call, axis)


ONLY_ON_GPU = {f"_scaled_dot_product_{name}_attention" for name in ("cudnn", "efficient", "flash")}
ONLY_ON_GPU |= {"_scaled_dot_product_fused_attention_overrideable", "cudnn_batch_norm"}


def test_no_rule_goes_untested():
    tested = {str(case.values[0].func.overloadpacket).removeprefix("aten.") for case in table()}
    assert set(module._RULES) - tested == ONLY_ON_GPU


# Kernels that only a GPU has


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("efficient", [None, True], "a0b0c0>0 a1b1c1>1"),  # pads what it returns for queries
        ("efficient", [None, False], "a0b0c0>0,_ a1b1c1>1,_ a2>2,_"),
        ("efficient", ["bias", False], "a0b0c0>0,_ a1b1c1d1>1,_ a2d2>2,_"),
        ("efficient", [None, False, 0.1], ""),
        ("efficient", [None, False, 0.0, True], "a0b0c0>0,_ a1b1c1>1,_"),
        ("flash", [], "a0b0c0>0 a1b1c1>1 a2>2"),
        ("flash", [0.0, True], "a0b0c0>0 a1b1c1>1"),
        ("cudnn", [None, True], "a0b0c0>0 a1b1c1>1 a2>2"),
        ("cudnn", [None, True, 0.0, False, True], ""),
        ("fused", ["bias"], "a0b0c0>0 a1b1c1d1>1 a2d2>2"),
    ],
)
def test_attention_kernels_of_a_gpu(name, options, want):
    """Their shapes come from meta tensors; what they compute, the CPU's kernels are tested for."""
    ending = "_overrideable" if name == "fused" else ""
    func = getattr(aten, f"_scaled_dot_product_{name}_attention{ending}").default
    q, k = (torch.empty(2, 4, n, 8, device="meta", dtype=torch.float16) for n in (5, 7))
    bias = torch.empty(1, 4, 5, 7, device="meta", dtype=torch.float16)
    args = (q, k, k, *(bias if option == "bias" else option for option in options))
    found = axes(operation(func, args, {}, func(*args)))
    assert sorted(written(axis, 2) for axis in found) == sorted(want.split())


@pytest.mark.parametrize(("training", "want"), [(False, "a0>0 a1b0c0d0e0>1 a2>2"), (True, "")])
def test_batch_norm_of_a_gpu(training, want):
    args = [torch.empty(shape, device="meta") for shape in [(3, 4, 5), *[(4,)] * 4]]
    func = aten.cudnn_batch_norm.default
    found = axes(operation(func, (*args, training, 0.1, 1e-5), {}, args[0]))
    assert sorted(written(axis, 1) for axis in found) == sorted(want.split())


# Parts that lie in a dim in blocks, which a split has and no loop


IN_BLOCKS = [
    ("a0>0*20 a1>0*5/3 a2>0*1/12", (3, 4, 5), (60,)),
    ("a0*20>0 a0*5/3>1 a0*1/12>2", (60,), (3, 4, 5)),
    ("a0>0*4 a1>0*1/3 a2>1", (3, 4, 5), (12, 5)),
    ("a0>0 a1>1*5 a2>1*1/4", (3, 4, 5), (3, 20)),
    ("a0>0*4 a2>0*1/3 a3>2*2 a4>2*1/5", (3, 1, 4, 5, 2), (12, 1, 10)),
    ("a0*4>0 a0*1/3>1 a1*5>2 a1*1/4>3", (12, 20), (3, 4, 4, 5)),
    ("a0>0*2", (3, 4), (6, 2)),  # of dims that are put together otherwise, only the slowest
    ("", (3, 4), (4, 3)),
]


@pytest.mark.parametrize(("want", "before", "after"), IN_BLOCKS)
def test_a_reshape_keeps_every_dim_that_is_merged_or_taken_apart(want, before, after):
    source, result = x(*before), x(*before).reshape(after)
    call = operation(aten.reshape.default, (source, after), {}, result)
    found = axes(call, in_blocks=True)
    assert {blocked(axis) for axis in found} == set(want.split())
    for axis in found:
        part = of_blocks(source, axis.inputs[0])
        expected = of_blocks(result, axis.outputs[0])
        same(part.reshape(expected.shape), expected)


def blocked(axis):
    """As ``written``, with the number of blocks: ``*5/3`` has 3 blocks, in units of 5."""

    def term(span):
        return f"{span.dim}" + (f"*{span.unit}" if span.unit * span.blocks > 1 else "")

    spans = axis.inputs[0], axis.outputs[0]
    return "a" + ">".join(term(s) + f"/{s.blocks}" * (s.blocks > 1) for s in spans)


def of_blocks(tensor, span):
    """All positions of an axis but the first, in every block."""
    _, *others = tensor.unflatten(span.dim, (span.blocks, -1)).split(span.unit, span.dim + 1)
    return torch.cat(others, span.dim + 1).flatten(span.dim, span.dim + 1)


def test_loops_are_given_no_axis_in_blocks():
    call = operation(aten.view.default, (x(3, 4), [12]), {}, x(12))
    assert len(axes(call, in_blocks=True)) == 2
    assert [written(axis, 1) for axis in axes(call)] == ["a0>0*4"]


@pytest.mark.parametrize("name", ["linear", "matmul", "einsum"])
def test_functions_that_torch_takes_apart(name):
    args = {
        "linear": (x(3, 4), x(5, 4), None),
        "matmul": (x(3, 4), x(4, 5)),
        "einsum": ("ik,kj->ij", x(3, 4), x(4, 5)),
    }[name]
    want = {"linear": "a0>0 a1b1+ b0>1"}.get(name, "a0>0 a1b0+ b1>1")
    call = composite(f"aten.{name}", args, {}, x(3, 5))
    assert sorted(written(axis, 1) for axis in axes(call)) == sorted(want.split())


# What calls may hold


@pytest.mark.filterwarnings("ignore")  # what torch.export deprecates of its own
def test_symbolic_lengths_are_read_by_their_hints():
    program, _ = exported("encoder", dynamic_shapes=({1: torch.export.Dim("s", min=2, max=64)},))
    views = 0
    for node in program.graph.nodes:
        if node.op == "call_function" and "view" in str(node.target):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            call = operation(node.target, args, kwargs, node.meta["val"])
            assert all(type(n) is int for shape in call.inputs + call.outputs for n in shape)
            assert axes(call)
            views += any(isinstance(length, torch.SymInt) for length in args[1])
    assert views


def test_lengths_that_depend_on_data_give_no_axis():
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        rows = aten.index.Tensor(x(6, 5), [b(6)])
        call = operation(aten.mul.Tensor, (rows, 2.0), {}, aten.mul.Tensor(rows, 2.0))
        flat = operation(aten.view.default, (rows, [-1]), {}, aten.view.default(rows, [-1]))
    assert call.inputs == ((-1, 5),)
    assert [written(axis, 1) for axis in axes(call)] == ["a1>1"]
    assert axes(flat) == ()


def test_arguments_carry_schema_names_defaults_and_references():
    call = operation(aten.cat.default, ([x(3, 5), x(3, 2)],), {"dim": 1}, x(3, 7))
    assert call.name == "aten.cat"
    assert call.arguments == {"tensors": [TensorRef(0), TensorRef(1)], "dim": 1}
    assert (call.inputs, call.outputs) == (((3, 5), (3, 2)), ((3, 7),))
    call = operation(aten.linear.default, (x(3, 5), x(7, 5)), {}, x(3, 7))
    assert call.arguments["bias"] is None
    call = operation(aten.where.self, (b(5), x(5), x(5)), {}, x(5))
    assert call.arguments["condition"] == TensorRef(0, mask=True)
    assert call.pointwise


@pytest.mark.parametrize(
    ("inputs", "outputs", "want"),
    [
        (["mn"], ["mn"], "a0>0 a1>1"),
        (["mn"], ["mn", "m"], "a0>0"),  # the second output has no n
        (["mn"], ["mn", "nm"], "a0>0,1 a1>1,0"),
        (["mn", "nk"], ["mn"], "a0>0"),  # n is 5 and 3, k is in no output
        (["mm"], ["m"], ""),
        (["mn"], ["mm"], ""),
    ],
)
def test_an_axis_is_a_label_on_which_all_tensors_agree(inputs, outputs, want):
    shapes = [(3, 5), (3, 5)]
    sizes = [shapes[0][: len(labels)] if labels != "nm" else (5, 3) for labels in outputs]
    call = Operation("mine", {}, tuple(shapes), tuple(sizes), pointwise=False)
    found = labelled(call, dict(enumerate(inputs)), dict(enumerate(outputs)))
    assert [written(axis, len(outputs)) for axis in found] == want.split()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("aten.linear", True),
        ("aten.view_copy", True),  # a view's copying twin
        ("aten.erf", True),  # by torch's tag
        ("aten.add_", False),  # writes into its input
        ("aten.rrelu", False),  # tagged, but random
        ("aten.nonzero", False),
        ("aten.no_such_operation", False),
        ("no_such_library.linear", False),
    ],
)
def test_has_rule(name, known):
    assert has_rule(name) is known


def test_an_operation_of_another_library_is_needed_whole():
    call = Operation("mylib.linear", {}, ((3, 5),), ((3, 5),), pointwise=False)
    assert axes(call) == ()


# A second opinion: the strategies torch's DTensor has for the same calls

DIFFERS = {
    "aten.rrelu.default": "random",
    "aten.bernoulli.default": "random",
    "aten.add_.Tensor": "writes into its input",
    "aten.bucketize.Tensor": "adds up what parts of the boundaries count",
    "aten._native_batch_norm_legit_no_training.default": "has statistics to return on CUDA",
    "aten.native_batch_norm.default": "has statistics to return on CUDA",
    "aten._native_batch_norm_legit.default": "writes statistics in training",
}


def dtensor_axes(call, strategies):
    """Axes, as text, of placements of outputs, then inputs, other than parts of sums coming in."""
    placements = pytest.importorskip("torch.distributed.tensor.placement_types")
    count = len(call.run())
    for strategy in strategies:
        outputs, inputs = strategy[:count], strategy[count:]
        spans = [
            {i: Span(p.dim) for i, p in enumerate(side) if hasattr(p, "dim")}
            for side in (inputs, outputs)
        ]
        partial = [isinstance(p, placements.Partial) for p in (*outputs, *inputs)]
        adds = all(partial[:count]) and all(p.reduce_op == "sum" for p in outputs)
        if not any(partial[count:]) and (adds or (not any(partial) and any(spans))):
            yield written(Axis(spans[0], spans[1], sums=adds), count)


def test_all_axes_that_dtensor_knows_are_found():
    tensor = pytest.importorskip("torch.distributed.tensor")
    meta = pytest.importorskip("torch.distributed.tensor._dtensor_spec").TensorMeta
    try:
        known = tensor.DTensor._op_dispatcher.sharding_propagator.op_single_dim_strategy_funcs
    except AttributeError:
        pytest.skip("this torch has no strategies by single dims")
    compared = 0
    for case in table():
        call, want = case.values
        tensors = [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
        short = any(
            length < 2 for tensor in tensors for length in tensor.shape
        )  # it cuts these too
        # It takes a mask to stand for one dim.
        masked = "index" in call.name and any(t.dtype == torch.bool for t in tensors)
        if call.func in known and call.name not in DIFFERS and not short and not masked:
            args, kwargs = tree_map_only(
                Tensor, lambda t: meta(t.shape, t.stride(), t.dtype), (call.args, call.kwargs)
            )
            theirs = dtensor_axes(call, known[call.func].func(call.func, args, kwargs))
            assert set(theirs) <= set(want.split()), call.name
            compared += 1
    assert compared > 60


# The graphs of real models


class TriangleBlock(nn.Module):
    """A pair representation's updates: outer product mean, triangle product, attention."""

    def __init__(self, c=8, heads=2):
        super().__init__()
        self.heads = heads
        self.norm_m, self.norm_z = nn.LayerNorm(c), nn.LayerNorm(c)
        self.left, self.right, self.outer = nn.Linear(c, 3), nn.Linear(c, 3), nn.Linear(9, c)
        self.a, self.b, self.gate = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.qkv, self.bias = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, heads, bias=False)
        self.out = nn.Linear(c, c)

    def forward(self, m, z, mask):
        normed = self.norm_m(m)
        outer = torch.einsum("sic,sjd->ijcd", self.left(normed), self.right(normed))
        z = z + self.outer(outer.flatten(-2) / m.shape[0])

        normed = self.norm_z(z)
        a, b = self.a(normed) * mask[..., None], self.b(normed).sigmoid()
        z = z + self.gate(normed).sigmoid() * torch.einsum("ikc,jkc->ijc", a, b)

        normed = self.norm_z(z)
        q, k, v = self.qkv(normed).unflatten(-1, (self.heads, -1)).transpose(-2, -3).chunk(3, -1)
        bias = self.bias(normed).permute(2, 0, 1)[None]
        scores = q @ k.transpose(-1, -2) + bias
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return z + self.out(attended)


def gpt2(implementation):
    modeling = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = modeling.GPT2Config(
        n_embd=16,
        n_head=2,
        n_layer=1,
        vocab_size=9,
        attn_implementation=implementation,
        bos_token_id=0,
        eos_token_id=0,
    )
    return modeling.GPT2Block(config, layer_idx=0), (x(3, 5, 16),)


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), (x(3, 5, 16),)


def triangle():
    return TriangleBlock(), (x(3, 5, 8), x(5, 5, 8), b(5, 5).double())


MODELS = {
    "gpt2 eager": lambda: gpt2("eager"),
    "gpt2 sdpa": lambda: gpt2("sdpa"),
    "encoder": encoder,
    "triangle": triangle,
}
NO_TENSORS_OUT = {"aten._assert_tensor_metadata", "aten.sym_size", "aten._assert_scalar"}


def exported(name, **options):
    """A model's graph, and its inputs as the graph takes them."""
    torch.manual_seed(0)
    model, args = MODELS[name]()
    program = torch.export.export(model.double().eval(), args, strict=False, **options)
    return program.run_decompositions({}), args


@pytest.mark.filterwarnings("ignore")  # what third parties and torch.export deprecate
@pytest.mark.parametrize("name", MODELS)
def test_every_operation_of_a_model_has_right_axes(name):
    """Each call of the exported graph, on its real values, along each of its axes."""
    checked, unknown, whole = [], set(), set()

    class Checked(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            result = super().call_function(target, args, kwargs)
            if isinstance(target, torch._ops.OpOverload):
                call = Call(target, args, dict(kwargs))
                packet = str(target.overloadpacket)
                if packet not in NO_TENSORS_OUT and not has_rule(packet):
                    unknown.add(packet)
                elif packet not in NO_TENSORS_OUT and not call.axes():
                    whole.add(packet)
                for axis in call.axes():
                    assert_right(call, axis)
                    checked.append(axis)
            return result

    program, args = exported(name)
    with torch.no_grad():
        Checked(program.module(check_guards=False)).run(*args)
    assert not unknown
    assert not whole
    assert len(checked) > 60
