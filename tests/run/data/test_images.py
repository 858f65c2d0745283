"""Images that come with scikit-learn: parts apart, the same for any ranks, their classes right."""

import sys

import numpy as np
import pytest
import torch

from hairpin.errors import DataError, MissingExtraError
from hairpin.run.data import rank_indices
from hairpin.run.data.images import ImagesConfig, load_photos, open_images

PHOTOS = ImagesConfig("photos", size=31)


@pytest.mark.parametrize("config", [ImagesConfig(), PHOTOS])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_batch_is_a_function_of_numbers_and_seed(config, part):
    images = open_images(config, part, seed=2)
    whole = images.batch(range(7, 14))
    colours = 1 if config.kind == "digits" else 3
    assert whole.images.shape == (7, colours, config.size, config.size)
    assert whole.images.dtype == torch.float32
    assert -1 <= whole.images.min() < whole.images.max() <= 1
    shares = [rank_indices(1, batch_size=7, rank=r, ranks=3) for r in range(3)]
    again = [open_images(config, part, seed=2).batch(share) for share in shares]
    assert torch.equal(torch.cat([b.images for b in again]), whole.images)
    assert torch.equal(torch.cat([b.labels for b in again]), whole.labels)
    other = open_images(config, part, seed=3).batch(range(7, 14))
    assert not torch.equal(other.images, whole.images)


@pytest.mark.parametrize("config", [ImagesConfig(), PHOTOS])
def test_no_image_has_the_right_shape(config):
    batch = open_images(config, "train").batch([])
    assert batch.images.shape[::2] == (0, config.size)
    assert batch.labels.shape == (0,)


def test_each_digit_is_in_one_part_and_once_an_epoch():
    train, validation = (
        open_images(ImagesConfig(), "train"),
        open_images(ImagesConfig(), "validation"),
    )
    assert (len(train), len(validation)) == (1617, 180)
    epoch = train.batch(range(1617))
    assert sorted(epoch.labels.tolist()) == sorted(train.labels.tolist())
    rows = validation.rows([0, 5])
    assert rows.labels.tolist() == validation.labels[[0, 5]].tolist()
    np.testing.assert_allclose(rows.images[1, 0], 2 * validation.glyphs[5] - 1)


def test_digits_move_by_whole_pixels_and_stay_where_they_are_validated():
    still = open_images(ImagesConfig(), "train", seed=1).batch(range(40)).images
    moved = open_images(ImagesConfig(shift=2), "train", seed=1).batch(range(40)).images
    background = torch.nn.functional.pad(still, (2, 2, 2, 2), value=-1)
    found = set()
    for i in range(40):
        windows = {
            (dy, dx): background[i, 0, 2 - dy : 10 - dy, 2 - dx : 10 - dx]
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        }
        found |= {move for move, window in windows.items() if torch.equal(window, moved[i, 0])}
    assert len(found) > 10
    kept = open_images(ImagesConfig(shift=2), "validation").batch(range(9))
    assert torch.equal(
        kept.images, open_images(ImagesConfig(), "validation").batch(range(9)).images
    )


def test_a_piece_turned_back_is_in_its_photograph():
    photos = 2 * load_photos().astype(np.float32) - 1
    right = photos.shape[2] * 2 // 3
    for part, area in (("train", photos[:, :, :right]), ("validation", photos[:, :, right:])):
        batch = open_images(PHOTOS, part).batch(range(5))
        for image, turn in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            piece = np.rot90(image.transpose(1, 2, 0), -turn)
            corner = np.isclose(area[:, :-30, :-30], piece[0, 0], atol=1e-6).all(-1)
            assert any(
                np.allclose(area[p, y : y + 31, x : x + 31], piece, atol=1e-6)
                for p, y, x in np.argwhere(corner)
            )
    labels = open_images(PHOTOS, "train").batch(range(200)).labels
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(DataError, match="there are no images 'faces'"):
        ImagesConfig("faces")
    with pytest.raises(DataError, match="the digits have 8 x 8 pixels"):
        ImagesConfig("digits", size=9)
    with pytest.raises(DataError, match="shift=-1"):
        ImagesConfig(shift=-1)
    with pytest.raises(DataError, match="pieces of 300 x 300 pixels do not fit into the 427 x 214"):
        open_images(ImagesConfig("photos", size=300), "validation")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for config in (ImagesConfig(), PHOTOS):
        with pytest.raises(MissingExtraError, match=r"pip install 'hairpin\[images\]'"):
            open_images(config, "train")
