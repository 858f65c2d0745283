"""Clips of real handwritten digits that move and bounce.

The digits are the 1,797 of scikit-learn's `load_digits` (Alpaydin & Kaynak, 1998, "Optical
Recognition of Handwritten Digits", UCI), 8 x 8 pixels, handwritten by 43 people. Moving them about
a canvas follows Srivastava et al. (2015), "Moving MNIST". A clip is a function of the seed and of
its index alone, made as it is asked for.

Dims: b batch, t frames, h height, w width, k digits of a clip, g pixels of a glyph's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from hairpin.errors import DataError, MissingExtraError

GLYPH_PIXELS = 8
VALIDATION_EVERY = 10  # every tenth handwritten digit is kept for validation
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class DigitsConfig:
    """What the clips are like; lengths in pixels of the canvas, speeds in pixels per frame.

    Motion ``"diagonal"`` goes one whole pixel down or up and one across per frame, from a whole
    pixel; ``"free"`` goes at any angle, at a speed between ``min_speed`` and ``max_speed``.
    """

    frames: int = 16
    height: int = 12
    width: int = 12
    glyph_size: float = 8.0
    digits: int = 1
    motion: Literal["diagonal", "free"] = "diagonal"
    min_speed: float = 0.25
    max_speed: float = 0.75

    def __post_init__(self) -> None:
        if self.digits < 1 or self.frames < 1:
            raise DataError(
                f"digits={self.digits}, frames={self.frames}: a clip has at least one of each"
            )
        if not 0 < self.glyph_size < min(self.height, self.width):
            raise DataError(
                f"a digit of {self.glyph_size} pixels has no room to move on a canvas of "
                f"{self.height} x {self.width}; give a smaller glyph_size or a larger canvas"
            )
        if not 0 <= self.min_speed <= self.max_speed:
            raise DataError(
                f"speeds from {self.min_speed} to {self.max_speed} are no range; give "
                f"0 <= min_speed <= max_speed"
            )


class Clips(NamedTuple):
    """Videos in [-1, 1], -1 the background, and the classes 0..9 of their digits."""

    video: Float[Tensor, "b t h w"]
    labels: Int64[Tensor, "b k"]


class MovingDigits:
    """An endless, numbered collection of clips."""

    def __init__(self, config: DigitsConfig, *, split: Split = "train", seed: int = 0) -> None:
        """Loads the handwritten digits of one split: no digit is in both.

        Raises:
            MissingExtraError: scikit-learn is absent.
        """
        self.config = config
        self.seed = seed
        self.glyphs, self.labels = load_glyphs(split)  # [n, g, g] in [0, 1], [n]

    def clips(self, index: Sequence[int]) -> Clips:
        """Makes the clips with these indices, in float32."""
        chance = self._chance(index)  # [b, k, 5]
        which = (chance[..., 0] * len(self.glyphs)).astype(np.int64)  # [b, k]
        canvas = draw_glyphs(self.glyphs[which], self._paths(chance), self.config)
        video = torch.from_numpy((2 * canvas - 1).astype(np.float32))
        return Clips(video, torch.from_numpy(self.labels[which]))

    def _chance(self, index: Sequence[int]) -> Float64[ndarray, "b k 5"]:
        """Five numbers in [0, 1) for each digit: which one, two of place, speed, direction."""
        counter = [0, 0, 0, 1]  # a stream of the (seed, index) key that noise (at 0) never reaches
        rows = [
            np.random.Generator(np.random.Philox(key=[self.seed, i], counter=counter)).random(
                (self.config.digits, 5)
            )
            for i in index
        ]
        return np.stack(rows) if rows else np.empty((0, self.config.digits, 5))

    def _paths(self, chance: Float64[ndarray, "b k 5"]) -> Float64[ndarray, "b k t 2"]:
        """Top left corners (y, x) over time: straight lines that bounce off the edges."""
        config = self.config
        room = np.array([config.height, config.width]) - config.glyph_size  # [2]
        if config.motion == "diagonal":
            start = np.floor(chance[..., 1:3] * (np.floor(room) + 1))
            velocity = np.where(chance[..., 3:5] < 0.5, -1.0, 1.0)  # [b, k, 2]
            return _bounce(start, velocity, room, config.frames)
        speed = config.min_speed + (config.max_speed - config.min_speed) * chance[..., 3]
        angle = 2 * np.pi * chance[..., 4]
        velocity = speed[..., None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)  # [b, k, 2]
        return _bounce(chance[..., 1:3] * room, velocity, room, config.frames)


def _bounce(
    start: Float64[ndarray, "b k 2"],
    velocity: Float64[ndarray, "b k 2"],
    room: Float64[ndarray, " 2"],
    frames: int,
) -> Float64[ndarray, "b k t 2"]:
    """Straight lines in time, folded back at 0 and at ``room``."""
    frame = np.arange(frames)[:, None]  # [t, 1]
    straight = start[..., None, :] + frame * velocity[..., None, :]
    corner: Float64[ndarray, "b k t 2"] = room - np.abs(room - straight % (2 * room))
    return corner


def load_glyphs(split: Split) -> tuple[Float64[ndarray, "n g g"], Int64[ndarray, " n"]]:
    """The handwritten digits of one split, ink in [0, 1], and their classes.

    Raises:
        MissingExtraError: scikit-learn is absent.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "the moving digits need scikit-learn: pip install 'hairpin[video]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    held_out = np.arange(len(images)) % VALIDATION_EVERY == 0
    keep = held_out if split == "validation" else ~held_out
    glyphs = images[keep].reshape(-1, GLYPH_PIXELS, GLYPH_PIXELS) / 16
    return glyphs, labels[keep].astype(np.int64)


def draw_glyphs(
    glyphs: Float64[ndarray, "b k g g"],
    corners: Float64[ndarray, "b k t 2"],
    config: DigitsConfig,
) -> Float64[ndarray, "b t h w"]:
    """Draws every digit at its corner in every frame, enlarged and shifted by parts of a pixel.

    The cubic interpolation is separable, so a frame is `rows @ glyph @ columns.T`; where digits
    overlap the brighter shows.
    """
    rows = cubic_weights(corners[..., 0], pixels=config.height, glyph_size=config.glyph_size)
    columns = cubic_weights(corners[..., 1], pixels=config.width, glyph_size=config.glyph_size)
    ink = rows @ glyphs[:, :, None] @ columns.swapaxes(-1, -2)  # [b, k, t, h, w]
    canvas: Float64[ndarray, "b t h w"] = ink.clip(0, 1).max(axis=1)
    return canvas


def cubic_weights(
    corner: Float64[ndarray, "b k t"], *, pixels: int, glyph_size: float
) -> Float64[ndarray, "b k t pixels g"]:
    """How much each pixel of a glyph gives to each pixel of a line of the canvas.

    Keys (1981), "Cubic convolution interpolation", with a = -1/2.
    """
    centre = (np.arange(pixels) + 0.5 - corner[..., None]) * GLYPH_PIXELS / glyph_size - 0.5
    d = np.abs(centre[..., None] - np.arange(GLYPH_PIXELS))
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def rank_indices(step: int, *, batch_size: int, rank: int, ranks: int) -> range:
    """The indices of the clips that one of `ranks` data-parallel ranks takes at a step.

    Ranks together take `step * batch_size` and on, `batch_size` of them, each a balanced run: the
    first `batch_size % ranks` ranks take one more.
    """
    share, more = divmod(batch_size, ranks)
    start = step * batch_size + rank * share + min(rank, more)
    return range(start, start + share + (rank < more))
