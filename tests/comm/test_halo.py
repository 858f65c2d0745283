"""Halo: the items of the neighbours, bit by bit; gradients of three orders; bytes; refusals."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from comm.cases import RARE_DTYPES, arbitrary, line, near, part_of, places, same_bits, uniform
from hairpin.comm.halo import Halo, halo, halo_sizes
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.comm.transport import Link
from hairpin.errors import LayoutError, MeshError
from hairpin.layout import Layout, shard_offset, shard_size
from hairpin.run.launch import launch
from marks import slow

WORLDS = (1, 2, 3, slow(4), 5, slow(8))
REACHES = [(0, 0), (1, 0), (0, 2), (2, 3), (9, 1), (50, 50)]
PATTERNS = ["b s/sp c", "s/sp c b", "(b s/sp) c", "b (s/sp c)"]


def lengths(world):
    """Fewer than ranks and, in few ranks, none, one more, indivisible."""
    return [max(world - 1, 1), world + 1] if world > 4 else [0, world - 1, world + 1, 3 * world + 2]


def span(s, world, rank, before, after):
    """What a rank should hold; nothing where it has no items of its own."""
    first, size = shard_offset(s, world, rank), shard_size(s, world, rank)
    if not size:
        return first, first
    return max(0, first - before), min(s, first + size + after)


def taken(whole, layout, start, stop):
    """The reference: items of ``s`` of the whole tensor, composite dims merged again."""
    at = layout.position("s")
    region = whole.reshape([layout.sizes[d] for d in layout.dims]).narrow(at, start, stop - start)
    sizes = layout.sizes | {"s": stop - start}
    groups = layout.pattern.groups
    return region.reshape([torch.Size(sizes[d] for d in group).numel() for group in groups])


def all_reaches() -> None:
    mesh = line()
    rank, world = mesh.global_rank, mesh.world
    for s in lengths(world):
        for pattern in PATTERNS if world <= 4 else PATTERNS[::2]:
            layout = Layout(pattern, b=2, s=s, c=3)
            whole = arbitrary(layout.global_shape, torch.float32, seed=s)
            mine = part_of(whole, layout, places(mesh))
            for before, after in REACHES:
                case = f"{layout}, {before} before and {after} after"
                reach = {"before": before, "after": after}
                start, stop = span(s, world, rank, before, after)
                wanted = taken(whole, layout, start, stop)
                assert same_bits(halo(mine, layout, mesh, "s", **reach), wanted), case
                later = halo(mine, layout, mesh, "s", **reach, wait=False).wait()
                assert same_bits(later, wanted), f"{case}, started early"
                first = shard_offset(s, world, rank)
                left, right = halo_sizes(layout, mesh, "s", **reach)
                own = shard_size(s, world, rank)
                assert (left, right) == (first - start, stop - first - own), case


@pytest.mark.parametrize("world", WORLDS)
def test_each_rank_gets_its_neighbours_items(world):
    launch(all_reaches, world, timeout_s=60)


def rare_dtypes_and_memory() -> None:
    mesh = line()
    layout = Layout("s/sp c", s=8, c=3)
    for dtype in (torch.bool, torch.bfloat16, *RARE_DTYPES):
        whole = arbitrary((8, 3), dtype)
        mine = part_of(whole, layout, places(mesh))
        start, stop = span(8, mesh.world, mesh.global_rank, 2, 1)
        assert same_bits(halo(mine, layout, mesh, "s", before=2, after=1), whole[start:stop])
    turned = arbitrary((3, 8), torch.float32).T
    mine = part_of(turned, layout, places(mesh))
    kept = mine.clone()
    got = halo(mine, layout, mesh, "s", before=2, after=1)
    assert same_bits(got, turned[start:stop].contiguous())
    assert got.is_contiguous()
    got.fill_(-1)
    assert same_bits(mine, kept), "the result is the caller's own"


def test_every_dtype_and_any_memory():
    launch(rare_dtypes_and_memory, 3, timeout_s=60)


# ------------------------------------------------------------------------------------- gradients


def objective(z, seed):
    """Not linear, and every element of ``z`` meets every other."""
    weight = uniform(*z.shape, seed=seed)
    return (weight * z**3).sum() + (weight * z).sum() ** 2


def three_orders() -> None:
    mesh = line()
    rank, ranks = mesh.global_rank, range(mesh.world)
    for s in lengths(mesh.world):
        layout = Layout("b s/sp c", b=1, s=s, c=2)
        for before, after in REACHES[1::2]:
            for wait in (True, False) if before == 1 else (before < 50,):
                case = f"{s} items, {before} before, {after} after, wait={wait}"
                whole = uniform(1, s, 2).requires_grad_()
                x = part_of(whole.detach(), layout, places(mesh)).clone().requires_grad_()
                how = {"before": before, "after": after}
                z = (
                    halo(x, layout, mesh, "s", **how)
                    if wait
                    else halo(x, layout, mesh, "s", **how, wait=False).wait()
                )
                spans = [span(s, mesh.world, r, before, after) for r in ranks]
                truth = sum(objective(whole[:, slice(*at)], r) for r, at in enumerate(spans))
                mine = objective(z, rank)
                for order in (1, 2, 3):
                    (wanted,) = torch.autograd.grad(truth, whole, create_graph=True)
                    (got,) = torch.autograd.grad(mine, x, create_graph=True)
                    own = part_of(wanted, layout, places(mesh))
                    assert near(got, own, 1e-11), f"order {order}: {case}"
                    truth, mine = (wanted**2).sum(), (got**2).sum()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_of_every_order(world):
    launch(three_orders, world, timeout_s=60)


def the_adjoint() -> tuple[float, float]:
    mesh = line()
    layout = Layout("s/sp c", s=7, c=2)
    linear = Halo(layout, Link(mesh, "sp"), "s", 2, 3)
    x = part_of(uniform(7, 2), layout, places(mesh))
    z = linear.start(x)()
    y = uniform(*z.shape, seed=mesh.global_rank)
    back = linear.transpose().start(y)()
    assert linear.transpose().transpose() == linear
    return float((z * y).sum()), float((x * back).sum())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_transpose_is_the_adjoint(world):
    left, right = (sum(x) for x in zip(*launch(the_adjoint, world, timeout_s=60), strict=True))
    assert left == pytest.approx(right, rel=1e-12)


def convolution(x, weight, layout, mesh):
    """A causal convolution along s: zeros only at the beginning of the whole."""
    before = weight.shape[-1] - 1
    left, _ = halo_sizes(layout, mesh, "s", before=before, after=0)
    x = halo(x, layout, mesh, "s", before=before, after=0)
    return F.conv1d(F.pad(x, (before - left, 0)), weight)


def causal_convolutions() -> None:
    mesh = line()
    layout = Layout("b c s/sp", b=2, c=3, s=4 * mesh.world + 1)
    weight = uniform(5, 3, 6).requires_grad_()
    whole = uniform(*layout.global_shape, seed=1).requires_grad_()
    truth = F.conv1d(F.pad(whole, (5, 0)), weight)
    cotangent = uniform(*truth.shape, seed=2)
    wanted = torch.autograd.grad(truth, whole, cotangent)[0]
    out_layout = Layout("b c s/sp", b=2, c=5, s=4 * mesh.world + 1)
    for reentrant in (None, True, False):
        x = part_of(whole.detach(), layout, places(mesh)).clone().requires_grad_()
        run = partial(convolution, weight=weight, layout=layout, mesh=mesh)
        y = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
        assert near(y, part_of(truth, out_layout, places(mesh)))
        y.backward(part_of(cotangent, out_layout, places(mesh)))
        assert near(x.grad, part_of(wanted, layout, places(mesh)))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_causal_convolution_of_a_split_dim(world):
    launch(causal_convolutions, world, timeout_s=60)


def two_axes() -> None:
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    layout = Layout("b/dp s/sp c", b=3, s=5, c=2)
    whole, at = uniform(3, 5, 2), places(mesh)
    mine = part_of(whole, layout, at)
    got = halo(mine, layout, mesh, "s", before=1, after=1, axis="sp")
    rows = whole.tensor_split(2, 0)[at["dp"][0]]
    assert torch.equal(got, rows[:, :4] if at["sp"][0] == 0 else rows[:, 2:])


def test_other_dims_may_be_split_over_other_axes():
    launch(two_axes, 4, timeout_s=60)


# ------------------------------------------------------------------------------------ what is sent


def traffic() -> list[tuple[int, int, int]]:
    mesh, found = line(), []
    for before, after in REACHES:
        for s in (mesh.world - 1, 2 * mesh.world + 1):
            layout = Layout("s/sp c", s=s, c=3)
            x = part_of(uniform(s, 3), layout, places(mesh)).clone().requires_grad_()
            start = mesh.traffic.snapshot()
            y = halo(x, layout, mesh, "s", before=before, after=after)
            forward = mesh.traffic.since(start)
            y.sum().backward()
            both = mesh.traffic.since(start)
            found.append((forward.bytes_sent, both.bytes_sent, both.collectives))
    return found


@pytest.mark.parametrize("world", [2, 3, 5])
def test_only_what_is_asked_for_is_sent(world):
    by_rank = launch(traffic, world, timeout_s=60)
    cases = [(reach, s) for reach in REACHES for s in (world - 1, 2 * world + 1)]
    for n, ((before, after), s) in enumerate(cases):
        held = [(shard_offset(s, world, r), shard_size(s, world, r)) for r in range(world)]
        spans = [span(s, world, r, before, after) for r in range(world)]
        for r in range(world):
            theirs = range(held[r][0], sum(held[r]))
            asked = sum(p != r and a <= i < b for p, (a, b) in enumerate(spans) for i in theirs)
            got = spans[r][1] - spans[r][0] - held[r][1]
            forward, both, collectives = by_rank[r][n]
            assert forward == asked * 3 * 8
            assert both - forward == got * 3 * 8
            assert collectives == (2 if before + after else 0)


# -------------------------------------------------------------------------------------- refusals


ONE, FOUR = Mesh(sp=1, dp=1), Mesh(sp=4, dp=1)
SPLIT = Layout("s/sp c", s=8, c=3)


@pytest.mark.parametrize(
    ("arguments", "how", "words"),
    [
        ((torch.zeros(7, 3), SPLIT, ONE, "s"), {}, r"shape \(7, 3\) where layout .* \(8, 3\)"),
        ((torch.zeros(8, 3), SPLIT, FOUR, "s"), {}, r"local shape \(2, 3\)"),
        ((torch.zeros(8, 3), SPLIT, ONE, "c"), {}, "the dim is not split; write .* 'c/sp'"),
        ((torch.zeros(8, 3), SPLIT, ONE, "t"), {}, "has no dim 't'"),
        ((torch.zeros(8, 3), SPLIT, ONE, "s"), {"axis": "dp"}, "split over 'sp', not over 'dp'"),
        ((torch.zeros(8, 3), SPLIT, ONE, "s"), {"before": -1}, "before=-1, after=1: both are 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, how, words):
    with pytest.raises(LayoutError, match=words):
        halo(*arguments, **{"before": 1, "after": 1, **how})


def test_a_description_moves_nothing():
    with pytest.raises(MeshError, match="is only a description"):
        halo(torch.zeros(2, 3), SPLIT, FOUR, "s", before=1, after=0)
