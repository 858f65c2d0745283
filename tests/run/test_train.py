"""The same loss curve on any mesh, over a kill and a resume too; errors before steps are spent.

Every training runs in launched ranks: this process must run no backward, for it forks.
"""

import json
import os
import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hairpin.comm.mesh import init_mesh
from hairpin.errors import (
    CheckpointError,
    HairpinError,
    MemoryBudgetError,
    NumericsError,
    OutputError,
)
from hairpin.run import checkpoint, metrics
from hairpin.run.launch import RankFailure, launch, user_error, warm
from hairpin.run.recipes import VideoRecipe, tiny
from hairpin.run.train import train
from marks import slow

Degrees = tuple[int, int]  # dp, sp


def run_rank(recipe: VideoRecipe, out: Path, degrees: Degrees, kwargs: dict, hook=None) -> int:
    mesh = init_mesh(dp=degrees[0], sp=degrees[1], timeout_s=60)
    return train(recipe, mesh, out, on_step=hook, **kwargs).step


def run(out: Path, degrees: Degrees = (1, 1), *, recipe=None, hook=None, **kwargs) -> list[float]:
    """Train on new ranks; returns the losses in the metrics file."""
    recipe = recipe or tiny()
    launch(run_rank, degrees[0] * degrees[1], recipe, out, degrees, kwargs, hook, timeout_s=110)
    return losses(out)


