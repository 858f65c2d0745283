"""Relaxing with OpenMM, where it is installed; the geometry of what is added everywhere."""

from pathlib import Path

import gemmi
import numpy as np
import pytest

from hairpin.errors import MissingExtraError
from hairpin.run.relax import relax_file, terminal_oxygen

PREDICTION = (
    Path(__file__).parents[2] / "../shared/data/proteins/6kwc/predicted_model_1_ptm_unrelaxed.pdb"
)


def test_the_last_oxygen_lies_in_the_plane_and_apart_from_both_bonds():
    ca, c, o = np.array([-1.525, 0, 0]), np.zeros(3), 1.23 * np.array([0.6, 0.8, 0])
    found = terminal_oxygen(ca, c, o)
    assert found[2] == 0
    assert np.linalg.norm(found) == pytest.approx(1.25)
    directions = ca / np.linalg.norm(ca), o / np.linalg.norm(o)
    assert found @ directions[0] == pytest.approx(found @ directions[1])
    assert found @ directions[0] < 0


def test_without_openmm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmm", None)
    with pytest.raises(MissingExtraError, match=r"hairpin\[relax\].*--relax"):
        relax_file(tmp_path / "a.pdb", tmp_path / "b.pdb")


@pytest.mark.slow
@pytest.mark.skipif(not PREDICTION.is_file(), reason="shared/data/proteins is absent")
def test_a_real_prediction_is_relaxed(tmp_path):
    pytest.importorskip("openmm", reason="needs openmm: pip install 'hairpin[relax]'")
    found = relax_file(PREDICTION, tmp_path / "b.pdb", remark="a remark")
    assert found.after < found.before - 1000
    assert found.moved < 0.5
    before, after = (gemmi.read_structure(str(p))[0][0] for p in (PREDICTION, tmp_path / "b.pdb"))
    assert [r.name for r in after] == [r.name for r in before]
    assert after[3]["CA"][0].b_iso == before[3]["CA"][0].b_iso
    assert any(atom.name == "OXT" for atom in after[-1])
