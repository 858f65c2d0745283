"""`hairpin train video`: files and data where they belong, errors in one line, nobody left behind.

In this process only runs on several ranks, which are forked: it must run no backward itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hairpin.run import checkpoint, metrics
from marks import slow

ROOT = Path(__file__).parents[2]
TINY = ("train", "video", "--recipe", "tiny")


def error_line(done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    (line,) = [text for text in done.err.splitlines() if text.startswith("hairpin: ")]
    return line


def program(*words: object, cwd: Path, **kwargs) -> subprocess.Popen[str]:
    """The command in a process and process group of its own."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from hairpin.cli.app import main; main()"  # a background shell ignores it
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


@pytest.fixture
def short_run(run, folder):
    """A run of two steps on two ranks, in ./short."""
    done = run(*TINY, "--ranks", 2, "--steps", 2, "--out", "short")
    assert done.code == 0, done.err
    return folder / "short"


# ------------------------------------------------------------------------------------------ success


def test_a_run_writes_everything_and_is_prolonged_on_other_ranks(run, folder):
    done = run(*TINY, "--ranks", 2, "--steps", 3)
    assert (done.code, done.out) == (0, "runs/tiny/report.html\n")
    names = {path.name for path in (folder / "runs/tiny").iterdir()}
    assert names == {
        "checkpoints",
        "metrics.jsonl",
        "plan.toml",
        "report.html",
        "samples.gif",
        "samples.png",
    }

    done = run("train", "video", "--ranks", 3, "--resume", "runs/tiny", "--steps", 5, "--json")
    result = json.loads(done.out)
    assert (result["step"], result["ranks"]) == (5, 3)
    assert result["report"] == "runs/tiny/report.html"
    rows = metrics.read(folder / "runs/tiny/metrics.jsonl")
    assert [len(row["bytes_sent"]) for row in rows] == [2, 2, 2, 3, 3]
    assert result["loss"] == rows[-1]["loss"]
    assert "dp 1, sp 3" in (folder / "runs/tiny/report.html").read_text()


def test_a_second_run_takes_a_new_folder(run, folder):
    for expected in ("runs/tiny/report.html\n", "runs/tiny-2/report.html\n"):
        assert run(*TINY, "--ranks", 2, "--steps", 1).out == expected


@pytest.mark.slow
def test_one_rank_needs_no_launch(tmp_path):
    process = program(*TINY, "--steps", 2, "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert json.loads(out)["ranks"] == 1
    assert "The model was not split" in (tmp_path / "runs/tiny/report.html").read_text()


@pytest.mark.slow
def test_under_torchrun_the_command_joins(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("from hairpin.cli.app import main\nmain()\n")
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), *TINY]
    done = subprocess.run(
        [sys.executable, *words, "--steps", "2", "--out", "out", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "faces"], "there is no recipe 'faces'; choose one of digits, tiny"),
        (["--ranks", 3, "--dp", 2], "got 3 ranks and dp=2; the ranks are shared out evenly"),
        (["--memory", "2 apples"], "cannot read '2 apples' as an amount of memory"),
        (["--resume", "nowhere"], "there is no checkpoint in nowhere"),
        (["--dtype", "int8"], "dtype='int8' is not supported; give 'float32' or 'float64'"),
        (["--steps", 0], "steps=0"),
        (["--out", "file/out"], "cannot write to file/out: Not a directory; choose another folder"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_rank_starts(
    run, folder, monkeypatch, words, message
):
    (folder / "file").touch()
    monkeypatch.setattr("hairpin.run.launch.launch", None)
    assert message in error_line(run(*TINY, *words))


def test_a_missing_extra_is_named_before_training(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else 1)
    line = error_line(run(*TINY))
    assert "training and its report need jinja2: pip install 'hairpin[report]'" in line


def test_what_a_rank_finds_wrong_is_one_line_too(run):
    line = error_line(run(*TINY, "--ranks", 2, "--steps", 1, "--memory", "100KiB"))
    assert "more than the 100.00 KiB that --memory allows; use more ranks than 2" in line


def test_what_cannot_go_on_from_a_checkpoint_is_said(run, short_run):
    resume = ("train", "video", "--resume", "short")
    cases = [
        (
            ["--steps", 2],
            "has done 2 steps already and the run is to stop at 2; give --steps above 2",
        ),
        (["--seed", 4], "seed: saved 0, asked for 4"),
        (["--recipe", "digits"], "batch_size: saved 4, asked for"),
    ]
    for words, message in cases:
        assert message in error_line(run(*resume, *words))
    done = run(*TINY, "--steps", 1, "--out", "short")
    assert "short holds another run; go on with it by --resume short" in error_line(done)

    data = next(checkpoint.find(short_run).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert f"{data.name} has" in error_line(run(*resume, "--steps", 3))


def test_torchrun_and_ranks_must_agree(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = error_line(run(*TINY, "--ranks", 3))
    assert "torchrun started 2 ranks but --ranks says 3" in line


# -------------------------------------------------------------------------------------- being ended


@pytest.mark.parametrize(("number", "code"), [slow(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_ended_run_leaves_a_good_checkpoint_and_no_rank(tmp_path, number, code):
    words = [*TINY, "--ranks", 2, "--steps", 100_000, "--checkpoint-every", 2, "--out", "out"]
    process = program(*words, cwd=tmp_path)
    folder = tmp_path / "out" / "checkpoints"
    end = time.monotonic() + 60
    while not list(folder.glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "step 1/100000  loss " in err
    assert "go on with: hairpin train video --resume out" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)
    assert checkpoint.read_info(checkpoint.find(tmp_path / "out")).step >= 2
