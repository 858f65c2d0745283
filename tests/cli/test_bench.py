"""``hairpin bench``: what it prints and writes."""

import json

import pytest
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
