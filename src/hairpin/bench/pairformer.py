"""The Pairformer block (Abramson et al. 2024, Suppl. Alg. 17), widths as in Boltz-1.

Dims: r residues (tokens; i, j, k where a pair needs two), c channels, h heads, d channels of a
head. Single representation ``s[r, c_s]``, pair representation ``z[i, j, c_z]``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths of the block; the defaults are AlphaFold 3's."""

    c_s: int = 384
    c_z: int = 128
    single_heads: int = 16
    pair_heads: int = 4
    head_dim: int = 32
    factor: int = 4


class TriangleMultiplication(nn.Module):
    """Algs 12 (outgoing edges) and 13 (incoming edges)."""

    def __init__(self, size: Size, *, outgoing: bool) -> None:
        super().__init__()
        c = size.c_z
        self.equation = "ikd,jkd->ijd" if outgoing else "kid,kjd->ijd"
        self.norm = nn.LayerNorm(c)
        self.sides = nn.Linear(c, 2 * c, bias=False)
        self.side_gates = nn.Linear(c, 2 * c, bias=False)
        self.norm_out = nn.LayerNorm(c)
        self.out = nn.Linear(c, c, bias=False)
        self.gate = nn.Linear(c, c, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        a, b = (self.sides(z) * self.side_gates(z).sigmoid()).chunk(2, dim=-1)
        x = torch.einsum(self.equation, a, b)
        updated: Tensor = self.out(self.norm_out(x)) * self.gate(z).sigmoid()
        return updated


class TriangleAttention(nn.Module):
    """Algs 14 (around the starting node) and 15 (around the ending node)."""

    def __init__(self, size: Size, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.heads = size.pair_heads
        self.head_dim = size.head_dim
        inner = size.pair_heads * size.head_dim
        self.norm = nn.LayerNorm(size.c_z)
        self.qkv = nn.Linear(size.c_z, 3 * inner, bias=False)
        self.bias = nn.Linear(size.c_z, size.pair_heads, bias=False)
        self.gate = nn.Linear(size.c_z, inner, bias=False)
        self.out = nn.Linear(inner, size.c_z, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        if not self.starting:
            z = z.transpose(0, 1)
        z = self.norm(z)
        q, k, v = (self._heads(x) for x in self.qkv(z).chunk(3, dim=-1))  # [i, h, j, d]
        scores = torch.einsum("ihqd,ihkd->ihqk", q, k) * self.head_dim**-0.5
        weights = (scores + self.bias(z).permute(2, 0, 1)).softmax(-1)
        mixed = torch.einsum("ihqk,ihkd->iqhd", weights, v).flatten(-2)
        updated: Tensor = self.out(self.gate(z).sigmoid() * mixed)
        return updated if self.starting else updated.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim))
        return heads.transpose(-2, -3)


class Transition(nn.Module):
    """Alg. 11: SwiGLU, wider by ``factor`` in the middle."""

    def __init__(self, c: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.up = nn.Linear(c, factor * c, bias=False)
        self.gate = nn.Linear(c, factor * c, bias=False)
        self.down = nn.Linear(factor * c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        changed: Tensor = self.down(F.silu(self.up(x)) * self.gate(x))
        return changed


class AttentionPairBias(nn.Module):
    """Alg. 24 without conditioning: tokens attend to tokens, biased by the pairs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        c = size.c_s
        self.heads = size.single_heads
        self.norm = nn.LayerNorm(c)
        self.q = nn.Linear(c, c)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.norm_z = nn.LayerNorm(size.c_z)
        self.bias = nn.Linear(size.c_z, self.heads, bias=False)
        self.gate = nn.Linear(c, c, bias=False)
        self.out = nn.Linear(c, c, bias=False)

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        s = self.norm(s)
        q, k, v = (self._heads(project(s)) for project in (self.q, self.k, self.v))  # [h, r, d]
        bias = self.bias(self.norm_z(z)).permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(-2)
        updated: Tensor = self.out(self.gate(s).sigmoid() * mixed)
        return updated

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(-2, -3)


class PairformerBlock(nn.Module):
    """Alg. 17, one block without dropout: ``s[r, c_s], z[r, r, c_z] -> (s, z)``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.triangle_outgoing = TriangleMultiplication(size, outgoing=True)
        self.triangle_incoming = TriangleMultiplication(size, outgoing=False)
        self.triangle_starting = TriangleAttention(size, starting=True)
        self.triangle_ending = TriangleAttention(size, starting=False)
        self.pair_transition = Transition(size.c_z, size.factor)
        self.attention = AttentionPairBias(size)
        self.single_transition = Transition(size.c_s, size.factor)

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.triangle_outgoing(z)
        z = z + self.triangle_incoming(z)
        z = z + self.triangle_starting(z)
        z = z + self.triangle_ending(z)
        z = z + self.pair_transition(z)
        s = s + self.attention(s, z)
        s = s + self.single_transition(s)
        return s, z
