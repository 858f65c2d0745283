"""Costs of attention over split sequences: against sums done by hand, and against what is sent."""

import math
import os
from dataclasses import replace

import pytest
import torch

from hairpin.comm.mesh import init_mesh
from hairpin.comm.topology import Tier, Topology, Work
from hairpin.errors import PlanError
from hairpin.exchange.api import attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.planning.sequence.cost import Candidate, candidates, explain, price
from hairpin.planning.sequence.work import AttentionShape, count_work
from hairpin.run.launch import launch

FREE = Tier(0.0, math.inf)
NO_WORK = Work(0.0, math.inf)
ONE_FLOP_A_SECOND = Work(0.0, 1.0)
ALL = ("ring", "double_ring", "all_gather", "hierarchical", "rsa")
CAUSAL = Mask(causal=True)


def flat(ranks, link=FREE, work=NO_WORK) -> Topology:
    return Topology.flat(ranks, link, forward=work, backward=work, copy_bytes_per_s=math.inf)


def two_by_two(work=NO_WORK) -> Topology:
    fast, slow = Tier(0.0, 1e12), Tier(0.0, 1e6)
    rest = {"forward": work, "backward": work, "copy_bytes_per_s": math.inf}
    return Topology.two_tier(2, 2, fast, slow, shared_outer=True, **rest)


def way(u, r, schedule="ring", order="contiguous", *, inside=True, inner=1) -> Candidate:
    return Candidate(
        method="", heads=u, places=r, heads_inside=inside, schedule=schedule, inner=inner,
        order=order,
    )  # fmt: skip


def of(found, **fields) -> Candidate:
    (one,) = [c for c in found if all(getattr(c, k) == v for k, v in fields.items())]
    return one


@pytest.mark.parametrize(
    ("candidate", "forward_bytes", "backward_bytes"),
    [  # per rank s = 1024, all heads together 512 channels, 4 bytes: s h d b is 2 MiB
        (way(1, 4), 3 * 2 * 2, 3 * 2 * 2 * 2),
        (way(1, 4, "all_gather"), 3 * 2 * 2, 3 * 2 * 2),
        (way(4, 1), 3 / 4 * 4 * 2, 3 / 4 * 4 * 2),
        (way(2, 2), 1 / 2 * 4 * 2 + 2 * 2, 1 / 2 * 4 * 2 + 2 * 2 * 2),
        (way(1, 4, "hierarchical", inner=2), 2 * 2 * 2 + 2 * 2, 2 * (2 * 2 * 2) + 2 * (2 * 2)),
        (way(1, 4, "double_ring", inner=2), 2 * 2 * 2 + 2 * 2, 2 * (2 * 2 * 2) + 2 * (2 * 2)),
        (way(1, 4, "rsa"), 3 * 2 * 2, 3 * 2 * 2 + 2 * 2 * 3 * 2),
    ],
)
def test_bytes_by_hand(candidate, forward_bytes, backward_bytes):
    shape = AttentionShape(length=4096, heads=8, head_dim=64)
    found = price(candidate, shape, flat(4))
    if candidate.schedule in {"hierarchical", "double_ring"}:
        backward_bytes = forward_bytes * 2  # keys again, and gradients as wide
    assert found.forward_bytes == forward_bytes * 2**20
    assert found.backward_bytes == backward_bytes * 2**20


def test_key_heads_travel_only_where_they_are_needed():
    shape = AttentionShape(length=400, heads=8, groups=2, head_dim=1, element_bytes=1)
    found = price(way(4, 1), shape, flat(4))
    # 100 rows; each of 3 peers takes 2 of 8 heads of q, and of 2 heads of k and v the 1 it needs
    assert found.forward_bytes == 3 * 100 * (2 + 2 * 1) + 3 * 100 * 2


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_ring_sends_less_than_ulysses_if_and_only_if_ranks_are_few(ranks, groups):
    shape = AttentionShape(length=1024, heads=8, groups=groups, head_dim=16)
    ring = price(way(1, ranks), shape, flat(ranks)).forward_bytes
    ulysses = price(way(ranks, 1), shape, flat(ranks)).forward_bytes
    assert (ring < ulysses) == (ranks < 1 + 8 / groups)


