"""`hairpin plan`, `show` and `profile` on a small model."""

import json
import tomllib

import pytest

import hairpin as hp
from hairpin.cli.plan import sp_degree
from hairpin.errors import MeshError

pytestmark = pytest.mark.usefixtures("model")

TABLE = '"rows" = "b t [s] c"\n"columns" = { stream = "b [t] s c" }\n'


def test_the_printed_plan_is_that_of_the_library(run, monkeypatch):
    from hairpin.cli.load import load_object

    model, example, attends = load_object("small:whole")()
    expected = hp.plan(model, example, hp.Mesh(dp=2, sp=3), attends=attends)
    done = run("plan", "small:whole", "--devices", 6, "--dp", 2, "-o", "plan.toml")
    assert done.code == 0
    assert done.out == expected.explain() + "\n"
    assert done.err == "wrote plan.toml\n"
    assert hp.Plan.load("plan.toml") == expected


def test_a_saved_plan_is_shown(run):
    made = run("plan", "small:whole", "--devices", 3, "-o", "plan.toml")
    assert run("show", "plan.toml").out == made.out


@pytest.mark.parametrize(
    "command", [["plan", "small:whole", "--devices", 2], ["show", "plan.toml"]]
)
def test_json_is_the_plan_as_data(run, folder, command):
    run("plan", "small:whole", "--devices", 2, "-o", "plan.toml")
    done = run(*command, "--json")
    assert json.loads(done.out) == tomllib.loads((folder / "plan.toml").read_text())


def test_table_and_example_may_be_named_apart(run, folder):
    (folder / "table.toml").write_text(TABLE)
    whole = run("plan", "small:whole", "--devices", 2).out
    from_file = run(
        *("plan", "small:model", "--devices", 2),
        *("--example", "small:example", "--attends", "table.toml"),
    )
    from_module = run("plan", "small:pair", "--devices", 2, "--attends", "small:ATTENDS")
    assert whole == from_file.out == from_module.out


def test_short_tables_with_the_dims_named(run, folder):
    (folder / "table.toml").write_text('rows = "s"\ncolumns = "t"\n')
    words = ["plan", "small:pair", "--devices", 2, "--attends", "table.toml", "--dims", "b t s c"]
    assert run(*words).out == run("plan", "small:whole", "--devices", 2).out


def test_a_model_that_needs_values_is_built_for_real_with_a_word(run):
    done = run("plan", "small:by_value", "--devices", 2)
    assert done.code == 0
    assert "small:by_value cannot be built without memory" in done.err
    assert done.out == run("plan", "small:whole", "--devices", 2).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small:whole", "--devices", 8, "--dp", 3], "--dp must divide --devices"),
        (["small:whole", "--devices", 0], "--devices 0"),
        (["small:model", "--devices", 2], "name one with --example pkg.mod:example"),
        (["small:pair", "--devices", 2], "give a table with --attends table.toml"),
        (
            ["small:pair", "--devices", 2, "--attends", "no.toml"],
            "cannot read a table from no.toml",
        ),
        (["small:pair", "--devices", 2, "--attends", "bad.toml"], "cannot read a table from bad"),
        (
            ["small:pair", "--devices", 2, "--attends", "odd.toml"],
            "write a pattern, or a table with",
        ),
        (["small:pair", "--devices", 2, "--attends", "small:NUMBER"], "of type int; name a dict"),
        (["small:whole", "--devices", 2, "--memory", "2apples"], "cannot read '2apples'"),
        (
            ["small:whole", "--devices", 2, "--memory", "1KiB"],
            "Model cannot run in 1.00 KiB of activations: the floor is",
        ),
        (["small:whole", "--devices", 2, "-o", "no/plan.toml"], "cannot write the plan to no/plan"),
    ],
)
def test_what_a_user_can_mend_is_said_on_stderr(run, folder, words, message):
    (folder / "bad.toml").write_text("rows = [")
    (folder / "odd.toml").write_text("rows = { strem = 'b t [s] c' }")
    done = run("plan", *words)
    assert done.code == 2
    assert message in done.err.replace("\n", " ")
    assert not done.out


def test_the_degree_that_splits():
    assert sp_degree(8, 1) == 8
    assert sp_degree(8, 4) == 2
    with pytest.raises(MeshError, match="--devices 8 cannot be shared out over --dp 3"):
        sp_degree(8, 3)


def test_profile_prints_the_figures(run):
    figures = json.loads(run("profile", "small:pair", "--json").out)
    assert figures["peak_bytes"] >= 2 * 6 * 10 * 8 * 4
    assert not figures["backward"]
    more = json.loads(run("profile", "small:pair", "--backward", "--json").out)
    assert more["peak_bytes"] > figures["peak_bytes"]
    assert "peak" in run("profile", "small:whole").out


def test_profile_needs_inputs(run):
    done = run("profile", "small:model")
    assert done.code == 2
    assert "returned one Model; let it return (model, inputs)" in done.err
