"""The plain 2-D transformer that every method of the benchmark computes.

Pairs of layers: attention and MLP along patches, then along frames. Pre-norm, multi-head.

Dims: b batch, t frames, s patches, c channels, h heads, d channels of a head; ``qkv`` is
``[b, t, s, 3, h, d]``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hairpin.errors import HairpinError

Attend = Callable[[Tensor], Tensor]


class SizeError(HairpinError, ValueError):
    """The sizes of the transformer do not fit each other."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the transformer and of its input ``x[b, t, s, c]``."""

    b: int = 1
    t: int = 16
    s: int = 256
    c: int = 64
    heads: int = 4
    pairs: int = 1
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.c % self.heads:
            raise SizeError(
                f"{self.c} channels do not divide into {self.heads} heads; choose channels that "
                "are a multiple of the heads"
            )

    @property
    def activation_elements(self) -> int:
        """Elements of one whole activation ``x[b, t, s, c]``."""
        return self.b * self.t * self.s * self.c


class Layer(nn.Module):
    """Attention along one dim, then an MLP: ``x[b, t, s, c] -> x[b, t, s, c]``."""

    def __init__(self, size: Size, *, along: str) -> None:
        super().__init__()
        hidden = size.mlp_ratio * size.c
        self.along = along
        self.heads = size.heads
        self.norm1 = nn.LayerNorm(size.c)
        self.qkv = nn.Linear(size.c, 3 * size.c)
        self.out = nn.Linear(size.c, size.c)
        self.norm2 = nn.LayerNorm(size.c)
        self.up = nn.Linear(size.c, hidden)
        self.down = nn.Linear(hidden, size.c)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """``attend``: ``qkv[b, t, s, 3, h, d] -> [b, t, s, h, d]``; default: on this rank alone."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        mixed = attention(qkv, along=self.along) if attend is None else attend(qkv)
        x = x + self.out(mixed.flatten(-2))
        mlp: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + mlp


class Transformer2d(nn.Module):
    """``pairs`` of layers, along ``s`` and along ``t`` in turn."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(size, along=along) for _ in range(size.pairs) for along in ("s", "t")
        )

    def __iter__(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def forward(self, x: Tensor) -> Tensor:
        """``x[b, t, s, c] -> x[b, t, s, c]`` in one process."""
        for layer in self:
            x = layer(x)
        return x


def attention(qkv: Tensor, *, along: str) -> Tensor:
    """Softmax attention of ``qkv[b, t, s, 3, h, d]`` along ``t`` or ``s``: ``[b, t, s, h, d]``."""
    q, k, v = (fold(x, along=along) for x in qkv.unbind(3))
    return unfold(F.scaled_dot_product_attention(q, k, v), batch=qkv.shape[0], along=along)


def fold(x: Tensor, *, along: str) -> Tensor:
    """``x[b, t, s, h, d] -> [(b t), h, s, d]`` along ``s``, ``-> [(b s), h, t, d]`` along ``t``."""
    if along == "t":
        x = x.transpose(1, 2)
    return x.flatten(0, 1).transpose(1, 2)


def unfold(x: Tensor, *, batch: int, along: str) -> Tensor:
    """The inverse of :func:`fold`, for ``batch`` items."""
    x = x.transpose(1, 2)
    x = x.unflatten(0, (batch, x.shape[0] // batch))
    return x.transpose(1, 2) if along == "t" else x


def build(size: Size, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer2d:
    """A transformer with the same random weights on every rank.

    Biases and norms are random too, so that a wrong gradient of one cannot hide behind a zero.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer2d(size).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.1
            parameter.copy_(noise * scale + (1 if name.endswith("norm1.weight") else 0))
    return model