def test_two_tiers_place_the_axes_by_the_heads():
    """Between hosts, s h d bytes a rank: keys 2 forward and 4 backward, switches 2 and 2.

    With a quarter of the key heads the keys are a quarter; q and the output stay.
    """
    mha = AttentionShape(length=4096, heads=8, head_dim=64, mask=CAUSAL)
    gqa = replace(mha, groups=2)
    placed = {}
    for shape in (mha, gqa):
        both = [price(way(2, 2, inside=inside), shape, two_by_two()) for inside in (True, False)]
        placed[shape.groups] = [c.time_s for c in both]
    mib_s = 2 * 2**20 / 1e6  # of s h d elements of one rank, over the link that two ranks share
    assert placed[None] == pytest.approx([2 * mib_s * (2 + 4), 2 * mib_s * (2 + 2)], rel=1e-3)
    quarter = [2 * mib_s * (2 + 4) / 4, 2 * mib_s * (2 + 2) * 5 / 8]
    assert placed[2] == pytest.approx(quarter, rel=1e-3)
    for shape, heads_inside in ((mha, False), (gqa, True)):
        usp = [c for c in candidates(shape, two_by_two(), schedules=("ring",)) if c.heads == 2]
        assert usp[0].heads_inside is heads_inside


def test_causal_work_is_balanced_by_the_order():
    """Two ranks of n positions: the busiest does n(n+1)/2 and then n^2, or half of all twice."""
    shape = AttentionShape(length=2000, heads=1, head_dim=1, mask=CAUSAL)
    times = {
        order: price(way(1, 2, order=order), shape, flat(2, work=ONE_FLOP_A_SECOND)).forward_s
        for order in ("contiguous", "zigzag")
    }
    assert times["contiguous"] == 4 * (1000 * 1001 / 2 + 1000**2)
    assert times["zigzag"] == 4 * (500 * 501 + 500**2 + 2 * 500**2)


def test_transfers_hide_behind_work_or_work_behind_transfers():
    shape = AttentionShape(length=400, heads=1, head_dim=1)
    flops, hop = 4 * 100 * 100, 100 * 2 * 4
    slow_link = price(way(1, 4), shape, flat(4, Tier(0.0, 1e-3), ONE_FLOP_A_SECOND))
    assert slow_link.forward_s == pytest.approx(3 * hop * 1e3 + flops)
    fast_link = price(way(1, 4), shape, flat(4, Tier(0.0, 1e3), ONE_FLOP_A_SECOND))
    assert fast_link.forward_s == pytest.approx(4 * flops)
    back = 4 * 10 * 100 * 100 + hop / 1e3  # the last gradient goes home when all is computed
    assert fast_link.backward_s == pytest.approx(back)
    gather = price(way(1, 4, "all_gather"), shape, flat(4, Tier(0.0, 1e-3), ONE_FLOP_A_SECOND))
    assert gather.forward_s == pytest.approx(3 * hop * 1e3 + 3 * flops)
    switch = price(way(4, 1), replace(shape, heads=4), flat(4, Tier(1.0, 1e3)))
    bytes_out, bytes_in = 3 * 100 * 4, 3 * 100 * 3 * 4
    assert switch.forward_s == pytest.approx(6 + (bytes_in + bytes_out) / 1e3)


def test_masks_leave_work_out():
    full = AttentionShape(length=1024, heads=1, head_dim=1)
    scores = {
        name: count_work("contiguous", replace(full, mask=mask), 4).scores
        for name, mask in {
            "full": Mask(),
            "causal": CAUSAL,
            "window": Mask(causal=True, window=64),
            "documents": Mask(documents=(256,) * 4),
        }.items()
    }
    assert scores["full"].sum() == 1024**2
    assert scores["causal"].sum() == pytest.approx(1024**2 / 2, rel=0.01)
    assert scores["window"].sum() < 3 * 64 * 1024
    assert scores["window"][:, 2:].sum() == 0  # nobody looks two places back
    assert scores["documents"][:, 1:].sum() == 0


