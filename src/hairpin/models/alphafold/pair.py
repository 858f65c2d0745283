"""What a block does to the pair representation (Jumper et al. 2021, Suppl. Sec. 1.6.5 to 1.6.7).

Dims: i, j, k residues, c channels, h heads. Pair representation ``z[i, j, c_z]``, its mask
``[i, j]`` with 1 where both residues exist.
"""

from torch import Tensor, nn

from hairpin import kernels
from hairpin.models.alphafold.primitives import (
    Attention,
    LayerNorm,
    Linear,
    PairBias,
    SharedDropout,
    Transition,
)


class TriangleOperands(nn.Module):
    """The two gated operands of a triangle product (lines 1 and 2 of Suppl. Algs 11 and 12).

    A module of its own, because where ``z`` is split one of the two must be whole.
    """

    def __init__(self, c_z: int, c: int) -> None:
        super().__init__()
        self.left_projection = Linear(c_z, c)
        self.right_projection = Linear(c_z, c)
        self.left_gate = Linear(c_z, c, init="gating")
        self.right_gate = Linear(c_z, c, init="gating")

    def forward(self, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``z[i, j, c_z], mask[i, j] -> [i, j, c], [i, j, c]``."""
        left = _gated(self.left_projection, self.left_gate)
        right = _gated(self.right_projection, self.right_gate)
        a, b = kernels.gated_projections(z, mask, left, right)
        return a, b


class FusedTriangleOperands(nn.Module):
    """The same from one projection and one gate, as AlphaFold-Multimer v3 lays them out."""

    def __init__(self, c_z: int, c: int) -> None:
        super().__init__()
        self.projection = Linear(c_z, 2 * c)
        self.gate = Linear(c_z, 2 * c, init="gating")

    def forward(self, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``z[i, j, c_z], mask[i, j] -> [i, j, c], [i, j, c]``."""
        (both,) = kernels.gated_projections(z, mask, _gated(self.projection, self.gate))
        a, b = both.chunk(2, -1)
        return a, b


def _gated(layer: Linear, gate: Linear) -> kernels.GatedLinear:
    return kernels.GatedLinear(layer.weight, layer.bias, gate.weight, gate.bias)


class TriangleProduct(nn.Module):
    """The sum over the third residue (line 4 of Suppl. Algs 11 and 12), channel by channel.

    Outgoing: ``a[i, k, c], b[j, k, c] -> [i, j, c]``; incoming: ``a[k, j, c], b[k, i, c]``.
    """

    def __init__(self, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Both operands ``[r, r, c]``, to ``[i, j, c]``."""
        a, b = a.permute(2, 0, 1), b.permute(2, 0, 1)
        product = a @ b.transpose(-1, -2) if self.outgoing else b.transpose(-1, -2) @ a
        return product.permute(1, 2, 0)


class TriangleMultiplication(nn.Module):
    """Suppl. Alg. 11 (outgoing edges) or 12 (incoming): ``z[i, j, c_z] -> [i, j, c_z]``.

    Args:
        c_z: channels of the pair representation.
        c: channels of the two operands.
        outgoing: multiply along rows, else along columns.
        fused: one projection and one gate give both operands.
    """

    def __init__(self, c_z: int, c: int, *, outgoing: bool, fused: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(c_z)
        self.operands = FusedTriangleOperands(c_z, c) if fused else TriangleOperands(c_z, c)
        self.product = TriangleProduct(outgoing=outgoing)
        self.center_norm = LayerNorm(c)
        self.output_projection = Linear(c, c_z, init="final")
        self.gating_linear = Linear(c_z, c_z, init="gating")

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """``z[i, j, c_z], mask[i, j] -> [i, j, c_z]``."""
        z = self.norm(z)
        a, b = self.operands(z, mask)
        update: Tensor = self.output_projection(self.center_norm(self.product(a, b)))
        return kernels.gated_residual(update, gate=self.gating_linear(z))


class TriangleAttention(nn.Module):
    """Suppl. Alg. 13 (around the starting node) or 14 (ending): ``z[i, j, c_z] -> [i, j, c_z]``."""

    def __init__(self, c_z: int, heads: int, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.query_norm = LayerNorm(c_z)
        self.pair_bias = PairBias(c_z, heads, norm=False)
        self.attention = Attention(c_z, heads)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """``z[i, j, c_z], mask[i, j] -> [i, j, c_z]``."""
        if not self.starting:
            z, mask = z.transpose(0, 1), mask.transpose(0, 1)
        z = self.query_norm(z)
        update: Tensor = self.attention(z, mask, self.pair_bias(z))
        return update if self.starting else update.transpose(0, 1)


class PairStack(nn.Module):
    """Triangle updates and a transition: lines 6 to 10 of Suppl. Alg. 6; a block of Alg. 16.

    ``z[i, j, c_z] -> [i, j, c_z]``, residual connections inside.

    Args:
        c_z: channels of the pair representation.
        c_triangle: channels of the operands of triangle multiplication.
        heads: heads of triangle attention.
        factor: how much wider the transition is inside.
        dropout: rate after each triangle update.
        fused: one projection gives both operands of triangle multiplication.
        attention_first: attention before multiplication, as in the monomer's template stack.
    """

    def __init__(
        self,
        c_z: int,
        *,
        c_triangle: int,
        heads: int,
        factor: int,
        dropout: float,
        fused: bool = False,
        attention_first: bool = False,
    ) -> None:
        super().__init__()
        self.attention_first = attention_first
        self.triangle_multiplication_outgoing = TriangleMultiplication(
            c_z, c_triangle, outgoing=True, fused=fused
        )
        self.triangle_multiplication_incoming = TriangleMultiplication(
            c_z, c_triangle, outgoing=False, fused=fused
        )
        self.triangle_attention_starting_node = TriangleAttention(c_z, heads, starting=True)
        self.triangle_attention_ending_node = TriangleAttention(c_z, heads, starting=False)
        self.pair_transition = Transition(c_z, factor)
        self.dropout_row = SharedDropout(dropout, dim=0)
        self.dropout_column = SharedDropout(dropout, dim=1)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """``z[i, j, c_z], mask[i, j] -> [i, j, c_z]``."""
        if self.attention_first:
            z = self._multiply(self._attend(z, mask), mask)
        else:
            z = self._attend(self._multiply(z, mask), mask)
        return z + self.pair_transition(z)  # type: ignore[no-any-return]

    def _multiply(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.dropout_row(self.triangle_multiplication_outgoing(z, mask), z)
        return self.dropout_row(self.triangle_multiplication_incoming(z, mask), z)  # type: ignore[no-any-return]

    def _attend(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.dropout_row(self.triangle_attention_starting_node(z, mask), z)
        return self.dropout_column(self.triangle_attention_ending_node(z, mask), z)  # type: ignore[no-any-return]
