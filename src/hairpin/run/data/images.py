"""Images that come with scikit-learn: handwritten digits, and pieces of two photographs.

Both are numbered collections: image i is the same on any number of ranks.

Dims: b batch, k colours, h height, w width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray
from torch import Tensor

from hairpin.errors import DataError, MissingExtraError
from hairpin.run.data.digits import load_glyphs
from hairpin.run.data.text import EpochOrder

Part = Literal["train", "validation"]
TURNS = 4
_PIECES = 256  # validation pieces of the photographs


@dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how large.

    `kind` "digits": 8 x 8 pixels, 10 classes. "photos": square pieces of `size` pixels, each turned
    by 0, 90, 180 or 270 degrees, and the turn is the class (Gidaris et al., 2018, "Unsupervised
    Representation Learning by Predicting Image Rotations"). A training digit is moved by up to
    `shift` pixels.
    """

    kind: Literal["digits", "photos"] = "digits"
    size: int = 8
    shift: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("digits", "photos"):
            raise DataError(f"there are no images {self.kind!r}; choose 'digits' or 'photos'")
        if self.kind == "digits" and self.size != 8:
            raise DataError(
                f"size={self.size}: the digits have 8 x 8 pixels; take photos for other sizes"
            )
        if self.size < 1 or self.shift < 0:
            raise DataError(f"size={self.size} must be 1 or more, shift={self.shift} 0 or more")


class ImageBatch(NamedTuple):
    """Images, their values in [-1, 1], and their classes."""

    images: Float32[Tensor, "b k h w"]
    labels: Int64[Tensor, " b"]


def open_images(config: ImagesConfig, part: Part, *, seed: int = 0) -> "Digits | Photos":
    """The images of one part; no digit and no pixel of a photograph is in both.

    Raises:
        MissingExtraError: scikit-learn, or for photos Pillow, is absent.
        DataError: the photographs are smaller than a piece.
    """
    return (Digits if config.kind == "digits" else Photos)(config, part, seed=seed)


class Digits:
    """The 1,797 digits of `load_digits` (Alpaydin & Kaynak, 1998), written by 43 people."""

    def __init__(self, config: ImagesConfig, part: Part, *, seed: int = 0) -> None:
        try:
            self.glyphs, self.labels = load_glyphs(part)
        except MissingExtraError as error:
            raise _needs("scikit-learn") from error
        self.shift = config.shift if part == "train" else 0
        self.seed = seed
        self.order = EpochOrder(len(self.glyphs), seed)

    def __len__(self) -> int:
        return len(self.glyphs)

    def batch(self, index: Sequence[int]) -> ImageBatch:
        """The digits with these numbers, in the order of the epochs, each moved a little."""
        which = [self.order[i] for i in index]
        moves = [_chance(self.seed, i).integers(-self.shift, self.shift + 1, size=2) for i in index]
        images = [_moved(self.glyphs[j], *move) for j, move in zip(which, moves, strict=True)]
        return _batch(np.reshape(images, (-1, 1, 8, 8)), self.labels[which])

    def rows(self, places: Sequence[int]) -> ImageBatch:
        """The digits at these places, as they are."""
        return _batch(self.glyphs[list(places), None], self.labels[list(places)])


class Photos:
    """Pieces of the two photographs of `load_sample_images`, 427 x 640 pixels each, turned.

    The right third of both is kept for validation.
    """

    def __init__(self, config: ImagesConfig, part: Part, *, seed: int = 0) -> None:
        photos = load_photos()  # [2, h, w, 3]
        right = photos.shape[2] * 2 // 3
        self.photos = photos[:, :, :right] if part == "train" else photos[:, :, right:]
        self.size, self.seed, self.part = config.size, seed, part
        if config.size > min(self.photos.shape[1:3]):
            raise DataError(
                f"pieces of {config.size} x {config.size} pixels do not fit into the "
                f"{self.photos.shape[1]} x {self.photos.shape[2]} pixels kept for {part}; give a "
                f"size up to {min(self.photos.shape[1:3])}"
            )

    def __len__(self) -> int:
        return _PIECES

    def batch(self, index: Sequence[int]) -> ImageBatch:
        """The pieces with these numbers: anywhere, turned any of four ways."""
        size, pieces, turns = self.size, [], []
        room = np.array([len(self.photos), *self.photos.shape[1:3], TURNS]) - [
            0,
            size - 1,
            size - 1,
            0,
        ]
        for i in index:
            photo, top, left, turn = _chance(self.seed, i).integers(room)
            piece = self.photos[photo, top : top + size, left : left + size]
            pieces.append(np.rot90(piece, turn).transpose(2, 0, 1))
            turns.append(turn)
        return _batch(np.reshape(pieces, (-1, 3, size, size)), np.asarray(turns, dtype=np.int64))

    def rows(self, places: Sequence[int]) -> ImageBatch:
        """As `batch`: there are `len(self)` fixed pieces to validate on."""
        return self.batch(places)


def load_photos() -> Float32[ndarray, "2 h w 3"]:
    """The two photographs, values in [0, 1].

    Raises:
        MissingExtraError: scikit-learn or Pillow is absent.
    """
    try:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
    except ImportError as error:
        raise _needs("scikit-learn and Pillow") from error
    return np.stack(photos).astype(np.float32) / 255


def _batch(images: ndarray, labels: ndarray) -> ImageBatch:
    values = torch.from_numpy(np.ascontiguousarray(2 * images - 1, dtype=np.float32))
    return ImageBatch(values, torch.from_numpy(np.asarray(labels, dtype=np.int64)))


def _moved(glyph: ndarray, down: int, right: int) -> ndarray:
    """An image moved by whole pixels; what leaves is lost, what comes in is background."""
    h, w = glyph.shape
    moved = np.zeros_like(glyph)
    moved[max(down, 0) : h + down, max(right, 0) : w + right] = glyph[
        max(-down, 0) : h - down, max(-right, 0) : w - right
    ]
    return moved


def _chance(seed: int, index: int) -> np.random.Generator:
    """Random numbers of one image: Philox (Salmon et al., 2011) keyed by seed and index."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def _needs(packages: str) -> MissingExtraError:
    return MissingExtraError(f"these images need {packages}: pip install 'hairpin[images]'")
