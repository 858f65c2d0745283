"""The same loss curve on any mesh, over a kill and a resume too; layers and weights shared out.

Every training runs in launched ranks: this process must run no backward, for it forks.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hairpin.comm.mesh import Mesh
from hairpin.comm.topology import Tier, Topology
from hairpin.errors import (
    CheckpointError,
    HairpinError,
    MemoryBudgetError,
    MeshError,
    NumericsError,
    RecipeError,
    SequenceError,
)
from hairpin.models.vit import ViTConfig
from hairpin.planning.sequence.plan import plan_sequence
from hairpin.planning.sequence.work import AttentionShape
from hairpin.run import checkpoint, metrics
from hairpin.run.four_d import stage_blocks
from hairpin.run.launch import RankFailure, launch, user_error, warm
from hairpin.run.recipes import (
    LLMRecipe,
    SequenceRecipe,
    linear_llm_tiny,
    llm_tiny,
    vit_digits,
    vit_photos,
    vit_tiny,
)
from hairpin.run.sequence import (
    Degrees,
    SequenceJob,
    SplitSequences,
    attention_shape,
    degrees_of,
    make_program,
    mesh_of,
    method_of,
    require_possible,
    sequence_plan,
    tell_choice,
)
from hairpin.run.sequence_train import Scores, WholeSequences, train_sequence

ONE = Degrees()


def run_rank(job: SequenceJob, kwargs: dict, hook=None) -> Scores:
    mesh = mesh_of(job)
    program = make_program(job, mesh)
    return train_sequence(job.recipe, mesh, program, job.out_dir, on_step=hook, **kwargs).validation


def run(
    out: Path, recipe: SequenceRecipe, degrees: Degrees = ONE, *, hook=None, options=(), **kwargs
) -> list[float]:
    """Train on new ranks; returns the losses in the metrics file."""
    job = SequenceJob(
        recipe=recipe, out_dir=out, degrees=degrees, last_step=recipe.steps, **dict(options)
    )
    found = launch(run_rank, degrees.ranks, job, kwargs, hook, timeout_s=300)
    assert all(scores == found[0] for scores in found)  # every rank tells the same
    rows = metrics.read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["validation"] == found[0]._asdict()
    return [row["loss"] for row in rows]


def validations(out: Path) -> list[float]:
    rows = metrics.read(out / "metrics.jsonl")
    return [row["validation"]["loss"] for row in rows if row["validation"]]


def error_of(out: Path, recipe: SequenceRecipe, degrees: Degrees = ONE, **kwargs) -> HairpinError:
    with pytest.raises(RankFailure) as info:
        run(out, recipe, degrees, **kwargs)
    return user_error(info.value)


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def double(recipe: SequenceRecipe, **changes) -> SequenceRecipe:
    return replace(recipe, dtype="float64", **changes)


RECIPES = {"llm": llm_tiny(), "linear-llm": linear_llm_tiny(), "vit": vit_tiny()}


@pytest.fixture(scope="module", autouse=True)
def warmed():
    warm("sklearn.datasets")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Of each kind of model: the folder and the losses of 10 steps on one rank in float64."""
    found = {}
    for name, recipe in RECIPES.items():
        out = tmp_path_factory.mktemp(name)
        found[name] = out, run(out, double(recipe), stop_step=10)
    return found


# --------------------------------------------------------------------------------- the same curve


@pytest.mark.parametrize(("name", "dp"), [("llm", 2), ("llm", 3), ("linear-llm", 3), ("vit", 2)])
def test_any_number_of_ranks_gives_the_same_losses(tmp_path, references, name, dp):
    """Of three ranks one takes two of the four rows, and validation has empty shares too."""
    out, losses = references[name]
    ours = run(tmp_path, double(RECIPES[name]), Degrees(dp=dp), stop_step=10)
    assert worst(ours, losses) < 1e-10
    assert worst(validations(tmp_path), validations(out)) < 1e-10


def test_a_rank_without_a_row_takes_part(tmp_path):
    recipe = double(llm_tiny(), batch_size=2)
    ours = run(tmp_path / "three", recipe, Degrees(dp=3), stop_step=2)
    assert worst(ours, run(tmp_path / "one", recipe, stop_step=2)) < 1e-10


