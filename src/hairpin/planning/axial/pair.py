"""The updates of a pair representation that is split (Jumper et al. 2021, Suppl. Algs 11 to 15).

``z[i, j, c]`` is held along i; only attention around the ending node and the transition after it
run along j. So a block turns ``z`` twice. Published dynamic axial parallelism (FastFold, Cheng et
al. 2022) turns it four times: here the incoming product stays held along i, where each rank has the
terms of its own third residues, and adds the terms up over the ranks. On a grid products run where
pairs are held along both dims, which is half the way from j to i.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hairpin import kernels
from hairpin.comm.pending import Pending
from hairpin.planning.axial.attention import attend, crossing
from hairpin.planning.axial.grid import Grid
from hairpin.planning.axial.grid_products import grid_incoming, grid_outgoing
from hairpin.planning.axial.pieces import by_rows, turned_rows
from hairpin.planning.axial.products import ring_incoming, ring_outgoing
from hairpin.planning.axial.way import Line, Way

Module = Any  # one of the model's, which this floor does not import


def pair_stack(  # noqa: PLR0917  # what is last is seldom given
    stack: Module,
    z: Tensor,
    mask: Tensor,
    way: Way,
    held: str,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor, str]:
    """All updates of one block of pairs.

    Args:
        stack: has the submodules of the model's ``PairStack``.
        z: ``[i, j, c]``, held along ``held``.
        mask: whole, ``[i, j]``.
        between: done between products and attention.

    Returns:
        ``z`` and how it is held then.
    """
    if stack.attention_first:
        z = _attend(stack, _held(z, held, "i", way), mask, way)
        between()
        z = _multiply(stack, _held(z, "j", way.multiplied, way), mask, way)
        return _transition(stack, z, way), way.multiplied
    z = _multiply(stack, _held(z, held, way.multiplied, way), mask, way)
    between()
    z = _attend(stack, _held(z, way.multiplied, "i", way), mask, way)
    return _transition(stack, z.transpose(0, 1), way).transpose(0, 1), "j"


def _transition(stack: Module, z: Tensor, way: Way) -> Tensor:
    """Suppl. Alg. 15, and its residual: the dim that is held comes first."""
    return by_rows(lambda rows: z[rows] + stack.pair_transition(z[rows]), len(z), way)


def _held(z: Tensor, src: str, dst: str, way: Way) -> Tensor:
    return z if src == dst else way.turn(z, "i j c", src, dst).wait()


def _multiply(stack: Module, z: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Both triangle products, ``z`` held as for them."""
    for update in (stack.triangle_multiplication_outgoing, stack.triangle_multiplication_incoming):
        z = way.drop(stack.dropout_row, _triangle_product(update, z, way.own(mask), way), z)
    return z


def _attend(stack: Module, z: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Both triangle attentions: ``z`` held along i, then along j."""
    starting, ending = stack.triangle_attention_starting_node, stack.triangle_attention_ending_node
    normed = starting.query_norm(z)
    bias = crossing(starting.pair_bias(normed), "q", way)
    own = mask[way.mine("i")]

    def rows(some: slice) -> Tensor:
        update = attend(starting.attention, normed[some], own[some], bias, way)
        return stack.dropout_row(update, z[some])  # type: ignore[no-any-return]

    z = turned_rows(rows, len(z), ("i j c", "i", "j"), way)
    update = _ending(ending, z.transpose(0, 1), mask.T[way.mine("j")], way).transpose(0, 1)
    return stack.dropout_column(update, z)  # type: ignore[no-any-return]


def _ending(module: Module, z: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Suppl. Alg. 14 of transposed pairs ``z[j, i, c]`` and their mask, held along j."""
    z = module.query_norm(z)
    bias = crossing(module.pair_bias(z), "q", way)
    if way.passing == "ring":
        return attend(module.attention, z, mask, bias, way)
    return by_rows(
        lambda rows: attend(module.attention, z[rows], mask[rows], bias, way), len(z), way
    )


def _triangle_product(module: Module, z: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Suppl. Alg. 11 or 12: ``z[i, j, c]`` and ``mask[i, j]`` held as for products."""
    a, b = by_rows(
        lambda rows: torch.stack(module.operands(module.norm(z[rows]), mask[rows]), 1), len(z), way
    ).unbind(1)
    product = _PRODUCTS[way.product](module.product, a, b, way)
    del a, b

    def gated(rows: slice) -> Tensor:
        return module.gating_linear(module.norm(z[rows]))  # type: ignore[no-any-return]

    gate = gated(slice(None)) if way.chunks == 1 else None  # behind what was started
    x = product.wait()
    del product

    def update(rows: slice) -> Tensor:
        centred = module.center_norm(x[rows])
        own = gated(rows) if gate is None else gate[rows]
        return kernels.gated_residual(module.output_projection(centred), gate=own)

    return by_rows(update, len(z), way)


# ------------------------------------------------------------------------- how products cross


def _gathered(product: nn.Module, a: Tensor, b: Tensor, way: Line) -> Pending:
    """The right operand whole on every rank; or its terms whole, and added up."""
    if product.outgoing:
        right = way.whole(b, "i j c", "i")
        return Pending(lambda: product(a, right.wait()))
    return way.summed(product(a, b), "i j c", "i")


def _around(product: nn.Module, a: Tensor, b: Tensor, way: Line) -> Pending:
    """The right operand passes by; or the terms do, and grow on their way."""
    ring = ring_outgoing if product.outgoing else ring_incoming
    done = ring(a, b, way)
    return Pending(lambda: done)


def _by_channels(product: nn.Module, a: Tensor, b: Tensor, way: Line) -> Pending:
    """Channels do not meet in a product: each rank computes some of them, of all pairs."""
    coming = deque(
        (left.shape[-1], way.turn(left, "i j c", "i", "c"), way.turn(right, "i j c", "i", "c"))
        for left, right in zip(a.chunk(way.pieces, -1), b.chunk(way.pieces, -1), strict=True)
    )

    def done() -> Tensor:
        back = []
        while coming:
            channels, left, right = coming.popleft()
            some = replace(way, lengths={**way.lengths, "c": channels})
            back.append(some.turn(product(left.wait(), right.wait()), "i j c", "c", "i"))
        return torch.cat([part.wait() for part in back], -1)

    return Pending(done)


def _both_ways(product: nn.Module, a: Tensor, b: Tensor, way: Grid) -> Pending:
    """On a grid: panels cross its rows, what belongs to them its columns."""
    multiply = grid_outgoing if product.outgoing else grid_incoming
    done = multiply(a, b, way)
    return Pending(lambda: done)


_PRODUCTS: dict[str, Callable[[nn.Module, Tensor, Tensor, Any], Pending]] = {
    "gather": _gathered,
    "ring": _around,
    "channels": _by_channels,
    "grid": _both_ways,
}
