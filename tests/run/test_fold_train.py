"""Training a folding model: it learns, and a run that stops and goes on ends with the same bits.

Every training runs in a process of its own: this process must run no backward, for it forks.
"""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hairpin.errors import (
    CheckpointError,
    DisagreementError,
    FoldInputError,
    HairpinError,
    MeshError,
    RecipeError,
)
from hairpin.models.alphafold import presets
from hairpin.proteins.loader import find_proteins
from hairpin.run import checkpoint, metrics
from hairpin.run.fold_train import FoldJob, _FoldRun, ca_scores, train_fold
from hairpin.run.launch import RankFailure, launch, user_error
from hairpin.run.recipes import FoldRecipe, fold_tiny
from proteins.tiny import mmcif, names_of

pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
SEQUENCES = {"1abc": "ACDEFGHIKLMNPQ", "2abc": "GGDEFGHIKLMN"}


def helix(sequence: str) -> str:
    """mmCIF text of an alpha helix: 2.3 Angstrom from its axis, 100 degrees and 1.5 a residue."""
    at = {"N": (1.5, -0.5, -0.9), "CA": (2.3, 0.0, 0.0), "C": (1.6, 0.6, 1.1), "O": (1.9, 1.7, 1.3)}
    atoms = []
    for i, name in enumerate(names_of(sequence)):
        turn = np.deg2rad(100 * i)
        for atom, (radius, ahead, z) in at.items():
            angle = turn + ahead / radius
            x, y = radius * np.cos(angle), radius * np.sin(angle)
            row = (name, i + 1, atom, ".", 1.0, round(x, 3), round(y, 3), round(z + 1.5 * i, 3))
            atoms.append(row)
    return mmcif({"A": (names_of(sequence), atoms)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("proteins")
    for name, sequence in SEQUENCES.items():
        (home / name).mkdir()
        (home / name / f"{name}.cif").write_text(helix(sequence))
        rows = f">t\n{sequence}\n>o\n{sequence[::-1]}\n>g\n{'-' * len(sequence)}\n"
        (home / name / "a.a3m").write_text(rows)
    return home


def restless() -> FoldRecipe:
    """Everything that is drawn at random: crops, masks, recycles, clamping, dropout.

    The last step takes whole proteins, after the step that a run is killed at.
    """
    model = presets.tiny()
    data = replace(model.data, max_msa_clusters=4, max_extra_msa=4, crop_size=8)
    return replace(
        fold_tiny(),
        model=replace(model, data=data),
        clamped=0.5,
        whole_from=3,
        steps=4,
        batch_size=2,
        checkpoint_every=2,
        validate_every=2,
    )


def job_of(
    folder: Path, out: Path, *, last_step: int, recipe: FoldRecipe | None = None, **settings
) -> FoldJob:
    return FoldJob(
        recipe=recipe or restless(),
        proteins=find_proteins(folder),
        out_dir=out,
        last_step=last_step,
        workers=settings.pop("workers", 0),
        **settings,
    )


def run(job: FoldJob, hook=None) -> None:
    launch(train_fold, job.dp * job.dap, job, on_step=hook, timeout_s=300)


def tensors(path: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint.find(path), scratch / "all.pt")
    found: dict[str, torch.Tensor] = {}

    def add(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for name, inner in value.items():
                add(f"{prefix}.{name}", inner)

    add("", torch.load(scratch / "all.pt", weights_only=True))
    return found


def rows_of(path: Path) -> list[dict]:
    """What does not depend on the clock."""
    clock = {"time_s", "samples_per_s", "data_wait_s", "peak_memory_bytes"}
    return [
        {name: value for name, value in row.items() if name not in clock}
        for row in metrics.read(path / "metrics.jsonl")
    ]


def kill_at(step: int):
    def hook(row: metrics.StepMetrics) -> None:
        if row.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_the_loss_falls_and_validation_improves(folder, tmp_path):
    recipe = replace(fold_tiny(), steps=40, validate_every=20, warmup_steps=5)
    run(job_of(folder, tmp_path, last_step=40, recipe=recipe))
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert np.mean([row["fape"] for row in rows[-4:]]) < 0.7 * rows[0]["fape"]
    first, last = (row["validation"] for row in rows if row["validation"])
    assert set(last) == set(SEQUENCES)
    for name in SEQUENCES:
        assert 0 <= last[name]["lddt_ca"] <= 1
        assert last[name]["ca_rmsd"] < first[name]["ca_rmsd"]


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(folder, tmp_path):
    job = job_of(folder, tmp_path / "one", last_step=4)
    run(job)
    broken = replace(job, out_dir=tmp_path / "two")
    with pytest.raises(RankFailure, match="was killed by SIGKILL"):
        run(broken, kill_at(3))
    assert checkpoint.read_info(checkpoint.find(tmp_path / "two")).step == 2
    run(replace(broken, resume=tmp_path / "two"))
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    one, two = (tensors(tmp_path / name, tmp_path) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(name.startswith(".ema") for name in one)
    assert any("exp_avg_sq" in name for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_crops_end_where_the_recipe_says_so_and_a_resume_agrees(folder):
    data = _FoldRun(restless(), find_proteins(folder))

    def lengths(first_step: int) -> list[int]:
        return [len(e.batches[0]["aatype"]) for e in data.examples(first_step, 4, workers=0)]

    assert lengths(0)[:6] == [8] * 6
    assert sorted(lengths(0)[6:]) == sorted(len(sequence) for sequence in SEQUENCES.values())
    assert lengths(2) == lengths(0)[4:]
    assert lengths(3) == lengths(0)[6:]


def error_of(job: FoldJob) -> HairpinError:
    with pytest.raises(RankFailure) as info:
        run(job)
    return user_error(info.value)


def test_what_cannot_be_trained_on_is_said_before_the_first_step(folder, tmp_path):
    (tmp_path / "p/1abc").mkdir(parents=True)
    (tmp_path / "p/1abc/1abc.cif").write_text(helix("WWWWWWWWWWWW"))
    (tmp_path / "p/1abc/a.a3m").write_text(">t\nACDEFGHIKLMNPQ\n")
    error = error_of(job_of(tmp_path / "p", tmp_path, last_step=1))
    assert isinstance(error, FoldInputError)
    assert "1abc.cif: chain A has another sequence" in str(error)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_other_settings_is_refused(folder, tmp_path):
    job = job_of(folder, tmp_path, last_step=1)
    run(job)
    other = replace(job.recipe, clamped=0.9, validate_every=1)
    error = error_of(replace(job, recipe=other, resume=tmp_path, last_step=2))
    assert isinstance(error, CheckpointError)
    assert "clamped: saved 0.5, asked for 0.9" in str(error)
    assert "validate_every" not in str(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clamped": 1.5}, "clamped=1.5 is a part of the examples; give 0 to 1"),
        ({"model": presets.tiny(multimer=True)}, "is for complexes, which are not trained yet"),
        ({"validate_every": 0}, "validate_every=0 must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        replace(fold_tiny(), **settings)


# ------------------------------------------------------------------------------ over several ranks


LAYOUTS = {"sharing": (2, 1), "splitting": (1, 2), "both": (2, 2), "four": (1, 4)}


def curve(path: Path) -> np.ndarray:
    """Loss, backbone error, distogram loss and gradient norm of every step."""
    names = ("loss", "fape", "distogram", "grad_norm")
    return np.array([[row[name] for name in names] for row in metrics.read(path / "metrics.jsonl")])


def exact() -> FoldRecipe:
    """Restless, in double precision; its third step takes whole proteins."""
    return replace(
        restless(), dtype="float64", steps=3, whole_from=2, checkpoint_every=1, validate_every=3
    )


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    """The exact recipe on one rank."""
    out = tmp_path_factory.mktemp("alone")
    run(job_of(folder, out, last_step=3, recipe=exact()))
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "way"),
    [
        ("both", ("channels", "gather")),
        ("sharing", ("gather", "gather")),
        ("splitting", ("ring", "ring")),
        ("four", ("gather", "ring")),
    ],
)
def test_losses_do_not_depend_on_the_layout(folder, tmp_path, alone, layout, way):
    """With crops, masks, recycles, clamping and dropout, and proteins of other lengths at once."""
    dp, dap = LAYOUTS[layout]
    job = job_of(
        folder, tmp_path, last_step=3, recipe=exact(), dp=dp, dap=dap,
        product=way[0], passing=way[1],
    )  # fmt: skip
    run(job)
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=1e-10)
    ours, theirs = metrics.read(tmp_path / "metrics.jsonl"), metrics.read(alone / "metrics.jsonl")
    assert [row["proteins"] for row in ours] == [row["proteins"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert len(row["bytes_sent"]) == len(row["peak_memory_bytes"]) == dp * dap
        assert (row["validation"] is None) == (other["validation"] is None)
        for name in row["validation"] or ():
            assert row["validation"][name] == pytest.approx(other["validation"][name], abs=1e-6)
    assert all(sent > 0 for sent in ours[0]["bytes_sent"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_twenty_steps_of_the_tiny_recipe_are_the_same_on_every_layout(
    folder, tmp_path, dtype, tolerance
):
    recipe = replace(fold_tiny(), dtype=dtype, steps=20, batch_size=2, checkpoint_every=20)
    for dp, dap in ((1, 1), *LAYOUTS.values()):
        out = tmp_path / f"{dp}-{dap}"
        run(job_of(folder, out, last_step=20, recipe=recipe, dp=dp, dap=dap))
    losses = {path.name: curve(path)[:, 0] for path in tmp_path.iterdir()}
    assert all(len(found) == 20 for found in losses.values())
    for name, found in losses.items():
        assert found == pytest.approx(losses["1-1"], abs=tolerance), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_on_another_layout(folder, tmp_path, alone):
    job = job_of(folder, tmp_path, last_step=3, recipe=exact(), dap=2, workers=1)
    with pytest.raises(RankFailure, match="rank 0 of 2 was killed by SIGKILL"):
        run(job, kill_at(2))
    assert checkpoint.read_info(checkpoint.find(tmp_path)).step == 1
    run(replace(job, resume=tmp_path, dp=2, dap=1))
    assert metrics.read(tmp_path / "metrics.jsonl")[-1]["bytes_sent"][1] > 0
    assert curve(tmp_path) == pytest.approx(curve(alone), abs=1e-10)
    one, two = (tensors(path, tmp_path) for path in (alone, tmp_path))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-9), name


def train_or_die(job: FoldJob) -> None:
    """As `train_fold`; the last rank is killed when it is about to begin its second step."""
    if int(os.environ["RANK"]) == job.dp * job.dap - 1:
        before = _FoldRun.step

        def step(self, number, examples):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, number, examples)

        _FoldRun.step = step
    train_fold(job)


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_the_others(folder, tmp_path):
    """Its workers, which inherit its connections, do not keep them open."""
    job = job_of(folder, tmp_path, last_step=1000, dap=2, workers=1)
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 was killed by SIGKILL") as info:
        launch(train_or_die, 2, job, timeout_s=200)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]
    assert "rank 0 failed: CommError" in str(info.value)
    last_sign_s = (tmp_path / "metrics.jsonl").stat().st_mtime - time.time() + time.monotonic()
    assert time.monotonic() - max(began, last_sign_s) < 10


def train_on_other_files(job: FoldJob, other: Path) -> None:
    """As `train_fold`; the last rank reads other files of the same names."""
    if int(os.environ["RANK"]) == job.dp * job.dap - 1:
        job = replace(job, proteins=find_proteins(other))
    train_fold(job)


def test_a_rank_with_another_alignment_is_found_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").glob("*/a.a3m"):
        path.write_text(path.read_text() + f">new\n{'G' * len(SEQUENCES[path.parent.name])}\n")
    job = job_of(folder, tmp_path / "out", last_step=2, dap=2)
    with pytest.raises(RankFailure) as info:
        launch(train_on_other_files, 2, job, tmp_path / "other", timeout_s=100)
    error = user_error(info.value)
    assert isinstance(error, DisagreementError)
    assert "the ranks of mesh axis 'sp' were given different work" in str(error)
    assert "msa_feat" in str(error)


def test_more_groups_than_proteins_of_a_step_are_refused(folder, tmp_path):
    job = job_of(folder, tmp_path, last_step=1, recipe=replace(restless(), batch_size=1), dp=2)
    with pytest.raises(RankFailure) as info:
        run(job)
    error = user_error(info.value)
    assert isinstance(error, MeshError)
    assert "a step takes 1 protein, too few to share out over dp=2" in str(error)
    assert "--batch-size 2 or more, or a larger --dap" in str(error)


# ------------------------------------------------------------------------------------------ scores


def test_scores_do_not_depend_on_the_pose_and_leave_out_what_was_not_seen():
    true = torch.randn(9, 37, 3, generator=torch.Generator().manual_seed(0)) * 5
    mask = torch.ones(9, 37)
    mask[4] = 0
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    moved = true @ turn + 7
    moved[4] += 100
    batch = {"all_atom_positions": true, "all_atom_mask": mask}
    assert ca_scores(moved, batch) == pytest.approx({"ca_rmsd": 0.0, "lddt_ca": 1.0}, abs=1e-4)
    moved[0] += 30
    worse = ca_scores(moved, batch)
    assert worse["ca_rmsd"] > 1
    assert worse["lddt_ca"] < 1
