"""The sp2d benchmark: its result holds what it promises, with and without an emulated network."""

import json

import pytest

from hairpin.bench import sp2d
from hairpin.bench.curve import draw_speedups
from hairpin.bench.methods import METHODS, sent_bytes
from hairpin.bench.transformer import Size
from hairpin.errors import OutputError, UnitError

SMALL = sp2d.Settings(
    ranks=2, rates=("unlimited", "200mbit"), size=Size(t=4, s=16, c=16, heads=2), rounds=2
)


def measured(settings: sp2d.Settings) -> tuple[dict, list[str]]:
    """The result, as it comes back from JSON, and what was said."""
    said: list[str] = []
    return json.loads(json.dumps(sp2d.measure(settings, say=said.append))), said


def check_runs(result: dict) -> None:
    for run in result["runs"]:
        assert set(run["methods"]) == set(METHODS)
        assert set(run["speedup"]) == {"ulysses", "ring", "megatron", "best other"}
        for name, parts in run["methods"].items():
            forward, backward = sent_bytes(name, SMALL.size, SMALL.ranks)
            assert sum(parts["forward"]["payload_bytes"]) == forward
            assert sum(parts["backward"]["payload_bytes"]) == backward
            assert sum(parts["step"]["payload_bytes"]) == forward + backward
            assert len(parts["step"]["times_s"]) == SMALL.rounds
            assert parts["step"]["time_s"] > 0


@pytest.mark.root
def test_on_an_emulated_network(tmp_path):
    result, _ = measured(SMALL)
    assert [run["rate_bits_per_s"] for run in result["runs"]] == [None, 2e8]
    check_runs(result)
    for run in result["runs"]:
        for parts in run["methods"].values():
            step = parts["step"]
            assert sum(step["payload_bytes"]) < sum(step["wire_bytes"])
    picture = draw_speedups(result, tmp_path / "curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot write"):
        draw_speedups(result, tmp_path / "absent" / "curve.png")


@pytest.mark.usefixtures("_no_network")
def test_over_the_loopback():
    result, said = measured(SMALL)
    assert [run["rate"] for run in result["runs"]] == ["unlimited"]
    assert "rates are NOT limited" in said[0]
    assert "no tools" in result["wire"]
    check_runs(result)
    assert result["runs"][0]["methods"]["dsp"]["step"]["wire_bytes"] is None
    ratios = result["runs"][0]["bytes_ratio"]
    assert ratios["ulysses"]["forward"] == pytest.approx(1 / 2)
    assert ratios["ring"]["forward"] == pytest.approx(1 / SMALL.ranks)


def test_a_rate_that_cannot_be_read():
    with pytest.raises(UnitError, match="'50 apples'"):
        sp2d.measure(sp2d.Settings(rates=("50 apples",)), say=print)
