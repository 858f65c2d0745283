"""A small axial transformer for weather-like fields: the next state from this one.

Ho et al. (2019), "Axial Attention in Multidimensional Transformers": attention along one dim at a
time, here level, latitude and longitude in turn. As in Pangu-Weather (Bi et al., 2023), the input
is a few variables at every point of a three-dimensional grid.

Dims: b batch, z levels, y latitudes, x longitudes, v variables, c channels, n heads, d channels of
a head, l the dim attended along, r all other rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hairpin.errors import DataError, RecipeError


@dataclass(frozen=True)
class Axial3DConfig:
    """Sizes of an `Axial3D`; `grid` is (levels, latitudes, longitudes)."""

    grid: tuple[int, int, int] = (13, 32, 64)
    variables: int = 5
    channels: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise RecipeError(
                f"channels={self.channels} do not divide over heads={self.heads}; "
                f"give a multiple of heads"
            )


def tiny(grid: tuple[int, int, int] = (3, 4, 5)) -> Axial3DConfig:
    """The smallest model with every part in it, for tests."""
    return Axial3DConfig(grid=grid, variables=2, channels=8, depth=2, heads=2, mlp_ratio=2)


class Axial3D(nn.Module):
    """Predicts the change of every variable at every grid point, and adds it to the input."""

    def __init__(self, config: Axial3DConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        levels, latitudes, longitudes = config.grid

        self.embed = nn.Linear(config.variables, c)
        self.level_position = nn.Parameter(0.02 * torch.randn(levels, 1, 1, c))
        self.latitude_position = nn.Parameter(0.02 * torch.randn(latitudes, 1, c))
        self.longitude_position = nn.Parameter(0.02 * torch.randn(longitudes, c))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)

    def forward(self, state: Float[Tensor, "b z y x v"]) -> Float[Tensor, "b z y x v"]:
        """The next state.

        Raises:
            DataError: the state is not on the grid that the positions are made for.
        """
        if tuple(state.shape[1:4]) != self.config.grid:
            raise DataError(
                f"a state on the grid {tuple(state.shape[1:4])} was given to a model of the grid "
                f"{self.config.grid} (levels, latitudes, longitudes); regrid the state, or make "
                f"the model with that grid"
            )
        position = self.level_position + self.latitude_position + self.longitude_position
        h = self.embed(state) + position  # [b, z, y, x, c]
        for block in self.blocks:
            h = block(h)
        return state + self.head(h)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Along the levels, along a meridian, then along a circle of latitude."""

    def __init__(self, config: Axial3DConfig) -> None:
        super().__init__()
        self.level = AxialBlock(config, dim=1)
        self.latitude = AxialBlock(config, dim=2)
        self.longitude = AxialBlock(config, dim=3)

    def forward(self, h: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        return self.longitude(self.latitude(self.level(h)))  # type: ignore[no-any-return]


class AxialBlock(nn.Module):
    """A pre-norm transformer block that attends along one dim of its input."""

    def __init__(self, config: Axial3DConfig, *, dim: int) -> None:
        super().__init__()
        c = config.channels
        self.dim = dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(c)
        self.to_qkv = nn.Linear(c, 3 * c)
        self.to_out = nn.Linear(c, c)
        self.mlp = nn.Sequential(
            nn.LayerNorm(c),
            nn.Linear(c, config.mlp_ratio * c),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * c, c),
        )

    def forward(self, h: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        h = h + self._attend(self.attention_norm(h))
        return h + self.mlp(h)  # type: ignore[no-any-return]

    def _attend(self, h: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x c"]:
        lines = h.movedim(self.dim, 3)  # [.., .., .., l, c]
        rows = lines.shape[0] * lines.shape[1] * lines.shape[2]
        length, c = lines.shape[3:]
        qkv = self.to_qkv(lines).reshape(rows, length, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [r, n, l, d]
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.to_out(y.reshape(lines.shape).movedim(3, self.dim))  # type: ignore[no-any-return]


class Head(nn.Module):
    """From a grid point's channels to the change of its variables."""

    def __init__(self, config: Axial3DConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.channels)
        self.linear = nn.Linear(config.channels, config.variables)

    def forward(self, h: Float[Tensor, "b z y x c"]) -> Float[Tensor, "b z y x v"]:
        return self.linear(self.norm(h))  # type: ignore[no-any-return]
