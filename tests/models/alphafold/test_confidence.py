"""Confidences, against cases by hand and the oracle's logits."""

import math

import pytest
import torch

import structure_oracle as oracle
from hairpin.errors import DataError
from hairpin.models.alphafold import confidence

BREAKS = torch.linspace(0, 31, 63)


def certain(bins, count=64):
    """Logits that are sure of these bins."""
    return 200.0 * torch.nn.functional.one_hot(torch.tensor(bins), count).float()


def test_plddt_is_the_centre_of_a_certain_bin():
    found = confidence.plddt(certain([0, 24, 49], 50))
    torch.testing.assert_close(found, torch.tensor([1.0, 49.0, 99.0]))
    torch.testing.assert_close(confidence.plddt(torch.zeros(2, 50)), torch.full((2,), 50.0))


def test_aligned_error_is_the_centre_of_a_certain_bin():
    error, greatest = confidence.predicted_aligned_error(certain([[0, 63], [10, 1]]), BREAKS)
    torch.testing.assert_close(error, torch.tensor([[0.25, 31.75], [5.25, 0.75]]))
    assert greatest == 31.75


def test_ptm_by_hand():
    """20 residues, all errors 5.25: d0 = 1.24 * 5^(1/3) - 1.8."""
    d0 = 1.24 * 5 ** (1 / 3) - 1.8
    wanted = 1 / (1 + (5.25 / d0) ** 2)
    logits = certain([[10] * 20] * 20)
    assert math.isclose(float(confidence.ptm(logits, BREAKS)), wanted, rel_tol=1e-5)
    short = certain([[10] * 4] * 4)  # below 19 residues d0 is that of 19
    wanted = 1 / (1 + (5.25 / (1.24 * 4 ** (1 / 3) - 1.8)) ** 2)
    assert math.isclose(float(confidence.ptm(short, BREAKS)), wanted, rel_tol=1e-5)


def test_iptm_counts_pairs_of_chains_and_takes_the_best_frame():
    bins = torch.full((24, 24), 40)
    bins[:12, 12:] = 4  # chain 1 is sure of chain 2, not the other way round
    bins[:12, :12] = 0
    logits = 200.0 * torch.nn.functional.one_hot(bins, 64).float()
    asym_id = torch.tensor([1] * 12 + [2] * 12)
    d0 = 1.24 * 9 ** (1 / 3) - 1.8
    wanted = 1 / (1 + (2.25 / d0) ** 2)
    found = float(confidence.iptm(logits, BREAKS, asym_id))
    assert math.isclose(found, wanted, rel_tol=1e-5)
    assert float(confidence.ptm(logits, BREAKS)) > found
    assert float(confidence.iptm(logits, BREAKS, torch.ones(24))) == 0


def test_masked_residues_do_not_count():
    logits = oracle.outputs("multimer_v3_three_chains")["predicted_aligned_error"]["logits"]
    asym_id = oracle.features("multimer_v3_three_chains")["asym_id"]
    mask = (asym_id != 3).float()
    kept = mask.nonzero()[:, 0]
    inner = logits[kept][:, kept]
    torch.testing.assert_close(
        confidence.iptm(logits, BREAKS, asym_id, mask=mask),
        confidence.iptm(inner, BREAKS, asym_id[kept]),
    )
    torch.testing.assert_close(
        confidence.ptm(logits, BREAKS, mask=mask), confidence.ptm(inner, BREAKS)
    )


def test_ranking():
    plddt = torch.tensor([90.0, 70.0])
    assert confidence.ranking(plddt) == 80
    assert confidence.ranking(plddt.clone().requires_grad_()) == 80
    score = confidence.ranking(plddt, ptm=torch.tensor(0.5), iptm=torch.tensor(0.75))
    assert math.isclose(score, 0.7, rel_tol=1e-6)
    with pytest.raises(DataError, match="iptm was given without ptm"):
        confidence.ranking(plddt, iptm=torch.tensor(0.5))
