"""`hairpin sample`: pictures from a checkpoint."""

import json

import pytest
from PIL import Image

from hairpin.comm.mesh import Mesh
from hairpin.run.launch import launch, warm
from hairpin.run.recipes import tiny
from hairpin.run.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    warm("sklearn.datasets")
    out = tmp_path_factory.mktemp("run")
    launch(train, 1, tiny(), Mesh(dp=1, sp=1), out, stop_step=1, timeout_s=60)
    return out


def test_a_film_and_a_sheet_are_written(run, folder, trained):
    done = run("sample", trained, "--ranks", 2, "--count", 3, "--out", "pictures")
    assert (done.code, done.out) == (0, "pictures/samples.gif\npictures/samples.png\n")
    with Image.open(folder / "pictures/samples.gif") as film:
        assert film.n_frames == tiny().data.frames
    with Image.open(folder / "pictures/samples.png") as sheet:
        assert sheet.format == "PNG"


def test_json_tells_the_likeness_the_same_on_any_ranks(run, trained):
    figures = []
    for words in (["--ranks", 2], ["--ranks", 2, "--dp", 2]):
        done = run("sample", trained, "--count", 3, "--json", *words)
        figures.append(json.loads(done.out))
    assert figures[0]["psnr_db"] == pytest.approx(figures[1]["psnr_db"], abs=1e-3)
    assert figures[0]["clips"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no checkpoint in nowhere"),
        (["nowhere", "--ranks", 3, "--dp", 2], "got 3 ranks and dp=2"),
    ],
)
def test_an_error_is_one_line(run, words, message):
    done = run("sample", *words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_folder_that_cannot_be_written_is_named(run, folder, trained):
    (folder / "file").touch()
    done = run("sample", trained, "--out", "file/pictures")
    assert done.code == 2
    assert "cannot write to file/pictures" in done.err
