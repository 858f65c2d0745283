"""``hairpin bench``: what it prints and writes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hairpin.cli.bench import app
from hairpin.errors import OutputError

SMALL = ["--ranks", "2", "--rounds", "1"]


@pytest.mark.root
def test_sp2d_prints_json_and_writes_json_and_curve(tmp_path):
    arguments = ["sp2d", *SMALL, "--rates", "unlimited,200mbit", "--frames", "4", "--patches", "16"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "sp2d.json").read_text())
    assert (tmp_path / "sp2d.png").stat().st_size > 1000
    assert "network namespaces" in done.stderr


@pytest.mark.root
def test_sp2d_prints_a_table_that_fits_80_columns(tmp_path):
    arguments = ["sp2d", *SMALL, "--rates", "200mbit", "--frames", "4", "--patches", "16"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for words in ("200mbit", "dsp", "ulysses", "ring", "megatron", "by formula"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout


@pytest.mark.root
def test_switch_prints_its_counts(tmp_path):
    arguments = ["switch", *SMALL, "--rate", "1gbit", "--size", "1MB", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for words in ("17 x 65", "5 x 1", "all_to_all_single / receive_first", "can be hidden"):
        assert words in done.stdout
    assert json.loads((tmp_path / "switch.json").read_text())["benchmark"] == "switch"


def test_an_unwritable_folder_is_named_before_measuring(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write into .*file.*--out"):
        CliRunner().invoke(app, ["switch", "--out", str(blocked)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "table,longst"], "there is no part 'longst'"),
        (["--ratios", "0.5,much"], "cannot read the ratios"),
        (["--ratios", "2"], "cannot read the ratios '2'"),
    ],
)
def test_chunk_refuses_what_it_cannot_measure(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["chunk", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_chunk_hands_on_its_options_and_prints_and_writes(tmp_path, monkeypatch):
    from hairpin.bench import chunking

    row = {
        "model": "GPT-2",
        "variant": "eager",
        "ratio": 0.2,
        "eager_peak_bytes": 1000,
        "peak_bytes": 215,
        "time_ratio": 1.0625,
        "relative_error": 3e-7,
        "search_s": 2.25,
        "floor_bytes": None,
    }
    missing = dict.fromkeys(("peak_bytes", "time_ratio", "relative_error", "search_s"))
    line = {
        "ratio": 0.2,
        "rows": 2,
        "feasible": 1,
        "honoured": 1,
        "exact": 1,
        "median_time_ratio": 1.0625,
        "worst_time_ratio": 1.0625,
        "worst_relative_error": 3e-7,
    }
    asked = []

    def measure(settings, *, say):
        asked.append(settings)
        table = [row, {**row, **missing, "floor_bytes": 300}]
        return {"settings": {"parts": ["table", "longest"]}, "table": table, "summary": [line]}

    monkeypatch.setattr(chunking, "measure", measure)
    arguments = ["--parts", "table,longest", "--models", "GPT-2 (eager); Wan", "--ratios", "0.2"]
    arguments += ["--rounds", "2", "--longest-budget", "1GiB", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["chunk", *arguments])
    assert done.exit_code == 0, done.output
    assert asked == [
        chunking.Settings(
            parts=("table", "longest"),
            titles=("GPT-2 (eager)", "Wan"),
            ratios=(0.2,),
            rounds=2,
            longest_budget_bytes=2**30,
        )
    ]
    for words in ("GPT-2 eager", "0.215", "1.06 x", "2.2 s", "floor 0.30", "1 of 2", "longest: in"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(json.loads((tmp_path / "chunk.json").read_text())["table"]) == 2


@pytest.mark.parametrize("sizes", ["64x128,12", "0x4", "axb"])
def test_openfold_refuses_what_is_no_size(tmp_path, sizes):
    arguments = ["openfold", "--openfold", "x", "--sizes", sizes, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "cannot read the size" in done.output
    assert not list(tmp_path.iterdir())


def test_openfold_hands_on_its_options_and_prints_and_writes(tmp_path, monkeypatch):
    from hairpin.bench import openfold

    row = {
        "sequences": 4,
        "residues": 16,
        "direction": "forward",
        "whose": "ours",
        "setting": "within OpenFold's, in place, chunks of 4",
        "peak_bytes": 3 * 2**20,
        "peak_ratio": 0.25,
        "time_ratio": 0.8125,
        "relative_error": 3e-7,
    }
    missing = dict.fromkeys(("peak_bytes", "peak_ratio", "time_ratio", "relative_error"))
    asked = []

    def measure(settings, *, say):
        asked.append(settings)
        return {"table": [row, {**row, **missing, "setting": "within half"}]}

    monkeypatch.setattr(openfold, "measure", measure)
    arguments = ["--openfold", "there", "--sizes", "4x16, 8x32", "--rounds", "2"]
    done = CliRunner().invoke(app, ["openfold", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [openfold.Settings(openfold="there", sizes=((4, 16), (8, 32)), rounds=2)]
    for words in ("4 x 16, forward", "3.00 MiB", "0.25", "0.81 x", "3e-07", "no plan"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(json.loads((tmp_path / "openfold.json").read_text())["table"]) == 2


def test_kernels_says_what_was_measured(tmp_path):
    arguments = ["kernels", "--lengths", "5,8", "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for words in ("attention", "sdpa", "gated_projections", "merged", "GPU: "):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert len(result["rows"]) == 2 * 2 * (3 + 3 + 2 + 3)
    assert all(row["time_s"] > 0 and row["peak_bytes"] > 0 for row in result["rows"])
    if not torch.cuda.is_available():
        assert result["gpu"] == "not yet measured: torch sees no CUDA device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "atention"], "there is no part 'atention'"),
        (["--lengths", "64,x"], "cannot read the lengths '64,x'"),
        (["--lengths", "0"], "cannot read the lengths '0'"),
    ],
)
def test_kernels_refuses_what_it_cannot_measure(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["kernels", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