@pytest.mark.parametrize("name", RECIPES)
def test_losses_fall(tmp_path, name):
    """Digits are told more slowly than that bytes are not all alike."""
    steps, share = (100, 0.8) if name == "vit" else (30, 0.9)
    losses = run(tmp_path, replace(RECIPES[name], steps=steps, batch_size=16, validate_every=steps))
    assert sum(losses[-5:]) < share * sum(losses[:5])


# ------------------------------------------------------------------------------- kill and resume


def kill_at(step: int):
    def hook(row: metrics.StepMetrics) -> None:
        if row.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, references, name):
    recipe = double(RECIPES[name], checkpoint_every=4)
    with pytest.raises(RankFailure, match="was killed by SIGKILL"):
        run(tmp_path, recipe, hook=kill_at(7), stop_step=10)
    assert checkpoint.read_info(checkpoint.find(tmp_path)).step == 4
    assert run(tmp_path, recipe, resume=tmp_path, stop_step=10) == references[name][1]


def test_a_run_goes_on_with_other_ranks(tmp_path, references):
    recipe = double(llm_tiny())
    run(tmp_path, recipe, Degrees(dp=2), stop_step=5)
    ours = run(tmp_path, recipe, Degrees(dp=3), resume=tmp_path, stop_step=10)
    assert worst(ours, references["llm"][1]) < 1e-10


def test_what_cannot_go_on_is_said(tmp_path):
    run(tmp_path, llm_tiny(), stop_step=2)
    error = error_of(tmp_path, llm_tiny(), resume=tmp_path, stop_step=2)
    assert isinstance(error, CheckpointError)
    assert "has done 2 steps already" in str(error)
    error = error_of(tmp_path, replace(llm_tiny(), length=16), resume=tmp_path)
    assert "length: saved 32, asked for 16" in str(error)


def test_more_memory_than_allowed_is_an_error(tmp_path):
    error = error_of(tmp_path, llm_tiny(), memory="100KiB")
    assert isinstance(error, MemoryBudgetError)
    assert "a batch smaller than 4 examples" in str(error)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    error = error_of(tmp_path, replace(llm_tiny(), lr=1e30, warmup_steps=0, clip_norm=1e30))
    assert isinstance(error, NumericsError)


# ------------------------------------------------------------------------------- sequences split


@pytest.mark.parametrize(
    ("name", "degrees", "method"),
    [
        ("llm", Degrees(sp=3), None),
        ("llm", Degrees(dp=2, sp=2), "ulysses"),
        ("linear-llm", Degrees(sp=3), None),
        ("vit", Degrees(sp=2), None),
    ],
)
def test_sequences_split_over_ranks_give_the_same_losses(
    tmp_path, references, name, degrees, method
):
    out, whole = references[name]
    ours = run(tmp_path, double(RECIPES[name]), degrees, options={"method": method}, stop_step=10)
    assert worst(ours, whole) < 1e-10
    assert worst(validations(tmp_path), validations(out)) < 1e-10


def test_a_run_that_split_its_sequences_goes_on_on_one_rank(tmp_path, references):
    recipe = double(RECIPES["llm"])
    run(tmp_path, recipe, Degrees(sp=2), stop_step=5)
    ours = run(tmp_path, recipe, resume=tmp_path, stop_step=10)
    assert worst(ours, references["llm"][1]) < 1e-10


def told_by_hand(mesh, axis, **_):
    """Links so slow that what is sent decides, but for those that do not hold rank 0."""
    assert axis == "sp"
    slow = mesh.global_rank == 0
    return Topology.flat(2, Tier(0.0, 1e3) if slow else Tier(1.0, 1e12))


def chosen(job: SequenceJob) -> str | None:
    return method_of(make_program(job, mesh_of(job)).split)


@pytest.mark.parametrize(
    ("name", "degrees"), [("llm", Degrees(sp=2)), ("llm", Degrees(dp=2, sp=2))]
)
def test_a_method_that_is_chosen_gives_the_same_losses(
    tmp_path, references, monkeypatch, name, degrees
):
    """Both groups of two ranks take what the first has measured: all have the same plan."""
    monkeypatch.setattr(Topology, "measure", told_by_hand)
    options = {"method": "auto"}
    ours = run(tmp_path, double(RECIPES[name]), degrees, options=options, stop_step=3)
    assert worst(ours, references[name][1][:3]) < 1e-10
    job = SequenceJob(
        recipe=RECIPES[name], out_dir=tmp_path, degrees=degrees, last_step=1, method="auto"
    )
    found = launch(chosen, degrees.ranks, job)
    assert found == ["all gather"] * degrees.ranks


