"""A prediction made with real weights, which was built from the same ideal geometry as ours."""

from pathlib import Path

import pytest
import torch

from hairpin.models.alphafold import atoms
from hairpin.models.alphafold.config import LossConfig
from hairpin.models.alphafold.geometry import Rigid
from hairpin.models.alphafold.losses.fape import backbone_fape
from hairpin.models.alphafold.losses.violations import Atoms, find_violations, violation_metrics
from hairpin.proteins import residues

FOLDER = Path(__file__).parents[4] / "shared/data/proteins/6kwc"


@pytest.fixture(scope="module")
def protein():
    """Residue types ``[r]``, positions ``[r, 37, 3]`` and mask ``[r, 37]`` of one chain."""
    path = FOLDER / "predicted_model_1_ptm_unrelaxed.pdb"
    if not path.exists():
        pytest.skip(f"{path} is absent; proteins are not part of the project")
    lines = [line for line in path.read_text().splitlines() if line.startswith("ATOM")]
    r = max(int(line[22:26]) for line in lines)
    aatype = torch.full((r,), residues.UNKNOWN)
    positions = torch.zeros(r, 37, 3, dtype=torch.float64)
    mask = torch.zeros(r, 37, dtype=torch.float64)
    for line in lines:
        i, a = int(line[22:26]) - 1, residues.ATOM_TYPES.index(line[12:16].strip())
        aatype[i] = residues.restype(residues.THREE_TO_ONE[line[17:20]])
        positions[i, a] = torch.tensor([float(line[k : k + 8]) for k in (30, 38, 46)])
        mask[i, a] = 1
    assert r == 191
    return aatype, positions, mask


def test_it_is_rebuilt_from_its_backbone_and_torsions(protein):
    aatype, positions, mask = protein
    labels = atoms.derived_labels(*protein)
    torsions = atoms.atom37_to_torsion_angles(*protein)["torsion_angles_sin_cos"]
    ideal = atoms.IdealGeometry.of(aatype, positions)
    backbone = Rigid.from_tensor7(labels["backbone_affine_tensor"])
    frames = atoms.torsions_to_frames(ideal, backbone, torsions)
    error = (frames.to_flat12() - labels["rigidgroups_gt_frames"]).abs().amax(-1)
    assert (error * labels["rigidgroups_gt_exists"]).max() < 0.02
    built = atoms.atom14_to_atom37(atoms.frames_to_atom14(ideal, frames), aatype)
    assert ((built - positions).norm(dim=-1) * mask).max() < 0.02  # the file has three decimals


def test_it_has_no_violations(protein):
    labels = atoms.derived_labels(*protein)
    r = torch.arange(len(protein[0]))
    whole = Atoms(labels["atom14_gt_positions"], labels["atom14_gt_exists"], protein[0], r)
    metrics = violation_metrics(find_violations(LossConfig(), whole), whole, torch.ones(len(r)))
    assert not any(metrics.values())


def test_its_mirror_image_is_far_away(protein):
    """Distances are all the same; only FAPE tells hands apart."""
    aatype, positions, mask = protein
    mirror = positions * torch.tensor([-1.0, 1.0, 1.0]).double()
    truth, reflected = (
        atoms.derived_labels(aatype, x, mask)["backbone_affine_tensor"] for x in (positions, mirror)
    )
    known = torch.ones(len(aatype)).double()
    assert backbone_fape(LossConfig(), truth[None], truth, known) < 1.1e-3
    assert backbone_fape(LossConfig(), reflected[None], truth, known) > 0.8
