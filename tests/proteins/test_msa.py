"""The MSA as numbers: merging, sampling, masking, clusters, features."""

import numpy as np
import pytest

from hairpin.proteins import msa
from hairpin.proteins.alignments import read_a3m
from hairpin.proteins.residues import GAP, RESTYPES


def random_msa(rows=60, residues=13, seed=0):
    rng = np.random.default_rng(seed)
    letters = rng.integers(0, 22, (rows, residues)).astype(np.uint8)
    deletions = rng.poisson(0.3, (rows, residues)).astype(np.int32)
    return msa.Msa(letters, deletions, tuple(map(str, range(rows))))


def test_merging_drops_repeats_and_keeps_the_first(write):
    a = read_a3m(write("a.a3m", ">t\nACDE\n>one\nAC-E\n>two\nkAC-E\n>three\nABDE\n"))
    b = read_a3m(write("b.a3m", ">t\nACDE\n>four\nADDE\n>five\nwwAC-E\n>six\nUOZJ\n"))
    found = msa.merge("ACDE", [a, b])
    assert found.names == ("target", "one", "three", "four", "six")
    as_letters = ["".join((RESTYPES + "X-")[i] for i in row) for row in found.letters]
    assert as_letters == ["ACDE", "AC-E", "ADDE", "ADDE", "CXEX"]  # compared before B is read as D
    assert not found.deletions.any()


def test_the_target_alone():
    found = msa.merge("AX", [])
    assert found.letters.tolist() == [[0, 20]]


def test_profile_is_the_mean_of_one_hot():
    m = random_msa()
    np.testing.assert_allclose(m.profile, np.eye(22)[m.letters].mean(0), atol=1e-6)


def test_sampling_keeps_the_target_first_and_every_row_once():
    chosen, rest = msa.sample(np.random.default_rng(1), 50, 8)
    assert chosen[0] == 0
    assert len(chosen) == 8
    assert sorted([*chosen, *rest]) == list(range(50))
    other, _ = msa.sample(np.random.default_rng(2), 50, 8)
    assert other.tolist() != chosen.tolist()


def test_masking_in_the_published_proportions():
    """Over many letters: 15 % chosen; of these 70 % mask, 10 % as drawn, 10 % kept, 10 % any."""
    rng = np.random.default_rng(0)
    letters = np.full((3000, 40), 3, dtype=np.uint8)
    column = np.zeros((40, 22), dtype=np.float32)
    column[:, GAP] = 1  # so that a letter drawn from the profile is a gap
    replaced, chosen = msa.mask(rng, letters, column, msa.Masking())
    assert chosen.mean() == pytest.approx(0.15, abs=0.004)
    assert (replaced[chosen == 0] == 3).all()
    part = {k: (replaced[chosen > 0] == k).mean() for k in range(23)}
    assert part[msa.MASK] == pytest.approx(0.7, abs=0.015)
    assert part[GAP] == pytest.approx(0.1, abs=0.01)
    assert part[3] == pytest.approx(0.1 + 0.1 / 20, abs=0.01)
    others = [part[k] for k in range(20) if k != 3]
    np.testing.assert_allclose(others, 0.1 / 20, atol=0.003)
    assert part[20] == 0


def test_masking_nothing_and_everything():
    rng = np.random.default_rng(0)
    m = random_msa()
    same, _ = msa.mask(rng, m.letters, m.profile, msa.Masking(fraction=0))
    assert (same == m.letters).all()
    none = msa.Masking(fraction=1, uniform=0, profile=0, same=0)
    assert (msa.mask(rng, m.letters, m.profile, none)[0] == msa.MASK).all()
    kept = msa.Masking(fraction=1, uniform=0, profile=0, same=1)
    assert (msa.mask(rng, m.letters, m.profile, kept)[0] == m.letters).all()


def test_letters_from_the_profile_follow_it():
    rng = np.random.default_rng(0)
    column = rng.dirichlet(np.ones(22), size=3).astype(np.float32)
    drawn, _ = msa.mask(
        rng, np.zeros((40000, 3), dtype=np.uint8), column,
        msa.Masking(fraction=1, uniform=0, profile=1, same=0),
    )  # fmt: skip
    for r in range(3):
        found = np.bincount(drawn[:, r], minlength=22) / len(drawn)
        np.testing.assert_allclose(found, column[r], atol=0.01)


def slow_clusters(centres, centre_deletions, others, other_deletions):
    """Clusters by the words of the paper, one row at a time."""
    members = [[i] for i in range(len(centres))]
    for e, row in enumerate(others):
        likeness = [sum(a == b < GAP for a, b in zip(row, c, strict=True)) for c in centres]
        members[int(np.argmax(likeness))].append(e)
    frequencies, deletions = [], []
    for centre, *joined in members:
        rows = np.stack([centres[centre], *(others[e] for e in joined)])
        counts = np.stack([centre_deletions[centre], *(other_deletions[e] for e in joined)])
        frequencies.append(np.eye(23)[rows].mean(0))
        deletions.append(counts.mean(0))
    return np.array(frequencies), np.array(deletions)


def test_clusters_against_one_row_at_a_time(monkeypatch):
    m = random_msa(rows=90)
    centres = m.letters[:7].copy()
    centres[:, ::3] = msa.MASK
    inputs = centres, m.deletions[:7], m.letters[7:], m.deletions[7:]
    expected = slow_clusters(*inputs)
    for bytes_at_once in (1, 5000, 2**23):
        monkeypatch.setattr(msa, "_BYTES_AT_ONCE", bytes_at_once)
        for got, want in zip(msa.cluster_means(*inputs), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_deletions_are_squashed_as_published():
    assert msa.squash(np.array([0, 3, 100])).tolist() == pytest.approx([0, 0.5, 0.98091], abs=1e-4)


def test_features_hang_together():
    m = random_msa(rows=40)
    found = msa.features(np.random.default_rng(0), m, clusters=10, extra=12, masking=msa.Masking())
    assert found["msa_feat"].shape == (10, 13, 49)
    assert found["extra_msa"].shape == (12, 13)
    assert (found["true_msa"][0] == m.letters[0]).all()
    seen = found["msa_feat"][..., :23].argmax(-1)
    assert (seen == found["true_msa"])[found["bert_mask"] == 0].all()
    frequencies = found["msa_feat"][..., 25:48]
    np.testing.assert_allclose(frequencies.sum(-1), 1, atol=1e-5)
    where = [m.letters.tolist().index(row) for row in found["true_msa"].tolist()]
    np.testing.assert_allclose(
        found["msa_feat"][..., 24], msa.squash(m.deletions[where]), atol=1e-6
    )
    assert set(np.unique(found["msa_feat"][..., 23])) <= {0.0, 1.0}
    rest = {tuple(row) for row in m.letters.tolist()} - set(map(tuple, found["true_msa"].tolist()))
    assert set(map(tuple, found["extra_msa"].tolist())) <= rest


def test_without_extra_rows_there_is_one_that_is_masked():
    m = random_msa(rows=4)
    found = msa.features(np.random.default_rng(0), m, clusters=10, extra=12, masking=msa.Masking())
    assert found["msa_feat"].shape == (4, 13, 49)
    assert found["extra_msa"].shape == (1, 13)
    assert not found["extra_msa_mask"].any()
