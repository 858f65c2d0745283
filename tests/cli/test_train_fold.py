"""`hairpin train fold`: errors in one line; a run that is killed goes on from its checkpoint.

Training runs in processes of its own: this process must run no backward, for it forks.
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
from proteins.tiny import simple

pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
ROOT = Path(__file__).parents[2]
SEQUENCE = "ACDEFGHIKLMN"


def error_line(done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    (line,) = [text for text in done.err.splitlines() if text.startswith("hairpin: ")]
    return line


@pytest.fixture
def proteins(folder) -> Path:
    """A protein, a folder without a structure, and one without an alignment elsewhere."""
    for name in ("p/1abc", "p/notes", "q/2abc"):
        (folder / name).mkdir(parents=True)
    (folder / "p/1abc/1abc.cif").write_text(simple(SEQUENCE))
    (folder / "p/1abc/a.a3m").write_text(f">t\n{SEQUENCE}\n>o\n{SEQUENCE[::-1]}\n")
    (folder / "q/2abc/2abc.cif").write_text(simple(SEQUENCE))
    return folder / "p"


def program(*words: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hairpin.cli", "train", "fold", "--data", "p", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_says_how_near_it_came(folder, proteins):
    process = program("--steps", 100_000, "--checkpoint-every", 2, "--out", "out", cwd=folder)
    end = time.monotonic() + 90
    while not list((folder / "out/checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "go on with: hairpin train fold --resume out" in err
    assert "Traceback" not in err

    (folder / "p/3abc").mkdir()  # comes too late: a run goes on with the proteins it had
    (folder / "p/3abc/3abc.cif").write_text(simple(SEQUENCE))
    done_steps = checkpoint.read_info(checkpoint.find(folder / "out")).step
    process = program(
        "--resume", "out", "--recipe", "tiny", "--steps", done_steps + 3, "--checkpoint-every", 2,
        "--validate-every", 1, "--json", cwd=folder,
    )  # fmt: skip
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["step"] == done_steps + 3
    assert result["validated_on"] == "the proteins trained on: this is memorising"
    assert set(result["validation"]) == {"1abc"}
    rows = metrics.read(folder / "out/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, done_steps + 4))
    assert [row["validation"] for row in rows][-1] == result["validation"]
    assert "Ca-RMSD 1abc " in err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_train_and_say_it_once(folder, proteins):
    process = program(
        "--ranks", 2, "--dap", 1, "--batch-size", 2, "--steps", 2, "--json", "--out", "out",
        cwd=folder,
    )  # fmt: skip
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == 2
    rows = metrics.read(folder / "out/metrics.jsonl")
    assert [row["proteins"] for row in rows] == [["1abc", "1abc"]] * 2
    assert all(len(row["bytes_sent"]) == 2 and row["bytes_sent"][1] > 0 for row in rows)
    process = program("--dap", 2, "--resume", "out", "--steps", 3, cwd=folder)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert out.startswith("step 3, on the proteins trained on")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none"], "none: there is no such folder; check the name"),
        (["--data", "p/1abc"], "no protein in it; make a folder for each"),
        (["--data", "q"], "2abc: no alignment in it; put an .a3m or .sto file there"),
        (["--data", "p", "--protein", "notes"], "notes: no structure in it; put notes.cif there"),
        (["--data", "p", "--recipe", "huge"], "there is no recipe 'huge'; choose one of tiny"),
        (["--data", "p", "--steps", 0], "steps=0 must be at least 1"),
        (["--data", "p", "--batch-size", 0], "batch_size=0 must be at least 1"),
        (["--data", "p", "--ranks", 3, "--dap", 2], "got 3 ranks and dap=2; groups of ranks"),
        (["--data", "p", "--ranks", 2, "--dap", 1], "a step takes 1 protein, too few to share out"),
        (["--data", "p", "--product", "teleport"], "write one of gather, ring, channels"),
        (["--data", "p", "--resume", "nowhere"], "there is no checkpoint in nowhere"),
        (["--data", "p", "--out", "file/out"], "cannot write to file/out: Not a directory"),
    ],
)
def test_a_wrong_option_is_one_line(run, folder, proteins, words, message):
    (folder / "file").touch()
    assert message in error_line(run("train", "fold", *words))


def test_a_chain_of_another_sequence_is_named_before_the_first_step(run, folder, proteins):
    (proteins / "1abc/1abc.cif").write_text(simple("WWWWWWWWWWWW"))
    line = error_line(run("train", "fold", "--data", "p", "--out", "out", "--workers", 0))
    assert "1abc.cif: chain A has another sequence: 0 of 12 residues agree" in line
    assert not (folder / "out/metrics.jsonl").exists()


def test_a_checkpoint_of_a_video_model_is_refused(run, folder, proteins):
    (folder / "video/step-00000001").mkdir(parents=True)
    info = {"step": 1, "recipe": {"name": "tiny"}, "ranks": 1, "files": {}, "format": 1}
    (folder / "video/step-00000001/checkpoint.json").write_text(json.dumps(info))
    line = error_line(run("train", "fold", "--data", "p", "--resume", "video"))
    assert "step-00000001 is not of a folding model; go on with it by hairpin train video" in line


def test_a_missing_extra_is_named_before_training(run, proteins, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gemmi" else 1)
    line = error_line(run("train", "fold", "--data", "p"))
    assert "need gemmi: pip install 'hairpin[fold]'" in line
