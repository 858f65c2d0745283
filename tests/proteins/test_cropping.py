"""Crops: which residues stay, and that every feature follows."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hairpin.proteins import cropping


@pytest.mark.parametrize("lengths", [[30], [30, 1, 7], [5, 5, 5, 5]])
@pytest.mark.parametrize("size", [1, 6, 17, 100])
def test_contiguous_crops_have_the_size_and_are_stretches(lengths, size):
    starts = np.cumsum([0, *lengths])
    for seed in range(30):
        kept = cropping.contiguous(np.random.default_rng(seed), lengths, size)
        assert len(kept) == min(size, sum(lengths))
        for first, last in pairwise(starts):
            part = kept[(kept >= first) & (kept < last)]
            assert (np.diff(part) == 1).all()


def test_contiguous_crops_reach_every_residue():
    seen = {
        int(i) for s in range(200) for i in cropping.contiguous(np.random.default_rng(s), [20], 5)
    }
    assert seen == set(range(20))


def test_spatial_crops_are_around_an_interface():
    """Two chains side by side that touch at their ends only."""
    ca = np.zeros((40, 3), dtype=np.float32)
    ca[:20, 0] = 3.8 * np.arange(20)
    ca[20:, 0] = 3.8 * np.arange(20) + 3.8 * 19 + 5
    asym = np.repeat([1, 2], 20)
    seen = np.ones(40, dtype=bool)
    seen[19] = False
    for seed in range(10):
        kept = cropping.spatial(np.random.default_rng(seed), ca, seen, asym, 12)
        assert len(kept) == 12
        assert (np.diff(kept) > 0).all()
        assert 19 not in kept
        assert {18, 20} <= set(kept.tolist())


def test_spatial_crop_of_one_chain_is_around_any_residue_seen():
    ca = np.zeros((20, 3), dtype=np.float32)
    ca[:, 0] = 3.8 * np.arange(20)
    kept = cropping.spatial(np.random.default_rng(0), ca, np.ones(20, bool), np.ones(20), 5)
    assert len(kept) == 5


def test_every_feature_is_cut_along_its_residues():
    index = np.array([1, 3, 4])
    batch = {
        "aatype": torch.arange(6), "msa": torch.arange(12).view(2, 6),
        "template_mask": torch.ones(4), "template_aatype": torch.zeros(4, 6),
        "seq_length": torch.tensor(6), "all_atom_positions": torch.zeros(6, 37, 3),
    }  # fmt: skip
    found = cropping.crop(batch, index)
    assert found["aatype"].tolist() == [1, 3, 4]
    assert found["msa"].tolist() == [[1, 3, 4], [7, 9, 10]]
    assert found["template_mask"].shape == (4,)
    assert found["template_aatype"].shape == (4, 3)
    assert found["seq_length"] == 3
    assert found["all_atom_positions"].shape == (3, 37, 3)
