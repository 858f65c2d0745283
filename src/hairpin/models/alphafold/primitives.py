"""What the modules of AlphaFold are built of: linear layers, gated attention, shared dropout.

Dims: b rows that attention treats alike, q queries, k keys, h heads, d channels of a head,
c channels.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin import kernels
from hairpin.kernels.attention import MASKED

Init = Literal["default", "relu", "glorot", "normal", "gating", "final"]

_CUT_STD = 0.87962566103423978  # standard deviation of a unit normal cut off at 2


class Linear(nn.Linear):
    """``x[..., c_in] -> [..., c_out]``, started as in Jumper et al. 2021, Suppl. Sec. 1.11.4.

    Args:
        c_in: channels in.
        c_out: channels out.
        bias: add a bias.
        init: ``default`` LeCun, ``relu`` He, ``glorot`` uniform, ``normal`` 1/sqrt(c_in) not cut
            off, ``gating`` open (weights 0, bias 1), ``final`` zero.
        heads: the outputs are this many heads, which is how weight files lay them out.
        heads_in: the same of the inputs.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        bias: bool = True,
        init: Init = "default",
        heads: int | None = None,
        heads_in: int | None = None,
    ) -> None:
        self.init: Init = init
        self.heads = heads
        self.heads_in = heads_in
        super().__init__(c_in, c_out, bias=bias)

    def reset_parameters(self) -> None:
        """Start the parameters anew, as ``init`` says."""
        if self.bias is not None:
            nn.init.constant_(self.bias, 1.0 if self.init == "gating" else 0.0)
        if self.init in {"gating", "final"}:
            nn.init.zeros_(self.weight)
        elif self.init == "glorot":
            nn.init.xavier_uniform_(self.weight)
        elif self.init == "normal":
            nn.init.normal_(self.weight, std=self.in_features**-0.5)
        else:
            scale = 2.0 if self.init == "relu" else 1.0
            std = math.sqrt(scale / self.in_features) / _CUT_STD
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of the last dim: ``x[..., c]`` to the same."""

    def forward(self, x: Tensor) -> Tensor:
        """``x[..., c] -> [..., c]``."""
        return kernels.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Attention(nn.Module):
    """Multi-head attention with an output gate.

    ``x[b, q, c] -> [b, q, c_out]``; keys and values come from ``x`` or from ``memory[b, k, c]``.
    Jumper et al. 2021, Suppl. Algs 7, 8, 13, 14 (gated) and 17 (not gated).

    Args:
        c: channels of the queries' input.
        heads: number of heads.
        c_heads: channels of all heads together; ``c`` if left out.
        c_memory: channels of the memory; ``c`` if left out.
        gated: multiply the heads by a gate made from ``x``.
    """

    def __init__(
        self,
        c: int,
        heads: int,
        *,
        c_heads: int | None = None,
        c_memory: int | None = None,
        gated: bool = True,
    ) -> None:
        super().__init__()
        c_heads = c if c_heads is None else c_heads
        c_memory = c if c_memory is None else c_memory
        self.heads = heads
        self.query = Linear(c, c_heads, bias=False, init="glorot", heads=heads)
        self.key = Linear(c_memory, c_heads, bias=False, init="glorot", heads=heads)
        self.value = Linear(c_memory, c_heads, bias=False, init="glorot", heads=heads)
        self.gate = Linear(c, c_heads, init="gating", heads=heads) if gated else None
        self.output = Linear(c_heads, c, init="final", heads_in=heads)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Attend along the last dim but one.

        Args:
            x: ``[b, q, c]``.
            mask: 1 where a key counts, ``[b, k]``.
            bias: added to every row's logits, ``[h, q, k]``.
            memory: ``[b, k, c_memory]``; ``x`` if left out.

        Returns:
            ``[b, q, c]``.
        """
        memory = x if memory is None else memory
        q = self._heads(self.query(x))
        k, v = self._heads(self.key(memory)), self._heads(self.value(memory))
        y = kernels.attention(q, k, v, mask=mask, bias=bias).transpose(-2, -3).flatten(-2)
        if self.gate is not None:
            y = kernels.gated_residual(y, gate=self.gate(x))
        return self.output(y)  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(-2, -3)  # [b, h, q, d]


class GlobalAttention(nn.Module):
    """One query for a whole row, and keys and values shared by the heads.

    The inner part of Suppl. Alg. 19; ``x[b, q, c], mask[b, q] -> [b, q, c]``.
    """

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(c, c, bias=False, init="glorot", heads=heads)
        self.key = Linear(c, c // heads, bias=False, init="glorot")
        self.value = Linear(c, c // heads, bias=False, init="glorot")
        self.gate = Linear(c, c, init="gating", heads=heads)
        self.output = Linear(c, c, init="final", heads_in=heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend along the last dim but one: ``x[b, q, c], mask[b, q] -> [b, q, c]``."""
        weight = mask[..., None]
        mean = (weight * x).sum(1) / (weight.sum(1) + 1e-10)  # [b, c]
        q = self.query(mean).unflatten(-1, (self.heads, -1))  # [b, h, d]
        k, v = self.key(x), self.value(x)  # [b, k, d]
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + MASKED * (1 - mask[:, None])
        y = (logits.softmax(-1) @ v).flatten(-2)[:, None]  # [b, 1, c]
        return self.output(torch.sigmoid(self.gate(x)) * y)  # type: ignore[no-any-return]


class PairBias(nn.Module):
    """What the pair representation adds to the logits: ``z[i, j, c_z] -> [h, i, j]``.

    Lines 1 to 3 of Suppl. Algs 7, 13 and 14. A module of its own, because it is computed where
    ``z`` is split and used where it must be whole.
    """

    def __init__(self, c_z: int, heads: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(c_z) if norm else nn.Identity()
        self.linear = Linear(c_z, heads, bias=False, init="normal")

    def forward(self, z: Tensor) -> Tensor:
        """``z[i, j, c_z] -> [h, i, j]``."""
        return self.linear(self.norm(z)).permute(2, 0, 1)  # type: ignore[no-any-return]


class SharedDropout(nn.Module):
    """Dropout of an update before it is added; the same all along one dim (Suppl. Sec. 1.11.6).

    ``dim=0`` is the paper's DropoutRowwise, ``dim=1`` its DropoutColumnwise.
    """

    def __init__(self, rate: float, *, dim: int) -> None:
        super().__init__()
        self.rate = rate
        self.dim = dim

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + x``; in training part of ``x`` is zero and the rest scaled up."""
        kept = None
        if self.training and self.rate:
            shape = list(x.shape)
            shape[self.dim] = 1
            kept = F.dropout(x.new_ones(shape), self.rate, training=True)
        return kernels.gated_residual(x, kept=kept, residual=residual)


class Transition(nn.Module):
    """A perceptron at every position (Suppl. Algs 9 and 15): ``x[..., c]`` to the same."""

    def __init__(self, c: int, factor: int) -> None:
        super().__init__()
        self.norm = LayerNorm(c)
        self.linear_1 = Linear(c, factor * c, init="relu")
        self.linear_2 = Linear(factor * c, c, init="final")

    def forward(self, x: Tensor) -> Tensor:
        """``x[..., c] -> [..., c]``."""
        return self.linear_2(F.relu(self.linear_1(self.norm(x))))  # type: ignore[no-any-return]
