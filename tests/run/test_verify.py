"""`hairpin verify fold`: passes on what ships, fails where a number is changed."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hairpin import kernels
from hairpin.cli.app import app
from hairpin.errors import DataError, WeightsError
from hairpin.run.verify import _subset, shipped, verify

FILES = {path.stem: path for path in shipped()}
SMALL = "monomer_notemplates_recycle0"


def test_five_files_ship():
    assert sorted(FILES) == [
        "evoformer_modules",
        "monomer5_ptm_recycle2",
        "monomer_notemplates_recycle0",
        "monomer_ptm_templates_recycle1",
        "multimer_v3_three_chains",
    ]
    assert sum(path.stat().st_size for path in FILES.values()) < 8e6


@pytest.mark.parametrize(
    ("name", "model", "recycles", "checks"),
    [
        ("evoformer_modules", "Evoformer modules", 0, 14),
        ("monomer5_ptm_recycle2", "model_3_ptm", 2, 15),
        ("monomer_notemplates_recycle0", "model_3", 0, 51),
        ("monomer_ptm_templates_recycle1", "model_1_ptm", 1, 392),
        ("multimer_v3_three_chains", "model_1_multimer_v3", 1, 18),
    ],
)
def test_deepminds_numbers_are_ours(name, model, recycles, checks):
    verdict = verify(FILES[name])
    assert not [check for check in verdict.checks if not check.passed]
    assert (verdict.model, verdict.recycles, len(verdict.checks)) == (model, recycles, checks)


def test_gradients_that_are_zero_in_truth_are_told_from_the_others():
    """A bias that adds one number to all logits of a softmax has no gradient."""
    checks = verify(FILES["monomer_ptm_templates_recycle1"]).checks
    zeros = [check.name for check in checks if check.note == "0 but for rounding"]
    assert len(zeros) == 3
    assert all(name.endswith(("feat_2d_norm//offset", "attention_2d//bias")) for name in zeros)
    assert sum(check.name.startswith("grad/") for check in checks) == 338


def changed(tmp_path, stem, **arrays):
    with np.load(FILES[stem]) as file:
        held = dict(file) | arrays
    path = tmp_path / f"{stem}.npz"
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    return path


def test_a_changed_number_fails(tmp_path):
    with np.load(FILES[SMALL]) as file:
        pair = file["out/representations/pair"].copy()
    pair[3, 4, 5] += 0.01
    verdict = verify(changed(tmp_path, SMALL, **{"out/representations/pair": pair}))
    wrong = [check for check in verdict.checks if not check.passed]
    assert [check.name for check in wrong] == ["representations/pair"]
    assert wrong[0].error == pytest.approx(0.01, rel=0.01)


def test_a_wrong_model_fails(monkeypatch):
    """Attention that forgets its scale is found out."""
    real = kernels.attention
    monkeypatch.setattr(
        kernels, "attention", lambda q, k, v, **given: real(1.01 * q, k, v, **given)
    )
    assert not verify(FILES["evoformer_modules"]).passed
    assert not verify(FILES["multimer_v3_three_chains"]).passed


def test_an_output_that_we_do_not_have_fails(tmp_path):
    path = changed(tmp_path, SMALL, **{"out/novel/logits": np.zeros(3, np.float32)})
    (wrong,) = [check for check in verify(path).checks if not check.passed]
    assert (wrong.name, wrong.note) == ("novel/logits", "nothing of ours to compare")


def test_what_cannot_be_verified_is_said(tmp_path):
    shutil.copy(FILES["monomer5_ptm_recycle2"], tmp_path / "renamed.npz")
    with pytest.raises(DataError, match="does not say how often it recycled"):
        verify(tmp_path / "renamed.npz")
    assert verify(tmp_path / "renamed.npz", recycles=2).passed
    assert not verify(tmp_path / "renamed.npz", recycles=1).passed
    np.savez(tmp_path / "x_recycle0.npz", a=np.zeros(2))
    with pytest.raises(WeightsError, match="of no AlphaFold model that is known"):
        verify(tmp_path / "x_recycle0.npz")


@pytest.mark.parametrize("count", [0, 2, 7, 9])
def test_the_rows_that_add_up_are_found(count):
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = list(range(9))[9 - count :]
    assert _subset(rows, rows[chosen].sum(0), count) == chosen


def test_the_command_prints_and_ends_with_its_verdict(tmp_path):
    run = CliRunner().invoke
    good = run(app, ["verify", "fold", "--oracle", str(FILES["evoformer_modules"])])
    assert good.exit_code == 0
    assert "outer_product_mean/out" in good.output
    assert good.output.count("PASS") == 15

    with np.load(FILES[SMALL]) as file:
        loss = file["loss"] + 1
    bad = run(
        app, ["verify", "fold", "--json", "--oracle", str(changed(tmp_path, SMALL, loss=loss))]
    )
    assert bad.exit_code == 1
    (verdict,) = json.loads(bad.stdout)
    assert verdict["model"] == "model_3"
    assert not verdict["passed"]
    assert [c["name"] for c in verdict["checks"] if not c["passed"]] == ["loss"]
