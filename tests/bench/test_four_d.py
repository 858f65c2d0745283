"""The benchmark of layouts: one process's losses, what is counted, and how layouts are read."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hairpin.bench import four_d as bench
from hairpin.cli.app import app
from hairpin.errors import MeshError, UnitError

SMALL = bench.Settings(
    ranks=2,
    layouts=("ddp2", "fsdp2", "pp2", "sp2", "tp2"),
    length=12,
    batch_size=4,
    rates=("200mbit",),
    rounds=1,
    virtual_flops_per_s=1e12,
)
WEIGHTS = 2 * 256 * 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128


@pytest.fixture(scope="module")
def small():
    """The result, as it comes back from JSON, and what was said."""
    said: list[str] = []
    return json.loads(json.dumps(bench.measure(SMALL, say=said.append))), said


def test_every_layout_gives_the_losses_of_one_process(small):
    result, _ = small
    assert [row["layout"] for row in result["layouts"]] == list(SMALL.layouts)
    assert len(result["losses"]) == 2
    assert 5 < result["losses"][1] < result["losses"][0] < 6
    for row in result["layouts"]:
        assert row["worst_loss_error"] < 1e-6, row["layout"]


def test_what_is_held_and_called_is_what_the_layout_says(small):
    rows = {row["layout"]: row for row in small[0]["layouts"]}
    everything = 4 * 4 * WEIGHTS  # weights, average and two moments of four bytes
    for whole in ("ddp2", "sp2"):
        assert rows[whole]["held_bytes"] == [everything] * 2
    assert sum(rows["pp2"]["held_bytes"]) == everything
    assert sum(rows["fsdp2"]["held_bytes"]) == everything
    assert everything < sum(rows["tp2"]["held_bytes"]) < 1.01 * everything  # norms are on both
    for rank in rows["tp2"]["calls"]:  # two a layer, twice; the head's input; embedding
        assert rank["all_reduce"] >= 4 * 4 + 1
    assert rows["sp2"]["calls"][0]["send"] > rows["pp2"]["calls"][0]["send"]
    for rank in rows["fsdp2"]["calls"]:
        assert rank["_reduce_scatter_base_"] == 5  # four layers, and what is around them


def test_every_layout_is_timed(small):
    result, said = small
    (run,) = result["runs"]
    assert [row["layout"] for row in run["layouts"]] == list(SMALL.layouts)
    assert all(row["time_s"] > 0 for row in run["layouts"])
    assert min(row["over_best"] for row in run["layouts"]) == 1
    assert any("sleep as a device of 1000 GFLOP/s" in line for line in said)


@pytest.mark.root
def test_two_hosts_are_counted():
    settings = replace(SMALL, layouts=("ddp2",), hosts=2, virtual_flops_per_s=None)
    (row,) = bench.measure(settings, say=print)["runs"][0]["layouts"]
    for counted in (row["wire_bytes"], row["host_bytes"]):
        assert all(4 * WEIGHTS < bytes_ < 4.4 * WEIGHTS for bytes_ in counted)


def test_usual_layouts_are_each_way_alone_and_all_ways_of_twos():
    four = bench.usual_layouts(4)
    assert four[:5] == ["pp4", "ddp4", "fsdp4", "sp4", "tp4"]
    assert {"pp2 fsdp2", "ddp2 sp2", "sp2 tp2", "tp2 sp2"} < {*four}
    assert not any("ddp2 tp2" in layout or "ddp2 fsdp2" in layout for layout in four)
    assert bench.usual_layouts(3) == ["pp3", "ddp3", "fsdp3", "sp3", "tp3"]
    assert "pp2 fsdp2 sp2 tp2" in bench.usual_layouts(16)
    for ranks in (2, 4, 8):
        for text in bench.usual_layouts(ranks):
            assert bench.read_layout(text).job(SMALL).degrees.ranks == ranks


def test_a_layout_is_a_mesh_in_its_own_order():
    layout = bench.read_layout(" tp2  sp3 ")
    assert layout.name == "tp2 sp3"
    assert list(layout.mesh_degrees.items()) == [("pp", 1), ("dp", 1), ("tp", 2), ("sp", 3)]
    assert bench.read_layout("fsdp2").job(SMALL).data_parallel == "fsdp"


@pytest.mark.parametrize("text", ["", "sp", "sp0", "ep2", "sp2 sp2", "ddp2 fsdp2", "2sp"])
def test_a_layout_that_cannot_be_read(text):
    with pytest.raises(MeshError, match="cannot read the layout"):
        bench.read_layout(text)


def test_what_the_model_cannot_be_is_said():
    def refusal(text: str, ranks: int) -> str | None:
        return bench.read_layout(text).refusal(replace(SMALL, ranks=ranks))

    assert refusal("sp2", 2) is None
    assert "tp=8 does not divide" in refusal("tp8", 8)
    assert "sp2 is of 2 ranks" in refusal("sp2", 4)


def test_a_rate_that_cannot_be_read():
    with pytest.raises(UnitError, match="'50 apples'"):
        bench.measure(bench.Settings(rates=("50 apples",)), say=print)


@pytest.mark.usefixtures("_no_network")
def test_the_command_prints_tables_and_writes_json(tmp_path):
    sizes = ["--ranks", "2", "--layouts", "ddp2,tp2,tp8", "--length", "12", "--rounds", "1"]
    small = ["--batch-size", "2", "--virtual-gflops", "0", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "4d", *sizes, *small])
    assert done.exit_code == 0, done.output
    for words in ("counted", "ddp2", "a step at unlimited", "not counted", "tp8 is of 8 ranks"):
        assert words in done.stdout
    assert "rates are NOT limited" in done.output
    assert "kernels compute for real" in done.output
    result = json.loads((tmp_path / "4d.json").read_text())
    assert (result["benchmark"], list(result["refused"])) == ("4d", ["tp8"])
