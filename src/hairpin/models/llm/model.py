"""A language model of the Llama family.

Touvron et al. (2023), "LLaMA": blocks of attention and an MLP behind a norm of the root mean
square (Zhang & Sennrich, 2019), gated by SiLU (SwiGLU; Shazeer, 2020), with rotary positions (Su et
al., 2021, "RoFormer"). Ainslie et al. (2023), "GQA": groups of heads share a key and a value.

Dims: b batch, s positions, c channels, v vocabulary, h heads, g key/value heads, d channels of a
head.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.errors import RecipeError
from hairpin.kernels.routed import SoftmaxAttention


@dataclass(frozen=True)
class LLMConfig:
    """Sizes of an `LLM`; `hidden` is the width of the MLP, `rotary_base` the slowest turn."""

    vocabulary: int = 256
    channels: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 352
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.channels % (2 * self.heads):
            raise RecipeError(
                f"channels={self.channels} over heads={self.heads} must give an even number of "
                f"channels per head (rotary positions turn pairs); change channels or heads"
            )
        if self.heads % self.kv_heads:
            raise RecipeError(
                f"heads={self.heads} cannot share kv_heads={self.kv_heads} evenly; give a "
                f"number of kv_heads that divides heads"
            )


def tiny() -> LLMConfig:
    """The smallest model with every part in it, for tests: about 35 thousand parameters."""
    return LLMConfig(channels=32, depth=2, heads=4, kv_heads=2, hidden=64)


def small() -> LLMConfig:
    """A model of bytes that learns on one core in minutes: 0.8 million parameters."""
    return LLMConfig()


class LLM(nn.Module):
    """Predicts each next token from those up to it."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.head = nn.Linear(config.channels, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights; those that write into the stream start smaller (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) ** out)

    def forward(
        self, tokens: Int[Tensor, "b s"], positions: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s v"]:
        """The logits of the token after each one; positions count from 0 if left out."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the stream."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.mlp = MLP(config.channels, config.hidden)

    def forward(
        self, x: Float[Tensor, "b s c"], positions: Int[Tensor, "b s"]
    ) -> Float[Tensor, "b s c"]:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal attention with rotary positions; groups of heads share a key and a value."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.head_dim = d = config.channels // config.heads
        self.rotary_base = config.rotary_base
        self.to_q = nn.Linear(config.channels, config.heads * d, bias=False)
        self.to_k = nn.Linear(config.channels, config.kv_heads * d, bias=False)
        self.to_v = nn.Linear(config.channels, config.kv_heads * d, bias=False)
        self.attend = SoftmaxAttention(causal=True)
        self.to_out = nn.Linear(config.heads * d, config.channels, bias=False)

    def forward(
        self, x: Float[Tensor, "b s c"], positions: Int[Tensor, "b s"]
    ) -> Float[Tensor, "b s c"]:
        projected = (self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        angle = rotary_angles(positions, self.head_dim, base=self.rotary_base, like=x)
        y = self.attend(rotate(q, angle), rotate(k, angle), v)  # [b, h, s, d]
        return self.to_out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear maps up, one of them a gate, and one down (SwiGLU)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(channels, hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def rotary_angles(
    positions: Int[Tensor, "b s"], head_dim: int, *, base: float, like: Tensor
) -> Float[Tensor, "b 1 s d/2"]:
    """How far each pair of channels turns; counted in double precision, for positions are many."""
    pair = torch.arange(head_dim // 2, device=like.device, dtype=torch.float64)
    turned = positions[:, None, :, None] * base ** (-2 * pair / head_dim)
    return (turned % (2 * math.pi)).to(torch.promote_types(like.dtype, torch.float32))


def rotate(
    x: Float[Tensor, "b h s d"], angle: Float[Tensor, "b 1 s d/2"]
) -> Float[Tensor, "b h s d"]:
    """Turns channel i with channel i + d/2 by the angles of their position (RoPE)."""
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(angle.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
