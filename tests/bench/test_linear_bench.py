"""The linear attention benchmark: bytes by the formula, LASP's order as it is, longest lengths."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from hairpin.bench import linear as bench
from hairpin.bench import longest
from hairpin.bench.virtual import virtual_linear_attention
from hairpin.cli.app import app
from hairpin.errors import UnitError
from hairpin.kernels.linear_attention import linear_attention

SMALL = bench.Settings(
    parts=("speed",),
    ranks=(3,),
    rates=("200mbit",),
    lengths=(96, 192),
    heads=2,
    head_dim=8,
    layers=2,
    rounds=1,
    virtual_flops_per_s=1e9,
)


def measured(settings: bench.Settings) -> tuple[dict, list[str]]:
    """The result, as it comes back from JSON, and what was said."""
    said: list[str] = []
    return json.loads(json.dumps(bench.measure(settings, say=said.append))), said


def by_method(case: dict) -> dict[str, dict]:
    return {row["method"]: row for row in case["methods"]}


@pytest.mark.usefixtures("_no_network")
def test_over_the_loopback():
    result, said = measured(SMALL)
    assert "the local work is played" in said[0]
    assert "rates are NOT limited" in said[1]
    (run,) = result["runs"]
    short, long = map(by_method, run["cases"])
    assert list(short) == ["work alone", "chain", "all_gather", "log_scan", *bench.PEERS]
    assert short["work alone"]["over_alone"] == 1
    for name, row in short.items():
        assert row["payload_as_formula"], name
        assert long[name]["payload_as_formula"], name
        for part in ("forward", "backward"):  # the length does not matter
            assert row[part]["payload_bytes"] == long[name][part]["payload_bytes"], name
            assert row[part]["time_s"] > 0
        if name != "work alone":
            assert row["error"] < 1e-5, name
    assert sum(short["work alone"]["forward"]["payload_bytes"]) == 0
    exchanges = {name: row["forward"]["collectives"] for name, row in short.items()}
    assert exchanges == {
        "work alone": 0,
        "chain": 2 * 2,  # layers; the rank between the others receives, then sends
        "all_gather": 2,
        "log_scan": 2 * 2,  # layers, rounds
        **dict.fromkeys(bench.PEERS, 2 * 2),
    }


def test_the_formula_by_hand():
    """2 heads of 8 by 8 numbers of 4 bytes: 512; a decay per head: 8; 2 layers."""
    of = {
        (name, part): bench.formula_bytes(name, 4, SMALL, part)
        for name in ("chain", "all_gather", "log_scan", *bench.PEERS, "work alone")
        for part in ("forward", "backward")
    }
    assert of["chain", "forward"] == of[bench.PEERS[0], "forward"] == [1024, 1024, 1024, 0]
    assert of["chain", "backward"] == of[bench.PEERS[1], "backward"] == [0, 1024, 1024, 1024]
    assert of["all_gather", "forward"] == [3120, 2080, 1040, 0]
    assert of["log_scan", "backward"] == [0, 1040, 2080, 2080]
    assert of["work alone", "forward"] == [0] * 4


@pytest.mark.usefixtures("_no_network")
def test_the_order_of_lasp_makes_ranks_wait():
    """Forward of 3 ranks and 2 layers of at least w each: 3 x 2 w with barriers, (2 + 2) w without.

    Sleeping takes no less than it should whatever else the machine does.
    """
    flops = 2 * 2 * 32 * (3 * 8 * 8 + 32 * 16)  # heads, rows; states, reads; scores and values
    settings = bench.replace(SMALL, lengths=(96,), virtual_flops_per_s=flops / 0.05)
    case = by_method(measured(settings)[0]["runs"][0]["cases"][0])
    plain, barriers = (case[name]["forward"]["time_s"] for name in bench.PEERS)
    assert case["work alone"]["forward"]["time_s"] > 0.099
    assert plain > 0.199
    assert barriers > 0.299
    assert case[bench.PEERS[1]]["backward"]["time_s"] > 0.398
    assert case["all_gather"]["forward"]["time_s"] < plain
    assert case["chain"]["forward"]["time_s"] < plain


@pytest.mark.usefixtures("_no_network")
def test_real_kernels_say_so():
    settings = bench.replace(SMALL, lengths=(96,), virtual_flops_per_s=None)
    result, said = measured(settings)
    assert "kernels compute for real" in said[0]
    assert all(row["payload_as_formula"] for row in result["runs"][0]["cases"][0]["methods"])


@pytest.mark.root
def test_bytes_on_the_wire_are_those_of_the_formula():
    settings = bench.replace(SMALL, heads=8, head_dim=32, layers=4, lengths=(96,))
    case = by_method(measured(settings)[0]["runs"][0]["cases"][0])
    for name in ("chain", "all_gather", "log_scan", bench.PEERS[0]):
        assert 1.0 < case[name]["wire_over_formula"] < 1.15, name
    assert case["work alone"]["wire_over_formula"] is None


def test_a_rate_that_cannot_be_read():
    with pytest.raises(UnitError, match="'50 apples'"):
        bench.measure(bench.Settings(rates=("50 apples",)), say=print)


def test_played_kernels_sleep_by_their_work_and_the_real_ones_come_back():
    q = torch.randn(1, 2, 64, 8).requires_grad_()
    truth = linear_attention(q, q, q)[0]
    with virtual_linear_attention(2 * 2 * 64 * (2 * 8 * 8 + 64 * 16) / 0.05):  # 50 ms in all
        start_s = time.perf_counter()
        out = linear_attention(q, q, q)[0]
        forward_s = time.perf_counter() - start_s
        out.sum().backward()
        backward_s = time.perf_counter() - start_s - forward_s
    assert forward_s > 0.0499
    assert backward_s > 0.0998
    assert not out.any()
    assert torch.equal(linear_attention(q, q, q)[0], truth)


# ---------------------------------------------------------------------------------------- longest


def rows_of(method: str, settings: longest.Longest, monkeypatch) -> list[dict]:
    monkeypatch.setattr(longest, "METHODS", {method: longest.METHODS[method]})
    found = longest.find_longest(settings, say=lambda _: None)["rows"]
    assert [row["ranks"] for row in found] == list(settings.ranks)
    for row in found:
        assert 0.8 * settings.budget_bytes < row["peak_bytes"] <= settings.budget_bytes
    return found


def test_the_longest_sequence_of_linear_attention_grows_with_the_ranks(monkeypatch):
    settings = longest.Longest(budget_bytes=4 << 20, ranks=(1, 2, 4), heads=4, head_dim=32)
    for row in rows_of("linear attention, chain", settings, monkeypatch):
        assert row["linear"] >= 0.9


@pytest.mark.slow
def test_the_longest_sequence_of_a_ring_grows_where_keys_are_few(monkeypatch):
    """With fewer keys in a turn the scratch of the kernel shrinks, too."""
    settings = longest.Longest(budget_bytes=6 << 20, ranks=(1, 2, 4), groups=1, head_dim=32)
    for row in rows_of("ring attention", settings, monkeypatch):
        assert row["linear"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2, 4), (1, 8)])
def test_the_longest_sequence_of_a_ring_grows_with_as_many_key_heads(ranks, monkeypatch):
    """In the turns that the planner chooses for the budget."""
    settings = longest.Longest(budget_bytes=4 << 20, ranks=ranks, heads=4, groups=4, head_dim=32)
    alone, *rows = rows_of("ring attention", settings, monkeypatch)
    assert alone["turns"] == 1
    for row in rows:
        assert row["linear"] >= 0.9
        assert row["turns"] > 1


@pytest.mark.parametrize("most", [0, 8, 16, 40, 1000])
def test_the_search_finds_the_last_that_fits(most):
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= most

    assert longest._bisect(fits) == most // 8 * 8
    assert len(tried) == len(set(tried)) <= 16


# ------------------------------------------------------------------------------------ the command


@pytest.mark.usefixtures("_no_network")
def test_the_command_prints_tables_and_writes_json(tmp_path):
    sizes = ["--ranks", "2", "--lengths", "64", "--heads", "2", "--head-dim", "8", "--layers", "2"]
    small = ["--budget", "512KiB", "--longest-ranks", "1,2", "--rounds", "1"]
    done = CliRunner().invoke(app, ["bench", "linear", *sizes, *small, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for words in ("work alone", "chain", "LASP's order", "longest sequence", "ring attention"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines()[:8])) <= 100
    result = json.loads((tmp_path / "linear.json").read_text())
    assert result["benchmark"] == "linear"
    assert len(result["longest"]["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--parts", "half"], "there is no part 'half'"), (["--ranks", "x"], "cannot read")],
)
def test_options_that_cannot_be_read(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["bench", "linear", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
