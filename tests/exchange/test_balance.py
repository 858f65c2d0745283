"""What orders promise of causal work, counted: scores that the tiles of each rank compute."""

import pytest
import torch

from hairpin.exchange.mask import BlockSparse, Mask
from hairpin.exchange.order import Order
from hairpin.exchange.tiles import cut

PLACES = 8
CAUSAL = Mask(causal=True)
DOCUMENTS = (1500, 700, 2048, 333, 1024)


def scores(order: Order, mask: Mask) -> list[list[int]]:
    """Scores by rank and ring step: in step t, rank r has the keys of rank r - t."""
    held = [order.positions(PLACES, place) for place in range(PLACES)]
    return [
        [
            sum(tile.scores for tile in cut(held[r], held[(r - t) % PLACES], mask, order.length))
            for t in range(PLACES)
        ]
        for r in range(PLACES)
    ]


def seen(mask: Mask, length: int) -> int:
    """Scores that the mask lets count."""
    first, stop = mask.interval(Order("contiguous", length).positions(1, 0), length)
    return int((stop - first).clamp(min=0).sum())


def total(of_ranks: list[list[int]]) -> int:
    return sum(map(sum, of_ranks))


def off_equal(of_ranks: list[list[int]]) -> float:
    """How much more than an equal share the busiest rank computes, or less the idlest."""
    totals = [sum(steps) for steps in of_ranks]
    mean = sum(totals) / PLACES
    return max(max(totals) / mean - 1, 1 - min(totals) / mean)


def waiting(of_ranks: list[list[int]]) -> float:
    """Time of a ring whose steps wait for the busiest rank, over an equal share of the work."""
    busiest = sum(max(steps) for steps in zip(*of_ranks, strict=True))
    return busiest / (total(of_ranks) / PLACES)


@pytest.mark.parametrize("length", [1024, 4096, 4099])
def test_zigzag_is_balanced(length):
    work = scores(Order("zigzag", length), CAUSAL)
    assert total(work) == seen(CAUSAL, length)  # no tile computes what nobody sees
    assert off_equal(work) < 0.03
    assert waiting(work) < 1.03


def test_zigzag_is_equal_to_the_score_where_the_length_divides():
    work = scores(Order("zigzag", 4096), CAUSAL)
    for steps in zip(*work, strict=True):
        assert len(set(steps)) == 1


@pytest.mark.parametrize("length", [1024, 4096, 4099])
def test_striped_is_balanced_but_for_a_row(length):
    """Rank i sees i more keys in each of its rows than rank 0: at most P - 1 in each."""
    work = scores(Order("striped", length), CAUSAL)
    assert total(work) == seen(CAUSAL, length)
    totals = [sum(steps) for steps in work]
    rows = -(-length // PLACES)
    assert max(totals) - min(totals) <= PLACES * rows
    assert off_equal(work) < 0.03
    assert waiting(work) < 1.03


def test_contiguous_is_not():
    """The last of P ranks sees (2P - 1) / P as many scores as an equal share."""
    work = scores(Order("contiguous", 4096), CAUSAL)
    assert total(work) == seen(CAUSAL, 4096)
    assert off_equal(work) == pytest.approx(1 - 1 / PLACES, rel=1e-2)
    assert waiting(work) > 1.8


def test_zigzag_in_each_document_is_balanced():
    length, mask = sum(DOCUMENTS), Mask(causal=True, documents=DOCUMENTS)
    work = scores(Order("documents", length, DOCUMENTS), mask)
    assert total(work) == seen(mask, length)
    assert off_equal(work) < 0.03
    assert waiting(work) < 1.03
    for kind in ("zigzag", "contiguous"):
        assert off_equal(scores(Order(kind, length), mask)) > 0.5, kind


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_nobody_sees_cost_nothing(kind, causal):
    """A band of blocks beside the first ones, as in long documents."""
    length, size = 4099, 128
    i = torch.arange(-(-length // size))
    band = ((i[:, None] - i).abs() < 3) | (i < 1)
    mask = Mask(causal=causal, blocks=BlockSparse(size, band))
    want = int(mask.sees(torch.arange(length), length).sum())
    work = scores(Order(kind, length), mask)
    if kind == "striped" and causal:  # diagonals are masked tiles
        assert want <= total(work) < 1.2 * want
    else:
        assert total(work) == want
    assert want < 0.3 * length**2


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped", "documents"])
@pytest.mark.parametrize("length", range(6))
def test_a_sequence_may_be_much_shorter_than_there_are_places(kind, length):
    order = Order(kind, length, (length,) if kind == "documents" else None)
    held = [order.positions(4, place) for place in range(4)]
    assert all(part.dtype == torch.int64 for part in held)
    assert sorted(torch.cat(held).tolist()) == list(range(length))