def test_a_method_is_chosen_for_what_a_rank_computes():
    """A slice's heads, a microbatch's rows, the patches of an image and its class token."""

    def shape(recipe, **options):
        degrees = options.pop("degrees", ONE)
        return attention_shape(
            SequenceJob(recipe=recipe, out_dir=Path(), degrees=degrees, last_step=1, **options)
        )

    many = Degrees(dp=2, pp=2, tp=2, sp=2)
    llm = shape(double(llm_tiny(), batch_size=8), degrees=many, microbatches=2)
    assert (llm.length, llm.heads, llm.groups, llm.head_dim) == (32, 2, 1, 8)
    assert (llm.batch, llm.element_bytes, llm.mask.causal) == (2, 8, True)
    vit = shape(vit_tiny())
    assert (vit.length, vit.batch, vit.mask.causal) == (17, vit_tiny().batch_size, False)


def test_what_is_chosen_is_told(tmp_path, capsys):
    mesh = Mesh(dp=1, sp=2)
    shape = AttentionShape(length=32, heads=4, head_dim=8)
    topology = Topology.flat(2, Tier(0.0, 1e6))
    plan = plan_sequence(mesh, method="auto", shape=shape, topology=topology)
    tell_choice(SplitSequences(plan, "auto"), tmp_path)
    told = capsys.readouterr().err
    assert told.startswith(f"method auto: {plan.candidates[0].method}, dealt contiguous; an att")
    assert told.endswith("of 3 ways the least time\n")
    assert (tmp_path / "sequence.txt").read_text() == plan.explain() + "\n"
    tell_choice(WholeSequences(mesh), tmp_path)
    assert "each row is whole on a rank (sp=1), nothing to choose" in capsys.readouterr().err


def test_too_little_memory_for_any_method_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Topology, "measure", told_by_hand)
    options = {"method": "auto", "memory": "1KiB"}
    error = error_of(tmp_path, llm_tiny(), Degrees(sp=2), options=options)
    assert isinstance(error, MemoryBudgetError)
    assert "no method holds one attention layer in 1KiB" in str(error)


def test_a_model_with_linear_attention_has_nothing_to_choose(tmp_path):
    options = {"method": "auto"}
    error = error_of(tmp_path, linear_llm_tiny(), Degrees(sp=2), options=options)
    assert isinstance(error, SequenceError)
    assert "leave --method out" in str(error)


@pytest.mark.parametrize(
    ("make", "method", "words"),
    [
        (llm_tiny, "linear", "use 'ring'"),
        (linear_llm_tiny, "ring", "leave --method out"),
        (llm_tiny, "spiral", "write one of"),
    ],
)
def test_methods_that_do_not_fit_are_refused(make, method, words):
    with pytest.raises(SequenceError, match=words):
        sequence_plan(make(), Mesh(dp=1, sp=2), method=method)


# ------------------------------------------------------------------- layers and weights shared out

