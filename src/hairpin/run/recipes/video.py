"""Recipes of `hairpin train video`: a video transformer on moving handwritten digits."""

from dataclasses import dataclass

from hairpin.errors import RecipeError
from hairpin.models import video_dit
from hairpin.models.video_dit import VideoDiTConfig
from hairpin.run.data import DigitsConfig
from hairpin.run.recipes.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Schedule):
    """Every setting of a video training run.

    `batch_size` counts clips over all data-parallel ranks. `seed` keys weights, data and noise. A
    clip in training is given `given_frames` frames or more; a sample is given `given_frames` and
    rolls out `frames_per_pass` at a time.
    """

    model: VideoDiTConfig
    data: DigitsConfig
    given_frames: int = 4
    label_dropout: float = 0.1

    lr: float = 2e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100

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
        self.require_precision()
        self.require_positive(
            "steps", "batch_size", "checkpoint_every", "sample_steps", "frames_per_pass"
        )


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
