"""Small models that compute along their dims, each in an order-dependent way, and their tables.

Dims: b batch, t frames, s patches, c channels, v variables; p q r u the dims of `Axial`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from planning.truth import Arguments, Case, randomised, seeded

ATTENDS = {
    "blocks.*.spatial": "b t [s] c",
    "blocks.*.temporal": "b [t] s c",
    "head": "b t s c -> b t s v",
}


class Along(nn.Module):
    """Weighs the running sum along one dim by a softmax along it: no part can do it alone."""

    def __init__(self, dim: int, channels: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out(self.score(y).softmax(self.dim) * y.cumsum(self.dim))


class Block(nn.Module):
    """Along the patches, then along the frames; ``drop`` on each position in both."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.spatial = nn.Sequential(Along(2), nn.Dropout(drop))
        self.temporal = nn.Sequential(Along(1), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.spatial(x))


class Video(nn.Module):
    """Embed, blocks, head.

    Args:
        repeats: how often all blocks run, with the same weights.
        mode: None, or how blocks are checkpointed: ``use_reentrant``.
    """

    def __init__(
        self, depth: int = 2, drop: float = 0.0, repeats: int = 1, mode: bool | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(depth))
        self.head = nn.Linear(4, 2)
        self.repeats = repeats
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.repeats):
            for block in self.blocks:
                if self.mode is None:
                    x = block(x)
                else:
                    x = checkpoint(block, x, use_reentrant=self.mode)
        return self.head(x)


class Axial(nn.Module):
    """Cycles of stages, one along each of K dims."""

    def __init__(self, dims: int, cycles: int) -> None:
        super().__init__()
        self.cycles = nn.ModuleList(
            nn.ModuleDict({name: Along(place + 1) for place, name in enumerate("pqru"[:dims])})
            for _ in range(cycles)
        )
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for cycle in self.cycles:
            for stage in cycle.values():
                x = stage(x)
        return self.head(x)


def axial_attends(dims: int) -> dict[str, str]:
    names = "pqru"[:dims]
    table = {
        f"cycles.*.{name}": " ".join(["b", *(f"[{n}]" if n == name else n for n in names), "c"])
        for name in names
    }
    whole = " ".join(["b", *names])
    return {**table, "head": f"{whole} c -> {whole} v"}


def video_arguments(b: int, t: int, s: int, seed: int = 3) -> Callable[[], Arguments]:
    return lambda: ((seeded((b, t, s, 2), seed),), {})


def video_case(name: str, shape: tuple[int, int, int] = (2, 6, 5), **words: Any) -> Case:
    """A `Video` with ``words``, run on a video of ``shape``."""
    return Case(name, lambda: randomised(Video(**words), 0.3), video_arguments(*shape), ATTENDS)


def axial_case(dims: int, cycles: int, lengths: tuple[int, ...]) -> Case:
    return Case(
        f"axial of {lengths}",
        lambda: randomised(Axial(dims, cycles), 0.3),
        lambda: ((seeded((2, *lengths, 4)),), {}),
        axial_attends(dims),
    )


def fixed(function: Callable[..., Any]) -> type[nn.Module]:
    """A module class whose forward is ``function(self, x)``, with a linear map to call."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.table = nn.Parameter(torch.randn(32, 4))

        def forward(self, x: Tensor) -> Any:
            return function(self, x)

    return Fixed
