"""A vision transformer that classifies images or films of any size.

Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words": patches are embedded linearly, a class
token goes before them, and its state at the end is classified. Learned positions are interpolated
for another size (their Sec. 3.2); fixed ones are sines and cosines of each coordinate (Beyer et
al., 2022, "Better plain ViT baselines for ImageNet-1k").

Dims: b batch, k colours, c channels, n patches, s positions of the stream (the class token and the
patches), h heads, d channels of a head, v classes, p values of a patch. The dims of space, or of
time and space, are written `*size`, and `*grid` in patches.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.errors import DataError, RecipeError
from hairpin.kernels.routed import SoftmaxAttention


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`.

    `patch` gives a patch's size along each dim, two for an image and three for a film; `size` is
    that of the images that the positions are made for, in pixels (and frames).
    """

    patch: tuple[int, ...] = (2, 2)
    size: tuple[int, ...] = (8, 8)
    colours: int = 1
    classes: int = 10
    positions: Literal["learned", "sincos"] = "learned"
    channels: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int = 128

    def __post_init__(self) -> None:
        if len(self.patch) not in (2, 3) or len(self.size) != len(self.patch):
            raise RecipeError(
                f"patch={self.patch} and size={self.size} must have two numbers each (an image) or "
                f"three (a film)"
            )
        if min(self.patch) < 1 or min(self.size) < 1:
            raise RecipeError(f"patch={self.patch} and size={self.size} must be 1 or more each")
        if self.positions not in ("learned", "sincos"):
            raise RecipeError(f"positions={self.positions!r}; give 'learned' or 'sincos'")
        if self.channels % self.heads:
            raise RecipeError(
                f"channels={self.channels} cannot be shared by heads={self.heads}; give a number "
                f"of heads that divides channels"
            )
        if self.positions == "sincos" and self.channels % (2 * len(self.patch)):
            raise RecipeError(
                f"channels={self.channels} must be a multiple of {2 * len(self.patch)} for sines "
                f"and cosines of {len(self.patch)} coordinates"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each dim that the positions are made for."""
        return patches_along(self.size, self.patch)


def tiny() -> ViTConfig:
    """The smallest model with every part in it, for tests: about 18 thousand parameters."""
    return ViTConfig(channels=32, depth=2, heads=4, hidden=64)


def digits() -> ViTConfig:
    """The model of 8 x 8 handwritten digits: 0.1 million parameters."""
    return ViTConfig()


def photos() -> ViTConfig:
    """The model of how a piece of a photograph is turned: 0.8 million parameters."""
    return ViTConfig(
        patch=(8, 8), size=(75, 75), colours=3, classes=4, channels=128, depth=6, hidden=256
    )


class ViT(nn.Module):
    """Classifies an image, or a film, of any size."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.patch_embed = nn.Linear(config.colours * math.prod(config.patch), c)
        self.class_token = nn.Parameter(torch.empty(c))
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(*config.grid, c))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(c)
        self.head = nn.Linear(c, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the linear maps of the blocks, zeros for the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.class_token, std=0.02)
        if self.config.positions == "learned":
            nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Float[Tensor, "b k *size"]) -> Float[Tensor, "b v"]:
        """The logits of each image's class.

        A size that is no multiple of the patch is filled up with zeros at the far end of the dim,
        so that the last patch is whole: no pixel is left out, every patch has some of the image.

        Raises:
            DataError: the images have other dims or colours than the model.
        """
        dims, colours = len(self.config.patch), self.config.colours
        if images.ndim != 2 + dims or images.shape[1] != colours or 0 in images.shape[1:]:
            raise DataError(
                f"got images of shape {list(images.shape)}; this model takes [batch, {colours} "
                f"colours, {'frames, ' * (dims == 3)}height, width] with at least one pixel"
            )
        patches = to_patches(images, self.config.patch)  # [b, *grid, p]
        grid = patches.shape[1:-1]
        x = (self.patch_embed(patches) + self._positions(grid, like=patches)).flatten(1, -2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # [b, s, c]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # type: ignore[no-any-return]

    def _positions(self, grid: tuple[int, ...], *, like: Tensor) -> Float[Tensor, "*grid c"]:
        if self.config.positions == "learned":
            return resize_positions(self.positions, grid)
        return sincos_positions(grid, self.config.grid, self.config.channels, like=like)


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.channels)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.channels)
        self.mlp = nn.Sequential(
            nn.Linear(config.channels, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.channels),
        )

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention of every position to all."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.channels, 3 * config.channels)
        self.attend = SoftmaxAttention(causal=False)
        self.to_out = nn.Linear(config.channels, config.channels)

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = self.attend(q, k, v)  # [b, h, s, d]
        return self.to_out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def patches_along(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """How many patches cover each dim."""
    return tuple(-(-n // p) for n, p in zip(size, patch, strict=True))


def to_patches(
    images: Float[Tensor, "b k *size"], patch: tuple[int, ...]
) -> Float[Tensor, "b *grid p"]:
    """Cuts images into patches, with zeros behind the last pixel of a dim if it is not whole."""
    grid = patches_along(tuple(images.shape[2:]), patch)
    missing = [g * p - n for g, p, n in zip(grid, patch, images.shape[2:], strict=True)]
    images = F.pad(images, [fill for count in reversed(missing) for fill in (0, count)])
    for dim, size in enumerate(patch):
        images = images.unflatten(2 + 2 * dim, (-1, size))  # [b, k, g0, p0, g1, p1, ...]
    within = range(3, 3 + 2 * len(patch), 2)
    return images.permute(0, *range(2, 2 + 2 * len(patch), 2), 1, *within).flatten(1 + len(patch))


def resize_positions(
    positions: Float[Tensor, "*grid0 c"], grid: tuple[int, ...]
) -> Float[Tensor, "*grid c"]:
    """Learned positions, interpolated linearly along each dim where the grid is another."""
    if positions.shape[:-1] == torch.Size(grid):
        return positions
    mode = "bilinear" if len(grid) == 2 else "trilinear"
    return F.interpolate(positions.movedim(-1, 0)[None], grid, mode=mode)[0].movedim(0, -1)


def sincos_positions(
    grid: tuple[int, ...], grid0: tuple[int, ...], channels: int, *, like: Tensor
) -> Float[Tensor, "*grid c"]:
    """Sines and cosines of the place of a patch, measured in patches of `grid0`.

    A grid of another size has its patches' centres at the same relative places, as when learned
    positions are interpolated.
    """
    pairs = channels // (2 * len(grid))
    pair = torch.arange(pairs, device=like.device, dtype=like.dtype)
    parts = []
    for dim, (n, n0) in enumerate(zip(grid, grid0, strict=True)):
        place = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) * (n0 / n) - 0.5
        angle = place[:, None] * 10_000.0 ** (-pair / pairs)  # [n, pairs]
        part = torch.cat([angle.sin(), angle.cos()], dim=-1)
        shape = [1] * len(grid)
        shape[dim] = n
        parts.append(part.view(*shape, -1).expand(*grid, -1))
    return torch.cat(parts, dim=-1)
