"""Recipes of `hairpin train video`: a video transformer on moving handwritten digits."""

import math
from dataclasses import dataclass

from hairpin.errors import RecipeError
from hairpin.models import video_dit
from hairpin.models.video_dit import VideoDiTConfig
from hairpin.run.data import DigitsConfig


@dataclass(frozen=True, kw_only=True)
class VideoRecipe:
    """Every setting of a video training run.

    `batch_size` counts clips over all data-parallel ranks. The learning rate rises linearly over
    `warmup_steps`, then falls along a cosine to `min_lr` at step `steps`, and stays there when a
    run goes on. `seed` keys weights, data and noise. A clip in training is given `given_frames`
    frames or more; a sample is given `given_frames` and rolls out `frames_per_pass` at a time.
    """

    name: str
    model: VideoDiTConfig
    data: DigitsConfig
    given_frames: int = 4
    label_dropout: float = 0.1

    steps: int
    batch_size: int
    lr: float = 2e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    dtype: str = "float32"

    checkpoint_every: int = 250
    sample_steps: int = 6
    frames_per_pass: int = 2
    guidance: float = 1.0

    def __post_init__(self) -> None:
        size = self.model.patch_size
        if self.data.height % size or self.data.width % size:
            raise RecipeError(
                f"recipe {self.name!r}: a canvas of {self.data.height} x {self.data.width} pixels "
                f"is not whole patches of {size} x {size}; change data.height, data.width or "
                f"model.patch_size"
            )
        if not 0 <= self.given_frames < self.data.frames:
            raise RecipeError(
                f"recipe {self.name!r}: given_frames={self.given_frames} of {self.data.frames} "
                f"frames leaves nothing to predict; give fewer"
            )
        if self.dtype not in ("float32", "float64"):
            raise RecipeError(
                f"recipe {self.name!r}: dtype={self.dtype!r} is not supported; give 'float32' or "
                f"'float64'"
            )
        for setting in (
            "steps",
            "batch_size",
            "checkpoint_every",
            "sample_steps",
            "frames_per_pass",
        ):
            if getattr(self, setting) < 1:
                raise RecipeError(
                    f"recipe {self.name!r}: {setting}={getattr(self, setting)} must be at least 1"
                )

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2

    def ema_decay_at(self, step: int) -> float:
        """The share of the old average kept at a step: less at the start, to forget the init."""
        return min(self.ema_decay, (step + 1) / (step + 10))


def video_digits() -> VideoRecipe:
    """One handwritten digit on 12 x 16 pixels: see 4 frames, predict the other 12.

    The motion has a period of 16 frames, though a digit that turns in a corner goes back the way it
    came. About 40 minutes on one core.
    """
    return VideoRecipe(
        name="video-digits",
        model=video_dit.digits(),
        data=DigitsConfig(frames=16, height=12, width=16, glyph_size=8.0),
        steps=5500,
        batch_size=16,
    )


def tiny() -> VideoRecipe:
    """A few steps of the smallest model on 8 x 8 pixels, for tests."""
    return VideoRecipe(
        name="tiny",
        model=video_dit.tiny(),
        data=DigitsConfig(frames=8, height=8, width=8, glyph_size=6.0),
        given_frames=2,
        steps=20,
        batch_size=4,
        warmup_steps=5,
        checkpoint_every=5,
        sample_steps=2,
    )