WIDE = double(llm_tiny(), batch_size=8)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Eight rows a step on one rank: folder and losses of 10 steps."""
    out = tmp_path_factory.mktemp("wide")
    return out, run(out, WIDE, stop_step=10)


def check_four_d(out: Path, wide, degrees: Degrees, **options) -> None:
    ours = run(out, WIDE, degrees, options=options, stop_step=10)
    assert worst(ours, wide[1]) < 1e-10
    assert worst(validations(out), validations(wide[0])) < 1e-10
    peaks = [metrics.read(o / "metrics.jsonl")[0]["peak_memory_bytes"] for o in (out, wide[0])]
    if options.get("data_parallel") != "ddp":  # no rank holds the whole model
        assert max(peaks[0]) < 0.9 * peaks[1][0]
    norms = [[r["grad_norm"] for r in metrics.read(o / "metrics.jsonl")] for o in (out, wide[0])]
    assert worst(*norms) < 1e-10


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(tp=2), {}),
        (Degrees(pp=2), {"microbatches": 4}),
        (Degrees(dp=2), {"data_parallel": "fsdp"}),
        (Degrees(dp=2), {"data_parallel": "ddp"}),
    ],
)
def test_stages_and_slices_give_the_losses_of_one_process(tmp_path, wide, degrees, options):
    check_four_d(tmp_path, wide, degrees, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(dp=2, tp=2), {}),
        (Degrees(dp=2, pp=2), {"microbatches": 2, "data_parallel": "ddp"}),
        (Degrees(dp=2, pp=2), {"microbatches": 4}),
        (Degrees(tp=2, pp=2), {"microbatches": 2}),
        (Degrees(dp=2, tp=2, pp=2), {"microbatches": 2}),
        (Degrees(tp=2, sp=2), {"method": "ulysses"}),
        (Degrees(pp=2, sp=2), {"microbatches": 2}),
        (Degrees(dp=2, sp=2), {"data_parallel": "fsdp"}),
    ],
)
def test_everything_at_once_gives_the_losses_of_one_process(tmp_path, wide, degrees, options):
    check_four_d(tmp_path, wide, degrees, **options)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_dimensions_on_sixteen_ranks(tmp_path, wide):
    check_four_d(tmp_path, wide, Degrees(dp=2, sp=2, tp=2, pp=2), microbatches=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_other_degrees(tmp_path, wide):
    cut = {"microbatches": 2}
    run(tmp_path, WIDE, Degrees(dp=2, tp=2), stop_step=3)
    run(tmp_path, WIDE, Degrees(tp=2, pp=2), options=cut, resume=tmp_path, stop_step=5)
    run(tmp_path, WIDE, resume=tmp_path, stop_step=7)
    ours = run(tmp_path, WIDE, Degrees(pp=2), options=cut, resume=tmp_path, stop_step=10)
    assert worst(ours, wide[1]) < 1e-10


def test_layers_are_shared_out_evenly():
    assert [list(stage_blocks(5, i, 3)) for i in range(3)] == [[0, 1], [2, 3], [4]]
    assert [list(stage_blocks(2, i, 2)) for i in range(2)] == [[0], [1]]


# ----------------------------------------------------------------------------------- what is wrong


def test_degrees_take_the_ranks_there_are():
    assert degrees_of(8, dp=2, sp=None) == Degrees(dp=2, sp=4)
    assert degrees_of(8, dp=2, sp=None, tp=2, pp=2) == Degrees(2, 1, 2, 2)
    assert degrees_of(4, dp=2, sp=2).ranks == 4
    with pytest.raises(MeshError, match="got 8 ranks and dp=3"):
        degrees_of(8, dp=3, sp=None)
    with pytest.raises(MeshError, match="got 8 ranks and dp=2 sp=2, which need 4"):
        degrees_of(8, dp=2, sp=2)


@pytest.mark.parametrize(
    ("degrees", "microbatches", "way", "message"),
    [
        (Degrees(tp=4), 1, "fsdp", "tp=4 does not divide kv_heads=2 of the model"),
        (Degrees(pp=3), 3, "fsdp", "pp=3 stages need a layer each and the model has 2"),
        (Degrees(pp=2), 1, "fsdp", "microbatches=1 leave stages of pp=2 idle"),
        (Degrees(dp=3, tp=2), 1, "fsdp", "a batch of 4 rows is not shared evenly by dp=3"),
        (Degrees(dp=2, tp=2), 1, "ddp", "DDP does not take the sliced weights of tp=2"),
        (Degrees(dp=2), 1, "zero", "there is no data parallelism 'zero'"),
    ],
)
def test_degrees_that_cannot_work_are_refused(degrees, microbatches, way, message):
    with pytest.raises(MeshError, match=message):
        require_possible(llm_tiny(), degrees, microbatches=microbatches, data_parallel=way)


def test_only_the_llm_is_shared_out():
    for recipe in (linear_llm_tiny(), vit_tiny()):
        with pytest.raises(MeshError, match="only hairpin train llm shares out layers"):
            require_possible(recipe, Degrees(tp=2), microbatches=1, data_parallel="fsdp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(llm_tiny(), length=0), "length=0 must be at least 1"),
        (lambda: replace(llm_tiny(), validate_every=0), "validate_every=0 must be at least 1"),
        (lambda: replace(linear_llm_tiny(), dtype="int8"), "dtype='int8' is not supported"),
        (lambda: replace(vit_digits(), model=vit_photos().model), "have 1 colours and 10 classes"),
        (
            lambda: replace(vit_tiny(), model=ViTConfig(patch=(1, 2, 2), size=(1, 8, 8))),
            "is for films",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_recipe_is_a_value():
    assert isinstance(llm_tiny(), LLMRecipe)
    assert llm_tiny() == llm_tiny()
    assert vit_photos().data.size == 75
