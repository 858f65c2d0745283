"""`hairpin plan --memory`, `show` and `profile --plan`: loops on one device."""

import json
import re
import sys
import tomllib

import pytest
import torch

import hairpin as hp
from hairpin.cli.load import load_object
from hairpin.cli.plan import Parts, blank, searching, unwritten, without_memory

MODEL = """
import torch
from torch import nn


class Scores(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Scores(width) for _ in range(depth))
        self.embed = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Peeks(Stack):
    def forward(self, tokens):
        return super().forward(tokens) * (2 if bool((tokens > 3).any()) else 1)


def tokens():
    return torch.arange(256).remainder(7)[None]


def stack():
    return Stack(16, 2).eval(), tokens()


def alone():
    return Stack(16, 2).eval()


def peeks():
    return Peeks(16, 2).eval(), tokens()


def huge():
    return Stack(20_000, 2).eval(), torch.zeros(1, 64, dtype=torch.long)
"""
SCORES_BYTES = 256 * 256 * 4  # of one block


@pytest.fixture(autouse=True)
def _model(folder):
    (folder / "long.py").write_text(MODEL)


def test_a_budget_alone_plans_loops_that_the_library_would_plan(run, folder):
    done = run("plan", "long:stack", "--memory", "200KiB", "-o", "plan.toml")
    assert done.code == 0, done.err
    plan = hp.Plan.load("plan.toml")
    assert done.out == plan.explain() + "\n"
    assert run("show", "plan.toml").out == done.out
    model, tokens = load_object("long:stack")()
    assert plan == hp.plan(model, tokens, memory="200KiB")
    assert plan.peak_bytes <= 200 * 2**10 < 2 * SCORES_BYTES <= plan.whole_peak_bytes
    assert {path for loops in plan.loops for path in loops.modules} == {"blocks.0", "blocks.1"}


def test_a_plan_made_without_memory_holds_for_the_real_model(run):
    run("plan", "long:stack", "--memory", "200KiB", "-o", "plan.toml")
    model, tokens = load_object("long:stack")()
    plan = hp.Plan.load("plan.toml")
    with torch.no_grad():
        whole = model(tokens)
        hp.parallelize(model, plan)
        torch.testing.assert_close(model(tokens), whole, rtol=2e-6, atol=2e-6)
    assert hp.profile(model, tokens).peak_bytes == plan.peak_bytes


def test_what_is_done_is_said_on_stderr(run):
    done = run("plan", "long:stack", "--memory", "200KiB", "--json")
    assert {"tracing blocks.0", "searching blocks.0"} <= set(done.err.splitlines())
    data = json.loads(done.out)
    assert data["memory_bytes"] == 200 * 2**10
    assert data["loops"][0]["modules"] == ["blocks.0", "blocks.1"]


def test_a_terminal_shows_a_spinner(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with searching() as progress:
        progress("tracing blocks.0")
    assert "tracing blocks.0\n" not in capsys.readouterr().err.splitlines()


def test_a_budget_below_the_floor_names_the_floor(run):
    done = run("plan", "long:stack", "--memory", "20KiB")
    assert (done.code, done.out) == (2, "")
    found = re.search(r"hairpin: Stack cannot run in 20.00 KiB.*the floor is", done.err, re.DOTALL)
    assert found, done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --devices 8 to split over devices, --memory 2GiB"),
        (["--memory", "2 apples"], "cannot read '2 apples'"),
        (["--memory", "0"], "more than 0 bytes"),
        (["--memory", "1MiB", "--dp", 2], "give their number with --devices"),
        (["--memory", "1MiB", "--picture", "no/a.png"], "there is no folder no"),
    ],
)
def test_what_a_user_can_mend(run, words, message):
    done = run("plan", "long:stack", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err.replace("\n", " ")


def test_an_example_may_be_named_apart(run):
    words = "plan", "long:alone", "--memory", "200KiB"
    assert "returned no example input" in run(*words).err
    assert run(*words, "--example", "long:tokens").out == (
        run("plan", "long:stack", "--memory", "200KiB").out
    )


def test_a_model_that_reads_values_is_built_for_real(run):
    done = run("plan", "long:peeks", "--memory", "200KiB")
    assert done.code == 0, done.err
    assert "long:peeks cannot be built without memory" in done.err


def test_gigabytes_of_parameters_are_never_written(run):
    """9.6 GB of parameters; of the largest resident set only what the search itself needs."""
    resource = pytest.importorskip("resource")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("plan", "long:huge", "--memory", "1GiB").code == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 10**6


def test_shared_parameters_stay_shared():
    with torch.device("meta"):
        made = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        made.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    made[1].weight = made[0].weight
    made[1].weight.requires_grad_(False)
    moved = unwritten(made)
    assert moved[0].weight is moved[1].weight
    assert not moved[0].weight.requires_grad
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"cpu"}


def test_real_tensors_are_kept_and_indices_are_there():
    given = torch.arange(3)
    index, kept = blank((torch.empty(4, dtype=torch.long, device="meta"), given))
    assert index.tolist() == [0] * 4
    assert kept is given


def test_errors_of_ones_own_are_not_taken_for_a_need_of_values():
    def make():
        raise hp.HairpinError("mine")

    with pytest.raises(hp.HairpinError, match="mine"):
        without_memory(make, "m:make", on_cpu=True)
    made = without_memory(
        lambda: Parts(torch.nn.Linear(2, 2), torch.ones(1, 2), None), "m", on_cpu=True
    )
    assert made.model.weight.device.type == "cpu"


def test_pictures(run, folder):
    pytest.importorskip("matplotlib")
    words = "plan", "long:stack", "--memory", "200KiB", "-o", "plan.toml", "--picture", "memory.png"
    assert "wrote memory.png" in run(*words).err
    done = run("profile", "long:stack", "--plan", "plan.toml", "--picture", "step.png")
    assert done.code == 0, done.err
    for name in ("memory.png", "step.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_profile_under_a_plan_says_what_was_certified(run, folder):
    run("plan", "long:stack", "--memory", "200KiB", "-o", "plan.toml")
    certified = tomllib.loads((folder / "plan.toml").read_text())["peak_bytes"]
    data = json.loads(run("profile", "long:stack", "--plan", "plan.toml", "--json").out)
    assert data["peak_bytes"] == data["certified_bytes"] == certified
    assert sum(held["nbytes"] for held in data["at_peak"]) == certified
    assert data["at_peak"][0]["label"] == "blocks.0"
    text = run("profile", "long:stack", "--plan", "plan.toml").out
    assert re.search(r"certified +\d.* by the plan", text)


def test_profile_names_what_is_live_at_the_peak(run):
    done = run("profile", "long:stack")
    assert "certified" not in done.out
    assert re.search(r"live at the peak:\n +256.00 KiB +blocks.0 +\w+ \[1, 256, 256\]", done.out)


def test_a_forward_plan_is_refused_for_a_backward(run):
    run("plan", "long:stack", "--memory", "200KiB", "-o", "plan.toml")
    done = run("profile", "long:stack", "--plan", "plan.toml", "--backward")
    assert done.code == 2
    assert "planned for a forward alone" in done.err
