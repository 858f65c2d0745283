"""Moving digits: real, keyed by index, whole on the canvas, moving as they should."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hairpin.errors import DataError
from hairpin.run.data import DigitsConfig, MovingDigits, rank_indices
from hairpin.run.data.digits import cubic_weights, draw_glyphs, load_glyphs

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

CANVAS = DigitsConfig(
    height=20, width=20, glyph_size=12.0, motion="free", min_speed=0.5, max_speed=1.5
)


@pytest.fixture(scope="module")
def digits() -> MovingDigits:
    return MovingDigits(CANVAS)


def test_shapes_and_range(digits):
    video, labels = digits.clips(range(8))
    assert video.shape == (8, 16, 20, 20)
    assert video.dtype == torch.float32
    assert video.min() == -1
    assert 0.5 < video.max() <= 1
    assert labels.shape == (8, 1)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_same_clips_on_any_number_of_ranks(digits, ranks):
    whole = digits.clips(range(6, 9))
    shares = [rank_indices(2, batch_size=3, rank=r, ranks=ranks) for r in range(ranks)]
    parts = [digits.clips(share) for share in shares]
    assert [i for share in shares for i in share] == [6, 7, 8]
    assert torch.equal(torch.cat([p.video for p in parts]), whole.video)
    assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)


def test_seed_and_index_choose_the_clip(digits):
    again = MovingDigits(CANVAS, seed=0).clips([3])
    other = MovingDigits(CANVAS, seed=1).clips([3])
    assert torch.equal(digits.clips([3]).video, again.video)
    assert not torch.equal(again.video, other.video)
    assert not torch.equal(again.video, digits.clips([4]).video)


def test_training_and_validation_share_no_digit():
    train, _ = load_glyphs("train")
    validation, labels = load_glyphs("validation")
    assert len(train) + len(validation) == 1797
    assert set(labels.tolist()) == set(range(10))
    seen = {glyph.tobytes() for glyph in train}
    assert not any(glyph.tobytes() in seen for glyph in validation)


def test_all_classes_come_up(digits):
    assert set(digits.clips(range(200)).labels.flatten().tolist()) == set(range(10))


def test_digits_stay_whole_on_the_canvas(digits):
    """The ink of a digit is the same in every frame, but for rounding at the clip to [0, 1]."""
    ink = (digits.clips(range(32)).video + 1).sum(dim=(2, 3)) / 2
    assert ((ink.max(dim=1).values - ink.min(dim=1).values) / ink.mean(dim=1)).max() < 0.1


def test_speed_is_within_its_range():
    config = replace(CANVAS, height=200, width=200, min_speed=1.0, max_speed=2.0)
    video = (MovingDigits(config).clips(range(16)).video.double() + 1) / 2
    line = torch.arange(200.0, dtype=torch.float64)
    ink = video.sum(dim=(2, 3))
    y = (video.sum(dim=3) * line).sum(dim=2) / ink
    x = (video.sum(dim=2) * line).sum(dim=2) / ink
    speed = torch.hypot(y.diff(dim=1), x.diff(dim=1)).median(dim=1).values
    assert speed.min() > 0.95
    assert speed.max() < 2.05
    assert speed.std() > 0.1


def test_diagonal_motion_goes_by_whole_pixels():
    config = replace(CANVAS, motion="diagonal")
    corners = MovingDigits(config)._paths(np.random.default_rng(0).random((200, 1, 5)))
    assert set(corners.flatten()) == set(range(9))
    assert set(np.abs(np.diff(corners, axis=2)).flatten()) == {1}
    directions = {tuple(step) for step in np.diff(corners, axis=2)[:, 0, 0]}
    assert directions == {(-1, -1), (-1, 1), (1, -1), (1, 1)}


def test_diagonal_motion_keeps_every_pixel_of_the_glyph():
    """At the glyph's own size nothing is interpolated: all frames hold the same pixels."""
    clip = MovingDigits(DigitsConfig()).clips([0]).video[0]
    pixels = clip.flatten(1).sort().values
    torch.testing.assert_close(pixels, pixels[:1].expand_as(pixels))
    assert (clip[1:] != clip[:-1]).flatten(1).any(dim=1).all()


def test_digits_bounce():
    config = replace(CANVAS, frames=64, min_speed=1.0)
    corners = MovingDigits(config)._paths(np.random.default_rng(0).random((50, 1, 5)))
    assert corners.min() >= 0
    assert corners.max() <= 8
    turned = np.diff(np.sign(np.diff(corners, axis=2)), axis=2) != 0
    assert turned.any(axis=(1, 2, 3)).all()


def test_a_glyph_at_its_own_size_is_drawn_as_it_is():
    glyph = np.random.default_rng(0).random((1, 1, 8, 8))
    config = DigitsConfig(frames=1, height=12, width=12, glyph_size=8.0)
    canvas = draw_glyphs(glyph, np.array([[[[1.0, 3.0]]]]), config)
    np.testing.assert_allclose(canvas[0, 0, 1:9, 3:11], glyph[0, 0], atol=1e-12)
    assert canvas.sum() == pytest.approx(glyph.sum())


def test_interpolation_weights_sum_to_one_inside_the_glyph():
    weights = cubic_weights(np.array([[[0.3]]]), pixels=20, glyph_size=12.0)[0, 0, 0]
    np.testing.assert_allclose(weights[4:9].sum(axis=-1), 1)


def test_two_digits_show_both():
    config = replace(CANVAS, height=40, width=40, digits=2)
    video, labels = MovingDigits(config).clips(range(8))
    assert labels.shape == (8, 2)
    one = MovingDigits(replace(CANVAS, height=40, width=40)).clips(range(8)).video
    assert (video + 1).sum() > 1.4 * (one + 1).sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"glyph_size": 20.0}, "no room to move on a canvas of 20 x 20"),
        ({"min_speed": 2.0, "max_speed": 1.0}, "speeds from 2.0 to 1.0 are no range"),
        ({"digits": 0}, "digits=0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(DataError, match=message):
        replace(CANVAS, **settings)