def losses(out: Path) -> list[float]:
    rows = metrics.read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def error_of(out: Path, degrees: Degrees = (1, 1), **kwargs) -> HairpinError:
    with pytest.raises(RankFailure) as info:
        run(out, degrees, **kwargs)
    return user_error(info.value)


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module", autouse=True)
def warmed():
    warm("sklearn.datasets")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One rank, float64, 12 steps."""
    out = tmp_path_factory.mktemp("reference")
    return run(out, recipe=replace(tiny(), dtype="float64"), stop_step=12)


# --------------------------------------------------------------------------------- the same curve


@pytest.mark.parametrize("degrees", [slow((1, 2)), slow((1, 3)), (2, 1), slow((3, 1)), (2, 2)])
def test_any_mesh_gives_the_same_losses(tmp_path, reference, degrees):
    """Of three dp ranks one takes two clips; 8 frames over 3 ranks are uneven too."""
    ours = run(tmp_path, degrees, recipe=replace(tiny(), dtype="float64"), stop_step=12)
    assert worst(ours, reference) < 1e-10


def test_float32_agrees_to_one_in_ten_thousand(tmp_path, reference):
    assert worst(run(tmp_path, (1, 2), stop_step=12), reference) < 1e-4


def test_a_rank_without_a_clip_takes_part(tmp_path):
    recipe = replace(tiny(), batch_size=2, dtype="float64")
    ours = run(tmp_path / "three", (3, 1), recipe=recipe, stop_step=4)
    theirs = run(tmp_path / "one", recipe=recipe, stop_step=4)
    assert worst(ours, theirs) < 1e-10


def test_one_clip_can_be_split(tmp_path):
    recipe = replace(tiny(), batch_size=1, dtype="float64")
    ours = run(tmp_path / "two", (1, 2), recipe=recipe, stop_step=2)
    assert worst(ours, run(tmp_path / "one", recipe=recipe, stop_step=2)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_fifty_steps_agree_on_one_two_and_three_ranks(tmp_path, dtype, tolerance):
    recipe = replace(tiny(), dtype=dtype, steps=50)
    curves = [run(tmp_path / str(n), (1, n), recipe=recipe) for n in (1, 2, 3)]
    assert len(curves[0]) == 50
    assert max(worst(curve, curves[0]) for curve in curves[1:]) < tolerance
    assert sum(curves[0][-10:]) < 0.9 * sum(curves[0][:10])


# ------------------------------------------------------------------------------- kill and resume


def kill_at(step: int):
    def hook(row: metrics.StepMetrics) -> None:
        if row.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


@pytest.mark.parametrize(("before", "after"), [((1, 2), (3, 1)), slow((1, 3), (1, 1))])
def test_a_killed_run_goes_on_with_other_ranks_on_the_same_curve(
    tmp_path, reference, before, after
):
    recipe = replace(tiny(), dtype="float64", checkpoint_every=2)
    step = random.randrange(3, 12)
    with pytest.raises(RankFailure, match="was killed by SIGKILL"):
        run(tmp_path, before, recipe=recipe, hook=kill_at(step), stop_step=12)
    assert checkpoint.read_info(checkpoint.find(tmp_path)).step == (step - 1) // 2 * 2
    ours = run(tmp_path, after, recipe=recipe, resume=tmp_path, stop_step=12)
    assert worst(ours, reference) < 1e-10, f"killed at step {step}"


def test_a_slim_copy_goes_on_elsewhere_with_its_history(tmp_path):
    run(tmp_path / "first", stop_step=5)
    slim = checkpoint.export(checkpoint.find(tmp_path / "first"), tmp_path / "slim")
    assert len(run(tmp_path / "second", resume=slim, stop_step=7)) == 7


def test_a_finished_run_can_be_prolonged(tmp_path):
    recipe = replace(tiny(), steps=4)
    assert len(run(tmp_path, recipe=recipe)) == 4
    assert len(run(tmp_path, recipe=recipe, resume=tmp_path, stop_step=6)) == 6


def test_nothing_to_do_is_an_error(tmp_path):
    run(tmp_path, stop_step=2)
    error = error_of(tmp_path, resume=tmp_path, stop_step=2)
    assert isinstance(error, CheckpointError)
    assert "has done 2 steps already" in str(error)


# ------------------------------------------------------------------------------------- what is told


def test_a_row_tells_bytes_and_memory_of_each_rank(tmp_path):
    run(tmp_path, (1, 2), stop_step=2)
    row = metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert len(row["bytes_sent"]) == len(row["peak_memory_bytes"]) == 2
    assert all(count > 1000 for count in row["bytes_sent"] + row["peak_memory_bytes"])
    assert row["lr"] == pytest.approx(tiny().learning_rate(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_split_run_needs_less_memory_and_a_single_one_sends_nothing(tmp_path):
    recipe = replace(tiny(), batch_size=16)
    run(tmp_path / "one", recipe=recipe, stop_step=1)
    run(tmp_path / "two", (1, 2), recipe=recipe, stop_step=1)
    one = metrics.read(tmp_path / "one" / "metrics.jsonl")[0]
    two = metrics.read(tmp_path / "two" / "metrics.jsonl")[0]
    assert one["bytes_sent"] == [0]
    assert max(two["peak_memory_bytes"]) < 0.8 * one["peak_memory_bytes"][0]


# ------------------------------------------------------------------------------------------ errors


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    recipe = replace(tiny(), checkpoint_every=1, lr=1e30)
    error = error_of(tmp_path, recipe=recipe)
    assert isinstance(error, NumericsError)
    assert "at step 2; this step was not taken" in str(error)
    assert checkpoint.read_info(checkpoint.find(tmp_path)).step == 1


def test_a_budget_that_is_too_small_stops_before_the_first_update(tmp_path):
    error = error_of(tmp_path, (1, 2), memory="100KiB")
    assert isinstance(error, MemoryBudgetError)
    assert "more than the 100.00 KiB that --memory allows; use more ranks than 2" in str(error)
    assert losses(tmp_path) == []


def other_recipe_on_rank_1(out: Path) -> None:
    mesh = init_mesh(dp=2, sp=1, timeout_s=60)
    train(replace(tiny(), seed=mesh.global_rank), mesh, out)


def test_ranks_that_are_given_different_recipes_all_refuse(tmp_path):
    with pytest.raises(RankFailure, match=r"DisagreementError(.|\n)*also:\n  rank . failed: Disag"):
        launch(other_recipe_on_rank_1, 2, tmp_path, timeout_s=60)


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    error = error_of(tmp_path / "file" / "out")
    assert isinstance(error, OutputError)
    assert "cannot write to" in str(error)


def test_a_setting_that_differs_from_the_checkpoint_is_named(tmp_path):
    run(tmp_path, stop_step=1)
    error = error_of(tmp_path, resume=tmp_path, recipe=replace(tiny(), seed=5))
    assert isinstance(error, CheckpointError)
    assert "seed: saved 0, asked for 5" in str(error)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    run(tmp_path, stop_step=1)
    wider = replace(tiny(), model=replace(tiny().model, channels=32))
    error = error_of(tmp_path, resume=tmp_path, recipe=wider)
    assert isinstance(error, CheckpointError)
    assert "belongs to another model than this VideoDiT: it has of another shape" in str(error)


# -------------------------------------------------------------------------------------------- leaks


def record_use(folder: Path):
    def hook(row: metrics.StepMetrics) -> None:
        if row.step in (200, 1000):
            files = len(list(Path("/proc/self/fd").iterdir()))
            memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (folder / f"use-{row.step}").write_text(f"{files} {memory_kib}")

    return hook


@pytest.mark.slow
def test_a_thousand_steps_leave_memory_and_open_files_flat(tmp_path):
    recipe = replace(tiny(), steps=1000, checkpoint_every=100, batch_size=2)
    run(tmp_path, (1, 2), recipe=recipe, hook=record_use(tmp_path))
    (files_0, kib_0), (files_1, kib_1) = (
        map(int, (tmp_path / f"use-{step}").read_text().split()) for step in (200, 1000)
    )
    assert files_1 <= files_0
    assert kib_1 - kib_0 < 8 * 1024
