"""The same samples on any mesh, and pictures in which each frame is where it should be."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import CheckpointError, RecipeError
from hairpin.run import checkpoint, sample
from hairpin.run.launch import RankFailure, launch, user_error, warm
from hairpin.run.recipes import tiny
from hairpin.run.sample import Samples, draw_samples, write_contact_sheet, write_gif
from hairpin.run.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step."""
    warm("sklearn.datasets")
    out = tmp_path_factory.mktemp("run")
    launch(train, 1, tiny(), Mesh(dp=1, sp=1), out, stop_step=1, timeout_s=60)
    return out


def draw(path: Path, dp: int, sp: int, count: int, seed: int = 0) -> Samples:
    mesh = init_mesh(dp=dp, sp=sp, timeout_s=60)
    return draw_samples(path, mesh, count=count, seed=seed)


def on_ranks(path: Path, dp: int, sp: int, count: int = 3, **kwargs) -> list[Samples]:
    return launch(draw, dp * sp, path, dp, sp, count, timeout_s=100, **kwargs)


def synthetic(given_frames: int = 2) -> Samples:
    """Two clips of five 4 x 4 frames; the model gets the last three wrong by one half."""
    real = torch.full((2, 5, 4, 4), -1.0)
    real[:, :, 1, 2] = 1.0
    generated = real.clone()
    generated[:, given_frames:] += 0.5
    return Samples(real, generated, torch.tensor([[3], [7]]), given_frames)


# ---------------------------------------------------------------------------------------- sampling


def test_samples_begin_with_the_given_frames_and_differ_after(run):
    (samples,) = on_ranks(run, 1, 1)
    given = tiny().given_frames
    assert samples.generated.shape == samples.real.shape == (3, 8, 8, 8)
    assert torch.equal(samples.generated[:, :given], samples.real[:, :given])
    assert not torch.equal(samples.generated[:, given:], samples.real[:, given:])
    assert samples.labels.shape == (3, 1)


def test_any_mesh_draws_the_same(run):
    (alone,) = on_ranks(run, 1, 1)
    for dp, sp in [(2, 1), (1, 2)]:
        for samples in on_ranks(run, dp, sp):
            torch.testing.assert_close(samples.generated, alone.generated, atol=1e-4, rtol=0)
            assert torch.equal(samples.real, alone.real)


def test_the_clips_show_as_many_digits_as_they_can(run):
    (samples,) = on_ranks(run, 1, 1, count=12)
    labels = samples.labels[:, 0].tolist()
    assert len(set(labels[:10])) == len(set(labels)) >= 8


def test_another_seed_draws_other_clips(run):
    (one,), (other,) = on_ranks(run, 1, 1), on_ranks(run, 1, 1, seed=1)
    assert not torch.equal(one.real, other.real)


def test_no_clips_is_an_error(run):
    with pytest.raises(RankFailure) as info:
        on_ranks(run, 1, 1, count=0)
    error = user_error(info.value)
    assert isinstance(error, RecipeError)
    assert "got count=0; sample at least 1" in str(error)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        sample.load_model(tmp_path, Mesh(dp=1, sp=1), clips=1)


def test_the_averaged_weights_are_used(run):
    model, recipe = sample.load_model(run, Mesh(dp=1, sp=1), clips=1)
    assert recipe == tiny()
    raw = sample.build_model(recipe, device=torch.device("cpu"))
    average = sample.build_model(recipe, device=torch.device("cpu"))
    checkpoint.load_average(checkpoint.find(run), average)
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in average.named_parameters())
    assert any(not torch.equal(p, named[n]) for n, p in raw.named_parameters())


# ---------------------------------------------------------------------------------------- likeness


def test_likeness_is_that_of_the_predicted_frames():
    samples = synthetic()
    ink, paper = 1 / 16, 15 / 16
    error = paper * 0.5**2 + ink * 0.0  # ink + 0.5 is cut off at 1
    assert samples.psnr_db == pytest.approx(10 * torch.log10(torch.tensor(4 / error)).item())


def test_a_still_picture_of_a_clip_at_rest_is_perfect():
    assert synthetic().still_psnr_db > 60


# ---------------------------------------------------------------------------------------- pictures


def test_the_film_has_a_picture_for_each_frame(tmp_path):
    path = tmp_path / "samples.gif"
    write_gif(synthetic(), path, scale=10)
    with Image.open(path) as film:
        assert film.n_frames == 5
        assert film.info["loop"] == 0


def colours(picture: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.convert("RGB").getcolors(1 << 16)}


def test_the_borders_of_the_film_tell_given_from_predicted(tmp_path):
    path = tmp_path / "samples.gif"
    write_gif(synthetic(), path, scale=10)
    with Image.open(path) as film:
        first = film.convert("RGB").getpixel((sample._LEFT, sample._TOP))
        film.seek(4)
        last = film.convert("RGB").getpixel((sample._LEFT, sample._TOP + 50))
    assert near(first, sample._GIVEN)
    assert near(last, sample._GENERATED)


def near(colour, expected) -> bool:
    return all(abs(a - b) < 12 for a, b in zip(colour, expected, strict=True))


def test_the_sheet_has_a_column_a_frame_and_two_rows_a_clip(tmp_path):
    path, scale = tmp_path / "samples.png", 10
    write_contact_sheet(synthetic(), path, scale=scale)
    with Image.open(path) as file:
        sheet = file.convert("RGB")
    step = 4 * scale + 2 * sample._BORDER + sample._GAP
    left, top = sample._LEFT, sample._TOP
    for t in range(5):
        x = left + t * step
        expected = sample._GIVEN if t < 2 else sample._GENERATED
        assert sheet.getpixel((x, top + step)) == expected  # the model's row
        real = sheet.getpixel((x + sample._BORDER + 25, top + sample._BORDER + 15))
        assert real == (255, 255, 255)  # the one pixel of ink, in row 1 and column 2
    paper = sheet.getpixel((left + 4 * step + sample._BORDER + 5, top + step + sample._BORDER + 5))
    assert paper == (64, 64, 64)  # -1 + 0.5: a quarter of the way to white
    assert sheet.width == left + 5 * step
    assert {(17, 20, 28), (255, 255, 255)} <= colours(sheet)