def test_long_sequences_and_many_places_are_counted_by_samples():
    long = AttentionShape(length=1 << 20, heads=1, head_dim=1, mask=CAUSAL)
    counts = count_work("zigzag", long, 8)
    assert counts.scores.sum() == pytest.approx(long.length**2 / 2, rel=0.01)
    few = count_work("zigzag", replace(long, length=1 << 14), 128)
    assert 48 <= len(few.places) < 128
    each = few.scores.sum(1)
    assert each.max() == pytest.approx(each.min(), rel=0.02)


def test_a_memory_cap_takes_the_gather_first():
    shape = AttentionShape(length=4096, heads=8, head_dim=64)
    ask = {"schedules": ("ring", "all_gather", "double_ring"), "orders": ("contiguous",)}
    free = candidates(shape, two_by_two(), **ask)
    most = max(c.peak_bytes for c in free)
    capped = candidates(shape, two_by_two(), memory_bytes=most - 1, **ask)
    (less,) = [c for c in capped if c.turns > 1]
    assert (less.schedule, less.heads, less.turns) == ("all_gather", 1, 2)
    less_still = candidates(shape, two_by_two(), memory_bytes=most // 2, **ask)
    gone = [c for c in less_still if c.excluded]
    assert {(c.schedule, c.places) for c in gone} >= {("all_gather", 4), ("ring", 1)}
    assert less_still[-len(gone) :] == gone, "what cannot be taken comes last"
    assert "MiB of" in gone[0].excluded
    none = candidates(shape, two_by_two(), memory_bytes=1, **ask)
    assert all(c.excluded for c in none)


def test_memory_grows_with_the_rows_of_a_rank_but_for_a_gather():
    shape = AttentionShape(length=8192, heads=8, head_dim=64)
    held = {
        (schedule, ranks): price(way(1, ranks, schedule), shape, flat(ranks)).peak_bytes
        for schedule in ("ring", "all_gather")
        for ranks in (4, 8)
    }
    scratch = 2 * 256 * 512 * 4
    assert held["ring", 4] - scratch == 2 * (held["ring", 8] - scratch)
    assert held["all_gather", 4] < 1.5 * held["all_gather", 8]


def test_memory_of_turns_by_hand():
    """Of 4096 rows a rank, in copies of q: 8 and a log-sum-exp per row, and 11 / turns pass by.

    A kernel copies the output's gradient of some of the heads, and its scratch is for no more keys
    than a turn has.
    """
    shape = AttentionShape(length=16384, heads=8, head_dim=64)
    q = 4096 * 8 * 64 * 4
    for turns, keys in ((1, 512), (2, 512), (16, 512), (128, 256)):
        found = price(replace(way(1, 4), turns=turns), shape, flat(4)).peak_bytes
        of_heads = min(turns, 8)
        copied = q // of_heads if turns > 1 else 0
        passing = 8 * q // turns + q // of_heads + 2 * q // turns
        assert found == 8 * q + q // 64 + passing + copied + 2 * 256 * keys * 4
    alone = price(way(1, 1), replace(shape, length=4096), flat(1)).peak_bytes
    assert alone == 8 * q + q // 64 + 2 * 256 * 512 * 4


def test_short_memory_is_met_by_the_fewest_turns_that_fit():
    shape = AttentionShape(length=4096, heads=4, head_dim=64, mask=CAUSAL)
    ask = {"schedules": ("ring",), "orders": ("zigzag",)}
    (free,) = [c for c in candidates(shape, flat(4), **ask) if c.places == 4]
    assert free.turns == 1
    for turns in (2, 8, 32):
        most = price(replace(way(1, 4, order="zigzag"), turns=turns), shape, flat(4)).peak_bytes
        found = candidates(shape, flat(4), memory_bytes=most, **ask)
        (taken,) = [c for c in found if c.places == 4]
        assert (taken.turns, taken.excluded, taken.peak_bytes) == (turns, None, most)
        assert (taken.method, taken.sent_bytes) == (f"ring in {turns} turns", free.sent_bytes)
        assert f"ring in {turns} turns" in explain(found)


def test_turns_hide_a_gradient_behind_the_next_turn_and_cost_calls():
    shape = AttentionShape(length=400, heads=4, head_dim=1)
    flops, hop = 4 * 100 * 100, 100 * 2 * 4  # of one head
    fast = flat(4, Tier(0.0, 1e3), ONE_FLOP_A_SECOND)
    once, often = (price(replace(way(1, 4), turns=n), shape, fast) for n in (1, 4))
    assert once.backward_s == pytest.approx(4 * 10 / 4 * flops * 4 + 4 * hop / 1e3)
    assert often.backward_s == pytest.approx(4 * 10 / 4 * flops * 4 + hop / 1e3)
    called = flat(4, work=Work(1.0, math.inf))
    once, often = (price(replace(way(1, 4), turns=n), shape, called) for n in (1, 4))
    assert (once.forward_s, often.forward_s) == (4, 16)


def test_the_table_shows_all_candidates_and_reasons():
    shape = AttentionShape(length=256, heads=2, head_dim=8, mask=CAUSAL)
    found = candidates(shape, two_by_two(), schedules=ALL)
    text = explain(found)
    assert len(text.splitlines()) == 1 + len(found)
    assert "usp 2 x 2, ring, heads inside" in text
    assert "ulysses" in text
    assert "no: 2 heads for 4 ranks leave some without work" in text
    assert {c.schedule for c in found} == set(ALL)
    assert {c.order for c in found if c.places > 1} == {"contiguous", "zigzag"}


def test_one_rank_sends_nothing():
    (alone,) = candidates(AttentionShape(length=64, heads=2, head_dim=8), flat(1))
    assert (alone.method, alone.sent_bytes) == ("alone", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"heads": 0}, "heads=0"), ({"groups": 3}, "multiple"), ({"length": -1}, "length=-1")],
)
def test_impossible_shapes(fields, message):
    with pytest.raises(PlanError, match=message):
        AttentionShape(**{"length": 8, "heads": 4, "head_dim": 8} | fields)


