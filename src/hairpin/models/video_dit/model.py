"""A spatial-temporal diffusion transformer (DiT) for video.

Peebles & Xie (2023), "Scalable Diffusion Models with Transformers": adaptive layer norm with
zero-initialised gates (adaLN-Zero). Ma et al. (2024), "Latte", variant 1: blocks that attend along
the patches of a frame alternate with blocks that attend along the frames of a patch. Su et al.
(2021), "RoFormer": rotary position embedding, here by frame, and by row and column of the patch.
Blattmann et al. (2023), "Stable Video Diffusion": every frame sees the given ones as more channels
of its input.

Dims: b batch, t frames, h height, w width, s patches of a frame, c channels, e channels of the
condition, p pixels of a patch, n heads, d channels of a head, l positions attended along, k labels
of a clip (or coordinates of a position), a features of a frame's age,
q pixels of the surroundings of a patch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hairpin.errors import DataError, RecipeError

CONTEXT_FRAMES = 2  # given frames that every frame sees: a place and a velocity
AGE_PAIRS = 4


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`.

    `grid` is the number of patches (down, across) that the learned positions are made for; another
    size of video interpolates them. `classes` counts the labels without the null label, whose
    index is `classes`.
    """

    patch_size: int = 4
    grid: tuple[int, int] = (3, 4)
    channels: int = 96
    condition_channels: int = 32
    depth: int = 3
    heads: int = 4
    mlp_ratio: int = 2
    classes: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.channels % (4 * self.heads):
            raise RecipeError(
                f"channels={self.channels} over heads={self.heads} must give a multiple of 4 "
                f"channels per head (rotary embedding turns pairs, by row and by column); change "
                f"channels or heads"
            )


def tiny() -> VideoDiTConfig:
    """The smallest model with every part in it, for tests: about 20 thousand parameters."""
    return VideoDiTConfig(
        grid=(2, 2), channels=16, condition_channels=16, depth=2, heads=2, mlp_ratio=4
    )


def digits() -> VideoDiTConfig:
    """The model of the moving digits: 0.6 million parameters."""
    return VideoDiTConfig()


def large() -> VideoDiTConfig:
    """DiT-B's width and depth (12 + 12 blocks of 768 channels), for planning and measuring."""
    return VideoDiTConfig(
        patch_size=2,
        grid=(32, 32),
        channels=768,
        condition_channels=768,
        depth=12,
        heads=12,
        mlp_ratio=4,
    )


class VideoDiT(nn.Module):
    """Predicts the clean video from a noisy one, its noise level, its labels and given frames."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        c, e, p = config.channels, config.condition_channels, config.patch_size**2

        self.patch_embed = nn.Linear(p, c)
        surroundings = (config.patch_size + 2 * (config.patch_size // 2)) ** 2
        self.context_embed = nn.Linear(CONTEXT_FRAMES * surroundings, c)
        self.age_embed = nn.Linear(2 * AGE_PAIRS, c)
        self.positions = nn.Parameter(torch.empty(*config.grid, c))
        self.noise_embed = NoiseLevelEmbedding(e)
        self.label_embed = nn.Embedding(config.classes + 1, e)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every linear map, then zeros where DiT starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.head.linear.weight)

    def forward(
        self,
        video: Float[Tensor, "b t h w"],
        noise_level: Float[Tensor, " b"],
        labels: Int[Tensor, "b k"],
        given: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b t h w"]:
        """The clean video, as far as it can be told.

        Args:
            video: noisy frames, and clean ones where `given`.
            noise_level: 0 for a clean video, 1 for pure noise.
            labels: classes of the things in the clip; the index `config.classes` is "not told".
            given: frames of `video` that are clean.

        Raises:
            DataError: `h` or `w` is not a multiple of the patch size.
        """
        size = self.config.patch_size
        height, width = video.shape[-2:]
        if height % size or width % size:
            raise DataError(
                f"frames of {height} x {width} pixels are not whole patches of {size} x {size}; "
                f"crop or pad the video to multiples of {size}"
            )
        rows, columns = height // size, width // size

        context = to_surroundings(last_given_frames(video, given), size)  # [b, s, k]
        x = self.patch_embed(to_patches(video, size))  # [b, t, s, c]
        x = x + self.context_embed(context)[:, None]
        x = x + self.age_embed(age_features(given, like=x))[:, :, None]
        x = x + resize_positions(self.positions, rows, columns)
        cond = self.noise_embed(noise_level) + self.label_embed(labels).sum(dim=1)  # [b, e]

        places = grid_places(rows, columns, like=x)  # [s, 2]
        for block in self.blocks:
            x = block(x, cond, places)
        return from_patches(self.head(x, cond), size, rows, columns)


class Block(nn.Module):
    """Along the patches of each frame, then along the frames of each patch."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.spatial = SpatialBlock(config)
        self.temporal = TemporalBlock(config)

    def forward(
        self,
        x: Float[Tensor, "b t s c"],
        cond: Float[Tensor, "b e"],
        places: Float[Tensor, "s 2"],
    ) -> Float[Tensor, "b t s c"]:
        x = self.spatial(x, cond, places)
        return self.temporal(x, cond)  # type: ignore[no-any-return]


