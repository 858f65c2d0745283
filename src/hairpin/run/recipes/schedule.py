"""What recipes of every model share: how the optimizer moves the weights over a run."""

import math
from dataclasses import dataclass

from hairpin.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings of the optimizer and of the moving average of the weights.

    The learning rate rises linearly over `warmup_steps`, then falls along a cosine to `min_lr` at
    step `steps`, and stays there when a run goes on.
    """

    name: str
    steps: int
    batch_size: int
    lr: float
    min_lr: float
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    dtype: str = "float32"
    checkpoint_every: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2

    def ema_decay_at(self, step: int) -> float:
        """The share of the old average kept at a step: less at the start, to forget the init."""
        return min(self.ema_decay, (step + 1) / (step + 10))

    def require_precision(self) -> None:
        """Raise a `RecipeError` unless `dtype` is one that training runs in."""
        if self.dtype not in ("float32", "float64"):
            raise RecipeError(
                f"recipe {self.name!r}: dtype={self.dtype!r} is not supported; give 'float32' or "
                f"'float64'"
            )

    def require_positive(self, *settings: str) -> None:
        """Raise a `RecipeError` unless each of these settings is 1 or more."""
        for setting in settings:
            if getattr(self, setting) < 1:
                raise RecipeError(
                    f"recipe {self.name!r}: {setting}={getattr(self, setting)} must be at least 1"
                )