def test_impossible_questions():
    shape = AttentionShape(length=8, heads=4, head_dim=8)
    with pytest.raises(PlanError, match="'star': write some of ring"):
        candidates(shape, flat(2), schedules=("star",))
    with pytest.raises(PlanError, match="2 x 2 places are not the 3 ranks"):
        price(way(2, 2), shape, flat(3))


# ----------------------------------------------------------------- against what is really sent

SHAPES = [
    AttentionShape(length=26, heads=6, groups=2, head_dim=4, mask=CAUSAL),
    AttentionShape(length=24, heads=4, head_dim=4, batch=2),
    AttentionShape(length=23, heads=5, head_dim=4, mask=Mask(documents=(4, 19), causal=True)),
]


def really_sent(shape: AttentionShape, found: list[Candidate]) -> list[tuple[int, int]]:
    """Payload bytes of this rank, forward and backward, for each candidate."""
    mesh = init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=60)
    counts = []
    for c in found:
        order = Order(c.order, shape.length, shape.mask.documents)
        split = SequenceSplit(
            mesh, "sp", order, heads=c.heads, schedule=c.schedule, heads_inside=c.heads_inside,
            inner=c.inner,
        )  # fmt: skip
        rows = len(split.positions)
        q, k, v = (
            torch.randn(shape.batch, heads, rows, shape.head_dim).requires_grad_()
            for heads in (shape.heads, shape.key_heads, shape.key_heads)
        )
        before = mesh.traffic.snapshot()
        out = attention(q, k, v, split, mask=shape.mask)
        between = mesh.traffic.snapshot()
        out.sum().backward()
        sent = (between.since(before), mesh.traffic.since(between))
        counts.append((sent[0].bytes_sent, sent[1].bytes_sent))
    return counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [3, 4])
def test_predicted_bytes_are_the_bytes_that_are_sent(shape, ranks):
    topology = two_by_two() if ranks == 4 else flat(ranks)
    found = [c for c in candidates(shape, topology, schedules=ALL) if c.excluded is None]
    counted = launch(really_sent, ranks, shape, found, timeout_s=100)
    for candidate, *of_ranks in zip(found, *counted, strict=True):
        assert candidate.forward_bytes == max(sent[0] for sent in of_ranks), candidate
        assert candidate.backward_bytes == max(sent[1] for sent in of_ranks), candidate