class SpatialBlock(nn.Module):
    """Attention along the patches of a frame, and an MLP, each behind an adaptive norm."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.attention_norm = AdaptiveNorm(config)
        self.attention = SpatialAttention(config)
        self.mlp_norm = AdaptiveNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "b t s c"],
        cond: Float[Tensor, "b e"],
        places: Float[Tensor, "s 2"],
    ) -> Float[Tensor, "b t s c"]:
        y, gate = self.attention_norm(x, cond)
        x = x + gate * self.attention(y, places)
        y, gate = self.mlp_norm(x, cond)
        return x + gate * self.mlp(y)  # type: ignore[no-any-return]


class TemporalBlock(nn.Module):
    """Attention along the frames of a patch, and an MLP, each behind an adaptive norm."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.attention_norm = AdaptiveNorm(config)
        self.attention = TemporalAttention(config)
        self.mlp_norm = AdaptiveNorm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "b t s c"], cond: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b t s c"]:
        y, gate = self.attention_norm(x, cond)
        x = x + gate * self.attention(y)
        y, gate = self.mlp_norm(x, cond)
        return x + gate * self.mlp(y)  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """Multi-head attention along s with rotary places; frames are further rows of the batch."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.channels, 3 * config.channels)
        self.to_out = nn.Linear(config.channels, config.channels)

    def forward(
        self, x: Float[Tensor, "b t s c"], places: Float[Tensor, "s 2"]
    ) -> Float[Tensor, "b t s c"]:
        b, t, s, c = x.shape
        qkv = self.to_qkv(x).view(b * t, s, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [(b t), n, s, d]
        angle = angles(places, c // self.heads)
        y = functional.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v)
        return self.to_out(y.transpose(1, 2).reshape(b, t, s, c))  # type: ignore[no-any-return]


class TemporalAttention(nn.Module):
    """Multi-head attention along t with rotary positions; patches are further rows of the batch."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.channels, 3 * config.channels)
        self.to_out = nn.Linear(config.channels, config.channels)

    def forward(self, x: Float[Tensor, "b t s c"]) -> Float[Tensor, "b t s c"]:
        b, t, s, c = x.shape
        qkv = self.to_qkv(x).view(b, t, s, 3, self.heads, c // self.heads)
        qkv = qkv.permute(3, 0, 2, 4, 1, 5).reshape(3, b * s, self.heads, t, c // self.heads)
        q, k, v = qkv.unbind()  # [(b s), n, t, d]
        angle = angles(torch.arange(t, device=x.device, dtype=x.dtype)[:, None], c // self.heads)
        y = functional.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v)
        y = y.view(b, s, self.heads, t, c // self.heads).permute(0, 3, 1, 2, 4)
        return self.to_out(y.reshape(b, t, s, c))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear maps with a GELU between, on each token alone."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.channels, config.mlp_ratio * config.channels)
        self.down = nn.Linear(config.mlp_ratio * config.channels, config.channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b t s c"]) -> Float[Tensor, "b t s c"]:
        y = functional.gelu(self.up(x), approximate="tanh")
        return self.dropout(self.down(y))  # type: ignore[no-any-return]


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale, shift and branch gate are linear in the condition (adaLN-Zero)."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.channels, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.condition_channels, 3 * config.channels)

    def forward(
        self, x: Float[Tensor, "b t s c"], cond: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b t s c"], Float[Tensor, "b 1 1 c"]]:
        modulation = self.modulation(functional.silu(cond))[:, None, None, :]
        scale, shift, gate = modulation.chunk(3, dim=-1)  # [b, 1, 1, c] each
        return torch.addcmul(shift, self.norm(x), 1 + scale), gate


class Head(nn.Module):
    """From a token to the pixels of its patch, behind an adaptive norm."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.norm = AdaptiveNorm(config)
        self.linear = nn.Linear(config.channels, config.patch_size**2)

    def forward(
        self, x: Float[Tensor, "b t s c"], cond: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b t s p"]:
        y, _ = self.norm(x, cond)
        return self.linear(y)  # type: ignore[no-any-return]


class NoiseLevelEmbedding(nn.Module):
    """Sines and cosines of the noise level through a small MLP, as DiT embeds its timestep."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, noise_level: Float[Tensor, " b"]) -> Float[Tensor, "b e"]:
        half = torch.arange(self.channels // 2, device=noise_level.device, dtype=noise_level.dtype)
        frequency = 1000.0 ** (1 - half / (self.channels // 2))  # 1000 .. about 1
        angle = noise_level[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))  # type: ignore[no-any-return]


def last_given_frames(
    video: Float[Tensor, "b t h w"], given: Bool[Tensor, "b t"]
) -> Float[Tensor, "b k h w"]:
    """The last given frame, the one before it, ...; zeros if none is given."""
    back = torch.arange(CONTEXT_FRAMES, device=video.device)
    number = (given.sum(dim=1)[:, None] - 1 - back).clamp(min=0)  # given frames are the first
    return video.take_along_dim(number[:, :, None, None], dim=1) * given[:, :1, None, None]


def to_surroundings(frames: Float[Tensor, "b k h w"], size: int) -> Float[Tensor, "b s q"]:
    """Every patch with half a patch around it; zeros beyond the edges."""
    margin = size // 2
    squares = functional.unfold(frames, size + 2 * margin, padding=margin, stride=size)
    return squares.transpose(1, 2)


def age_features(given: Bool[Tensor, "b t"], *, like: Tensor) -> Float[Tensor, "b t a"]:
    """Cosines and sines of how many frames ago the last given frame was: 0 for a given one."""
    age = (~given).cumsum(dim=1).to(like.dtype)
    pair = torch.arange(AGE_PAIRS, device=like.device, dtype=like.dtype)
    angle = age[..., None] * 100.0 ** (-pair / AGE_PAIRS)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_places(rows: int, columns: int, *, like: Tensor) -> Float[Tensor, "s 2"]:
    """Row and column of every patch of a frame."""
    row = torch.arange(rows, device=like.device, dtype=like.dtype)
    column = torch.arange(columns, device=like.device, dtype=like.dtype)
    return torch.cartesian_prod(row, column)


def angles(position: Float[Tensor, "l k"], head_dim: int) -> Float[Tensor, "l d/2"]:
    """Angles of the rotary embedding: each of k coordinates turns a k-th of the channel pairs."""
    pairs = head_dim // 2 // position.shape[1]
    pair = torch.arange(pairs, device=position.device, dtype=position.dtype)
    return (position[:, :, None] * 100.0 ** (-pair / pairs)).flatten(1)


def rotate(x: Float[Tensor, "r n l d"], angle: Float[Tensor, "l d/2"]) -> Float[Tensor, "r n l d"]:
    """Turns pairs of channels by the angles of their position (RoPE)."""
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def to_patches(video: Float[Tensor, "b t h w"], size: int) -> Float[Tensor, "b t s p"]:
    """Cuts each frame into squares, row by row."""
    b, t, h, w = video.shape
    rows, columns = h // size, w // size
    squares = video.reshape(b, t, rows, size, columns, size).transpose(3, 4)
    return squares.reshape(b, t, rows * columns, size * size)


def from_patches(
    patches: Float[Tensor, "b t s p"], size: int, rows: int, columns: int
) -> Float[Tensor, "b t h w"]:
    """Undoes `to_patches`."""
    b, t = patches.shape[:2]
    squares = patches.reshape(b, t, rows, columns, size, size).transpose(3, 4)
    return squares.reshape(b, t, rows * size, columns * size)


def resize_positions(
    positions: Float[Tensor, "rows0 columns0 c"], rows: int, columns: int
) -> Float[Tensor, "s c"]:
    """Positions of a rows x columns grid: the learned ones, interpolated where sizes differ."""
    if tuple(positions.shape[:2]) != (rows, columns):
        image = positions.permute(2, 0, 1)[None]  # [1, c, rows0, columns0]
        image = functional.interpolate(image, (rows, columns), mode="bilinear")
        positions = image[0].permute(1, 2, 0)
    return positions.flatten(0, 1)
