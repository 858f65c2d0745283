"""The Evoformer block (Jumper et al. 2021, Suppl. Algs 6-15), and the same block chunked by hand.

Dims: s sequences, r residues (i, j, k where a pair needs two), c channels, h heads, d channels of a
head. MSA ``m[s, r, c_m]``, pair representation ``z[i, j, c_z]``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths of the block; the defaults are AlphaFold's, which OpenFold keeps."""

    c_m: int = 256
    c_z: int = 128
    msa_heads: int = 8
    pair_heads: int = 4
    head_dim: int = 32
    outer: int = 32
    triangle: int = 128
    factor: int = 4


class GatedAttention(nn.Module):
    """Multi-head attention along the last dim but one, with a bias and an output gate.

    The inner part of Algs 7, 8, 13 and 14: ``x[b, q, c], bias[h, q, k] -> [b, q, c]``.
    """

    def __init__(self, c: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.q = nn.Linear(c, heads * head_dim, bias=False)
        self.k = nn.Linear(c, heads * head_dim, bias=False)
        self.v = nn.Linear(c, heads * head_dim, bias=False)
        self.gate = nn.Linear(c, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, c)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)  # [b, h, q, k]
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(-1) @ v
        mixed = mixed.transpose(-2, -3).flatten(-2)
        gated: Tensor = self.out(torch.sigmoid(self.gate(x)) * mixed)
        return gated

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return heads.transpose(-2, -3)


class RowAttentionWithPairBias(nn.Module):
    """Alg. 7: each sequence attends along its residues, biased by the pairs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.c_m)
        self.norm_z = nn.LayerNorm(size.c_z)
        self.bias = nn.Linear(size.c_z, size.msa_heads, bias=False)
        self.attention = GatedAttention(size.c_m, size.msa_heads, size.head_dim)

    def forward(self, m: Tensor, z: Tensor) -> Tensor:
        bias = self.bias(self.norm_z(z)).permute(2, 0, 1)  # [h, i, j]
        attended: Tensor = self.attention(self.norm(m), bias)
        return attended


class ColumnAttention(nn.Module):
    """Alg. 8: each residue attends along the sequences."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.c_m)
        self.attention = GatedAttention(size.c_m, size.msa_heads, size.head_dim)

    def forward(self, m: Tensor) -> Tensor:
        attended: Tensor = self.attention(self.norm(m.transpose(0, 1)))
        return attended.transpose(0, 1)


