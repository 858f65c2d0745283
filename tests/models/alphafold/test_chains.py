"""Copies of chains: which is which, and how far apart."""

import pytest
import torch

from hairpin.errors import DataError
from hairpin.models.alphafold.config import LossConfig
from hairpin.models.alphafold.geometry import Rigid, quaternion_to_rotation
from hairpin.models.alphafold.losses.chains import (
    ABSENT,
    Chains,
    align_chains,
    chain_centre_loss,
    take_labels,
)


def complex_of(*lengths_and_entities, seed=0):
    """Chains of random shape: copies of an entity are alike, each in a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes, columns = {}, ([], [], [], [])
    for asym, (length, entity) in enumerate(lengths_and_entities, start=1):
        shape = shapes.setdefault(entity, 4 * torch.randn(length, 3, generator=generator))
        q = torch.randn(4, generator=generator)
        place = Rigid(
            quaternion_to_rotation(q / q.norm()), 30 * torch.randn(3, generator=generator)
        )
        columns[0].append(torch.full((length,), asym))
        columns[1].append(torch.full((length,), entity))
        columns[2].append(torch.arange(length))
        columns[3].append(place.apply(shape))
    asym_id, entity_id, index, ca = (torch.cat(column) for column in columns)
    return Chains(asym_id, entity_id, index, ca, torch.ones(len(ca)))


def turned(chains, order):
    """The complex elsewhere, its chains renamed: predicted chain p is known chain order[p]."""
    q = torch.tensor([0.6, 0.0, 0.8, 0.0])
    motion = Rigid(quaternion_to_rotation(q), torch.tensor([5.0, 50.0, -9.0]))
    ca = chains.ca.clone()
    for p, k in order.items():
        ca[chains.asym_id == p] = motion.apply(chains.ca[chains.asym_id == k])
    return Chains(chains.asym_id, chains.entity_id, chains.residue_index.clone(), ca, chains.mask)


@pytest.mark.parametrize(
    "order",
    [{1: 1, 2: 2, 3: 3}, {1: 2, 2: 1, 3: 3}],
)
def test_two_copies_beside_another_chain(order):
    known = complex_of((8, 1), (8, 1), (11, 2))
    predicted = turned(known, order)
    index = align_chains(predicted, known)
    assert torch.equal(known.asym_id[index], torch.tensor([order[int(a)] for a in known.asym_id]))
    assert torch.equal(known.residue_index[index], predicted.residue_index)


@pytest.mark.parametrize("order", [{1: 3, 2: 1, 3: 4, 4: 2}, {1: 4, 2: 3, 3: 2, 4: 1}])
def test_four_copies_of_one_chain(order):
    known = complex_of((9, 1), (9, 1), (9, 1), (9, 1), seed=3)
    index = align_chains(turned(known, order), known)
    assert torch.equal(known.asym_id[index], torch.tensor([order[int(a)] for a in known.asym_id]))


def test_a_crop_takes_the_residues_of_its_own_numbers():
    known = complex_of((8, 1), (8, 1), (11, 2))
    whole = turned(known, {1: 2, 2: 1, 3: 3})
    kept = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15, *range(16, 27)])
    crop = Chains(
        whole.asym_id[kept], whole.entity_id[kept], whole.residue_index[kept],
        whole.ca[kept], whole.mask[kept],
    )  # fmt: skip
    index = align_chains(crop, known)
    assert known.asym_id[index].tolist() == [2] * 4 + [1] * 4 + [3] * 11
    assert torch.equal(known.residue_index[index], crop.residue_index)


def test_residues_that_are_not_known_are_absent():
    known = complex_of((8, 1), (5, 2))
    predicted = turned(known, {1: 1, 2: 2})
    predicted.residue_index[7] = 99
    index = align_chains(predicted, known)
    assert index[7] == ABSENT
    assert (index[:7] == torch.arange(7)).all()
    positions, mask = torch.randn(13, 37, 3), torch.ones(13, 37)
    taken, seen = take_labels(positions, mask, index)
    assert torch.equal(taken[:7], positions[:7])
    assert not taken[7].any()
    assert seen.sum(1).tolist() == [37.0] * 7 + [0.0] + [37.0] * 5


def test_more_copies_than_are_known_is_an_error():
    predicted, known = complex_of((8, 1), (8, 1)), complex_of((8, 1))
    with pytest.raises(DataError, match="entity 1 has 2 chains in the prediction but 1 in"):
        align_chains(predicted, known)


def test_centres_too_near_cost_the_square_of_what_is_missing():
    """20 Angstrom apart, 10 predicted, 4 free: 36."""
    asym_id = torch.tensor([1, 1, 2, 2])
    known = torch.tensor([[0.0, -1, 0], [0, 1, 0], [20, -1, 0], [20, 1, 0]])
    predicted = known * torch.tensor([0.5, 1, 1])
    config = LossConfig(chain_centre_slack=4.0)
    loss = chain_centre_loss(config, predicted, known, torch.ones(4), asym_id)
    torch.testing.assert_close(loss, torch.tensor(36.0), rtol=1e-4, atol=1e-4)
    assert chain_centre_loss(config, known * 3, known, torch.ones(4), asym_id) == 0
    alone = torch.tensor([1.0, 1, 0, 0])
    assert chain_centre_loss(config, predicted, known, alone, asym_id) == 0
