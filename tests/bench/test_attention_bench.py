"""The attention benchmark: its result holds what it promises; played kernels; peers as they are."""

import json
import time

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from hairpin.bench import attention as bench
from hairpin.bench import attention_peers
from hairpin.bench.attention_peers import PEERS
from hairpin.bench.virtual import virtual_attention
from hairpin.cli.app import app
from hairpin.errors import UnitError

SMALL = bench.Settings(
    ranks=2,
    rates=("200mbit",),
    length=64,
    heads=4,
    groups=(2,),
    head_dim=8,
    rounds=1,
    virtual_flops_per_s=1e9,
)


def measured(settings: bench.Settings) -> tuple[dict, list[str]]:
    """The result, as it comes back from JSON, and what was said."""
    said: list[str] = []
    return json.loads(json.dumps(bench.measure(settings, say=said.append))), said


def check_case(case: dict) -> None:
    methods = {row["method"] for row in case["methods"]}
    assert {"ulysses, contiguous", "ring, contiguous", "all gather, contiguous"} <= methods
    for row in case["methods"]:
        assert row["payload_as_predicted"] == {"forward": True, "backward": True}, row["method"]
        assert row["time_s"] > 0 < row["predicted_s"]
    assert case["pick"]["method"] in methods
    assert case["pick"]["over_best"] >= 1
    assert {row["peer"] for row in case["peers"]} | set(case["absent"]) == set(PEERS)


@pytest.mark.slow
@pytest.mark.root
def test_on_two_tiers():
    settings = bench.Settings(
        ranks=4, hosts=2, rates=("200mbit",), length=512, heads=8, groups=(8,), head_dim=32,
        masks=("causal",), schedules=("ring", "hierarchical"), rounds=1, peers=(),
    )  # fmt: skip
    result, _ = measured(settings)
    (run,) = result["runs"]
    assert run["topology"]["host_of"] == [0, 0, 1, 1]
    (case,) = run["cases"]
    ways = {(row["schedule"], row["heads_inside"], row["order"]) for row in case["methods"]}
    assert {("hierarchical", True, "zigzag"), ("ring", False, "zigzag")} <= ways
    for row in case["methods"]:
        for part, ratio in row["wire_over_formula"].items():
            assert 1.0 < ratio < 1.15, (row["method"], part)  # small messages: many headers
    assert 1.0 < result["accuracy"]["worst_wire_over_formula"] < 1.15
    assert set(run["overlap"]["forward"]) >= {"serial_over_ring", "hidden"}


@pytest.mark.usefixtures("_no_network")
def test_over_the_loopback():
    result, said = measured(SMALL)
    assert "kernels sleep as a device of 1 GFLOP/s" in said[0]
    assert "rates are NOT limited" in said[1]
    (run,) = result["runs"]
    assert [(c["groups"], c["mask"]) for c in run["cases"]] == [(2, "full"), (2, "causal")]
    for case in run["cases"]:
        check_case(case)
        torch_ring = next(r for r in case["peers"] if r["peer"] == "torch ring, all-gather")
        assert torch_ring["error"] < 1e-5
    assert result["accuracy"]["payload_exact"]


@pytest.mark.usefixtures("_no_network")
def test_a_peer_that_cannot_run_is_a_row(monkeypatch):
    monkeypatch.setattr(attention_peers.importlib.util, "find_spec", lambda name: None)
    result, _ = measured(bench.replace(SMALL, groups=(4,), masks=("full",)))
    absent = result["runs"][0]["cases"][0]["absent"]
    assert "pip install --no-deps yunchang" in absent["yunchang ulysses"]
    assert "pip install --no-deps ring-flash-attn" in absent["ring-flash-attention"]


@pytest.mark.usefixtures("_no_network")
def test_real_kernels_say_so():
    settings = bench.replace(
        SMALL, virtual_flops_per_s=None, groups=(4,), masks=("full",), peers=()
    )
    result, said = measured(settings)
    assert "kernels compute for real" in said[0]
    assert result["accuracy"]["payload_exact"]


def test_a_rate_that_cannot_be_read():
    with pytest.raises(UnitError, match="'50 apples'"):
        bench.measure(bench.Settings(rates=("50 apples",)), say=print)


def test_a_played_kernel_sleeps_by_its_work_and_the_real_one_comes_back():
    q = torch.randn(1, 2, 64, 8).requires_grad_()
    truth = F.scaled_dot_product_attention(q, q, q)
    flops = 4 * 2 * 64 * 64 * 8
    for causal, least in ((False, 1.0), (True, 0.5)):
        with virtual_attention(flops / 0.05):  # 50 ms for the whole square
            start_s = time.perf_counter()
            out = F.scaled_dot_product_attention(q, q, q, is_causal=causal)
            forward_s = time.perf_counter() - start_s
            out.sum().backward()
            backward_s = time.perf_counter() - start_s - forward_s
        assert forward_s > 0.05 * least
        assert backward_s > 2.5 * 0.05 * least
        assert not out.any()
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), truth)


def test_what_is_hidden_by_hand():
    """Four steps of 1 s; a hop of 1 s. Serial: 7 s. Three hops can hide, so 4 s is the best."""
    assert bench.hidden_part(4.0, 7.0, 4.0, 4, backward=False) == 1.0
    assert bench.hidden_part(7.0, 7.0, 4.0, 4, backward=False) == 0.0
    assert bench.hidden_part(5.5, 7.0, 4.0, 4, backward=False) == 0.5
    # slow links: of hops of 2 s just what is beside work can hide, 3 s of 6
    assert bench.hidden_part(7.0, 10.0, 4.0, 4, backward=False) == 1.0
    # backward: keys beside steps 0, 1, 2, gradients beside 2 and 3, the last one beside nothing;
    # hops of 1 s and steps of 2 s: all but the last of six hide
    assert bench.hidden_part(9.0, 14.0, 8.0, 4, backward=True) == 1.0


@pytest.mark.usefixtures("_no_network")
def test_the_command_prints_tables_and_writes_json(tmp_path):
    sizes = ["--ranks", "2", "--length", "64", "--heads", "2", "--groups", "2", "--head-dim", "8"]
    arguments = ["bench", "attention", *sizes, "--masks", "causal", "--rounds", "1"]
    done = CliRunner().invoke(
        app, [*arguments, "--peers", "torch ring, all-gather", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    for words in ("ulysses", "ring, zigzag", "torch ring", "picked:", "to the byte"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines()[:8])) <= 100
    assert json.loads((tmp_path / "attention.json").read_text())["benchmark"] == "attention"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "half"], "there is no part 'half'"),
        (["--peers", "nobody"], "there is no peer 'nobody'"),
        (["--groups", "x"], "cannot read"),
    ],
)
def test_options_that_cannot_be_read(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["bench", "attention", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