class Transition(nn.Module):
    """Algs 9 and 15: two linear layers, wider by ``factor`` between them."""

    def __init__(self, c: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.up = nn.Linear(c, factor * c)
        self.down = nn.Linear(factor * c, c)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.down(F.relu(self.up(self.norm(x))))
        return changed


class OuterProductMean(nn.Module):
    """Alg. 10: ``m[s, r, c_m] -> z[i, j, c_z]``, the mean over sequences of outer products."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.c_m)
        self.left = nn.Linear(size.c_m, size.outer)
        self.right = nn.Linear(size.c_m, size.outer)
        self.out = nn.Linear(size.outer**2, size.c_z)

    def forward(self, m: Tensor) -> Tensor:
        m = self.norm(m)
        return self.outer(self.left(m), self.right(m))

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """``a[s, i, c], b[s, j, e] -> z[i, j, c_z]``."""
        products = torch.einsum("sic,sje->ijce", a, b).flatten(-2) / a.shape[0]
        z: Tensor = self.out(products)
        return z


class TriangleMultiplication(nn.Module):
    """Algs 11 (outgoing edges) and 12 (incoming edges)."""

    def __init__(self, size: Size, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.norm = nn.LayerNorm(size.c_z)
        self.left = nn.Linear(size.c_z, size.triangle)
        self.left_gate = nn.Linear(size.c_z, size.triangle)
        self.right = nn.Linear(size.c_z, size.triangle)
        self.right_gate = nn.Linear(size.c_z, size.triangle)
        self.norm_out = nn.LayerNorm(size.triangle)
        self.out = nn.Linear(size.triangle, size.c_z)
        self.gate = nn.Linear(size.c_z, size.c_z)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        a = torch.sigmoid(self.left_gate(z)) * self.left(z)
        b = torch.sigmoid(self.right_gate(z)) * self.right(z)
        updated: Tensor = torch.sigmoid(self.gate(z)) * self.out(self.norm_out(self.product(a, b)))
        return updated

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``x[i, j, c]``, the sum over k of ``a[i, k] b[j, k]`` or ``a[k, i] b[k, j]``."""
        if self.outgoing:
            x = a.permute(2, 0, 1) @ b.permute(2, 1, 0)
        else:
            x = a.permute(2, 1, 0) @ b.permute(2, 0, 1)
        return x.permute(1, 2, 0)


class TriangleAttention(nn.Module):
    """Algs 13 (around the starting node) and 14 (around the ending node)."""

    def __init__(self, size: Size, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(size.c_z)
        self.bias = nn.Linear(size.c_z, size.pair_heads, bias=False)
        self.attention = GatedAttention(size.c_z, size.pair_heads, size.head_dim)

    def forward(self, z: Tensor) -> Tensor:
        if not self.starting:
            z = z.transpose(0, 1)
        z = self.norm(z)
        attended: Tensor = self.attention(z, self.bias(z).permute(2, 0, 1))
        return attended if self.starting else attended.transpose(0, 1)


class EvoformerBlock(nn.Module):
    """Alg. 6 without dropout: ``m[s, r, c_m], z[r, r, c_z] -> (m, z)``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.row_attention = RowAttentionWithPairBias(size)
        self.column_attention = ColumnAttention(size)
        self.msa_transition = Transition(size.c_m, size.factor)
        self.outer_product_mean = OuterProductMean(size)
        self.triangle_outgoing = TriangleMultiplication(size, outgoing=True)
        self.triangle_incoming = TriangleMultiplication(size, outgoing=False)
        self.triangle_starting = TriangleAttention(size, starting=True)
        self.triangle_ending = TriangleAttention(size, starting=False)
        self.pair_transition = Transition(size.c_z, size.factor)

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        m = m + self.row_attention(m, z)
        m = m + self.column_attention(m)
        m = m + self.msa_transition(m)
        z = z + self.outer_product_mean(m)
        z = z + self.triangle_outgoing(z)
        z = z + self.triangle_incoming(z)
        z = z + self.triangle_starting(z)
        z = z + self.triangle_ending(z)
        z = z + self.pair_transition(z)
        return m, z


def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Fill every parameter at random, so that no norm, gate or bias hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return model


# ------------------------------------------------------------------------------- chunked by hand


class HandChunked(nn.Module):
    """An Evoformer block chunked the way OpenFold does it for inference; a baseline.

    After ``openfold/model`` (msa, triangular_attention, outer_product_mean, pair_transition,
    triangular_multiplicative_update; Ahdritz et al. 2024, doi 10.1038/s41592-024-02272-z). Loops
    run over the first dim of each attention, transition and outer product; their outputs are
    written into a tensor allocated once; sums are in place. Norms inside the loop where OpenFold
    has them (MSA attention, transitions), before it where it has not (triangle attention).

    Args:
        block: its parameters are shared, not copied.
        chunk_size: rows per turn of every loop.
        in_place_triangles: OpenFold's ``inplace_safe`` triangle multiplications, which write the
            update over the pair representation column by column (2.5 instead of 5 times its
            bytes), outputs of triangle attention over its normed input and outer products over
            nothing else. Without it, they run whole, as in OpenFold's standard path.
        triangle_chunk_size: columns per turn of the in-place triangle multiplication.
    """

    def __init__(
        self,
        block: EvoformerBlock,
        chunk_size: int,
        *,
        in_place_triangles: bool = False,
        triangle_chunk_size: int = 256,
    ) -> None:
        super().__init__()
        self.block = block
        self.chunk_size = chunk_size
        self.in_place_triangles = in_place_triangles
        self.triangle_chunk_size = triangle_chunk_size

    @torch.no_grad()
    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As the block's, without gradients; the arguments are left as they were."""
        block, size = self.block, self.chunk_size
        m = m + _row_attention(block.row_attention, m, z, size)
        m += _column_attention(block.column_attention, m, size)
        m += chunked(block.msa_transition, m, size)
        z = z + _outer_product_mean(block.outer_product_mean, m, size)
        for multiplication in (block.triangle_outgoing, block.triangle_incoming):
            if self.in_place_triangles:
                _multiply_in_place(multiplication, z, self.triangle_chunk_size)
            else:
                z += multiplication(z)
        z += _triangle_attention(block.triangle_starting, z, size, reuse=self.in_place_triangles)
        z = z.transpose(0, 1)
        z += _triangle_attention(block.triangle_ending, z, size, reuse=self.in_place_triangles)
        z = z.transpose(0, 1)
        z += chunked(block.pair_transition, z, size)
        return m, z


def chunked(
    function: Callable[[Tensor], Tensor], x: Tensor, size: int, *, out: Tensor | None = None
) -> Tensor:
    """``function`` of ``size`` rows of ``x`` at a time, written into ``out``: its chunk_layer.

    ``out`` may be ``x`` itself: a turn has read its rows before it writes them.
    """
    for start in range(0, x.shape[0], size):
        part = function(x[start : start + size])
        if out is None:
            out = part.new_zeros((x.shape[0], *part.shape[1:]))
        out[start : start + size] = part
        del part
    assert out is not None
    return out


def _row_attention(layer: RowAttentionWithPairBias, m: Tensor, z: Tensor, size: int) -> Tensor:
    # OpenFold makes the bias of 256 rows of pairs at a time
    biases = [layer.bias(layer.norm_z(rows)) for rows in z.split(256)]
    bias = torch.cat(biases).permute(2, 0, 1)
    del biases
    return chunked(lambda rows: layer.attention(layer.norm(rows), bias), m, size)


def _column_attention(layer: ColumnAttention, m: Tensor, size: int) -> Tensor:
    columns = chunked(lambda part: layer.attention(layer.norm(part)), m.transpose(0, 1), size)
    return columns.transpose(0, 1)


def _outer_product_mean(layer: OuterProductMean, m: Tensor, size: int) -> Tensor:
    m = layer.norm(m)
    a, b = layer.left(m), layer.right(m)
    del m
    return chunked(lambda part: layer.outer(part.transpose(0, 1), b), a.transpose(0, 1), size)


def _triangle_attention(layer: TriangleAttention, z: Tensor, size: int, *, reuse: bool) -> Tensor:
    """``z`` is already turned round for the ending node."""
    z = layer.norm(z)
    bias = layer.bias(z).permute(2, 0, 1)
    return chunked(lambda rows: layer.attention(rows, bias), z, size, out=z if reuse else None)


def _multiply_in_place(layer: TriangleMultiplication, z: Tensor, size: int) -> None:
    """``z += layer(z)``, with one projection held whole and half of ``z`` set aside.

    OpenFold's scheme: output columns ``[:, j]`` replace ``z[:, j]``. Incoming edges need only those
    same columns of ``z`` besides ``a``. Outgoing edges need rows ``z[j, :]``, part of which columns
    done before have overwritten, so a cache keeps the original: its left half as long as upper rows
    are read, then the lower rows with their right half.
    """
    a = _left_projection(layer, z, size)
    cache = _Cache(z) if layer.outgoing else None
    for start, stop in _turns(z.shape[0], size):
        columns = z[:, start:stop]
        rows = columns if cache is None else cache.rows(start, stop)
        b = _project(layer.norm(rows), layer.right, layer.right_gate)
        b = b.permute(2, 1, 0) if layer.outgoing else b.permute(2, 0, 1)  # [c, k, j]
        del rows
        update = layer.out(layer.norm_out((a @ b).permute(1, 2, 0)))
        del b
        update *= torch.sigmoid(layer.gate(layer.norm(columns)))
        columns += update
        del update


def _left_projection(layer: TriangleMultiplication, z: Tensor, size: int) -> Tensor:
    """``a[c, i, k]``, made from ``size`` rows of ``z`` at a time."""
    out = z.new_empty((layer.left.out_features, *z.shape[:2]))
    for start in range(0, z.shape[0], size):
        rows = layer.norm(z[start : start + size])
        part = _project(rows, layer.left, layer.left_gate)
        if layer.outgoing:
            out[:, start : start + size] = part.permute(2, 0, 1)
        else:
            out[:, :, start : start + size] = part.permute(2, 1, 0)
        del rows, part
    return out


def _project(rows: Tensor, linear: nn.Linear, gate: nn.Linear) -> Tensor:
    projected: Tensor = gate(rows).sigmoid_()
    projected *= linear(rows)
    return projected


def _turns(n: int, size: int) -> list[tuple[int, int]]:
    """Parts of ``n`` of at most ``size``, none of which straddles the middle."""
    half = (n + 1) // 2
    starts = (*range(0, half, size), *range(half, n, size))
    return list(zip(starts, (*starts[1:], n), strict=True))


class _Cache:
    """What rows of ``z[i, j, c]`` were before columns, from the left on, are overwritten.

    Holds half of ``z``: first its left half of columns; from the middle row on, in the same bytes
    and turned round, the lower half of its rows.
    """

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.half = (z.shape[0] + 1) // 2
        self.kept = z[:, : self.half].contiguous()
        self.lower = False

    def rows(self, start: int, stop: int) -> Tensor:
        """The original ``z[start:stop, :]``; parts are asked for in order, up to the middle."""
        if start >= self.half:
            if not self.lower:
                self._turn_round()
            return self.kept[start - self.half : stop - self.half]
        rows = self.z[start:stop].clone()
        rows[:, : self.half] = self.kept[start:stop]
        return rows

    def _turn_round(self) -> None:
        lower_left = self.kept[self.half :]
        self.kept = self.kept.transpose(0, 1)[: self.z.shape[0] - self.half]
        # the bytes written first held the upper rows, which are done; then those of lower_left
        self.kept[:, : self.half] = lower_left
        self.kept[:, self.half :] = self.z[self.half :, self.half :]
        self.lower = True
