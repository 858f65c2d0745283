"""`hairpin train llm`, `linear-llm` and `vit`: what they print, go on with, and refuse.

Everything runs in this process, which forks the ranks: it must run no backward itself.
"""

import json

import pytest

from hairpin.run import metrics


def error_line(done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    (line,) = [text for text in done.err.splitlines() if text.startswith("hairpin: ")]
    return line


def test_a_run_prints_its_validation_and_is_prolonged_on_other_ranks(run, folder):
    """Degrees alone say how many ranks there are."""
    words = ("train", "llm", "--recipe", "tiny", "--dp", 2, "--length", 16)
    done = run(*words, "--steps", 3, "--validate-every", 2)
    assert done.code == 0, done.err
    assert done.out.startswith("step 3: validation loss ")
    assert "predicting bytes by how often they occur: 3." in done.out
    assert "checkpoint in runs/llm-tiny/checkpoints/step-00000003" in done.err
    assert {path.name for path in (folder / "runs/llm-tiny").iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
    }

    done = run("train", "llm", "--tp", 2, "--resume", "runs/llm-tiny", "--steps", 4, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["step"], result["ranks"]) == (4, 2)
    assert result["degrees"] == {"dp": 1, "sp": 1, "tp": 2, "pp": 1}
    rows = metrics.read(folder / "runs/llm-tiny/metrics.jsonl")
    assert [bool(row["validation"]) for row in rows] == [False, True, True, True]
    assert result["validation_loss"] == rows[-1]["validation"]["loss"] < 6


def test_the_method_is_chosen_at_every_start(run, folder):
    words = ("train", "llm", "--recipe", "tiny", "--sp", 2, "--method", "auto", "--out", "out")
    done = run(*words, "--steps", 1, "--json")
    assert done.code == 0, done.err
    method = json.loads(done.out)["method"]
    assert method in {"ring", "all gather", "ulysses"}
    table = (folder / "out/sequence.txt").read_text()
    assert "sequence of 32 positions over 2 ranks" in table
    assert {"ring", "all", "ulysses"} <= {line.split()[0] for line in table.splitlines() if line}

    (folder / "out/sequence.txt").unlink()
    done = run(*words[:2], "--sp", 2, "--method", "auto", "--resume", "out", "--steps", 2)
    assert done.code == 0, done.err
    assert (folder / "out/sequence.txt").exists()


def test_where_rows_are_whole_there_is_nothing_to_choose(run, folder):
    words = ("train", "llm", "--recipe", "tiny", "--method", "auto", "--steps", 1, "--out", "out")
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] is None
    assert not (folder / "out/sequence.txt").exists()


@pytest.mark.parametrize("what", ["linear-llm", "vit"])
def test_the_others_train_too(run, folder, what):
    done = run("train", what, "--recipe", "tiny", "--dp", 2, "--steps", 1, "--out", "out", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert 0 <= result["validation_accuracy"] <= 1
    assert (result["frequencies_loss"] is None) == (what == "vit")
    assert (folder / "out/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llm", "--recipe", "books"], "there is no recipe 'books'; choose one of source, tiny"),
        (["vit", "--recipe", "faces"], "choose one of digits, photos, tiny"),
        (["llm", "--ranks", 3, "--dp", 2], "got 3 ranks and dp=2"),
        (["llm", "--ranks", 2, "--method", "spiral"], "method 'spiral': write one of auto, ring"),
        (["llm", "--recipe", "tiny", "--pp", 3], "pp=3 stages need a layer each"),
        (["llm", "--tp", 2, "--dp", 2, "--data-parallel", "ddp"], "use --data-parallel fsdp"),
        (["linear-llm", "--dtype", "int8"], "dtype='int8' is not supported"),
        (["vit", "--size", 9], "the digits have 8 x 8 pixels"),
        (["llm", "--memory", "2 apples"], "cannot read '2 apples' as an amount of memory"),
        (["llm", "--resume", "nowhere"], "there is no checkpoint in nowhere"),
        (["vit", "--steps", 0], "steps=0"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_rank_starts(
    run, folder, monkeypatch, words, message
):
    monkeypatch.setattr("hairpin.run.launch.launch", None)
    assert message in error_line(run("train", *words))
    assert not (folder / "runs").exists()


def test_a_missing_extra_is_named_before_training(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else 1)
    line = error_line(run("train", "vit"))
    assert "need pillow: pip install 'hairpin[images]'" in line


def test_a_checkpoint_of_another_model_is_refused(run):
    done = run("train", "linear-llm", "--recipe", "tiny", "--dp", 2, "--steps", 1, "--out", "out")
    assert done.code == 0, done.err
    for other in ("llm", "vit"):
        line = error_line(run("train", other, "--resume", "out", "--steps", 3))
        assert "the saved settings are not those of a" in line
