"""Attention along a split sequence: values and all gradients on all ranks, against one process."""

import dataclasses
import itertools
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from exchange.cases import WIDE, Problem, checked, line, truth, worst
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.exchange.api import attention
from hairpin.exchange.mask import BlockSparse, Mask
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.exchange.stream import put_together, take
from hairpin.run.launch import launch

ORDERS = ("contiguous", "zigzag", "striped")


def ways(ranks: int) -> list[dict]:
    """Every way to split a sequence over so many ranks: degrees, schedules, placements."""
    found = []
    for heads in (u for u in range(1, ranks + 1) if ranks % u == 0):
        ring = ranks // heads
        inners = [i for i in range(1, ring + 1) if ring % i == 0]
        plans = [("ring", 1), ("all_gather", 1)] + ([("rsa", 1)] if heads == 1 else [])
        plans += [(s, i) for s in ("double_ring", "hierarchical") for i in inners if 1 < i < ring]
        sides = (True, False) if 1 < heads < ranks else (True,)
        found += [
            {"heads": heads, "schedule": schedule, "inner": inner, "heads_inside": inside}
            for (schedule, inner), inside in itertools.product(plans, sides)
        ]
    return found


def faults(problems, *, orders=ORDERS, tolerance=1e-12, only=None) -> list[str]:
    """Runs every problem in every way on the ranks there are; what is not equal to one process."""
    mesh = line()
    found = []
    for problem, way, order in itertools.product(problems, ways(mesh.world), orders):
        if (only is not None and way["schedule"] not in only) or (
            way["schedule"] == "rsa" and problem.bias is not None
        ):
            continue
        split = SequenceSplit(mesh, "sp", Order(order, problem.length), **way)
        error, name = worst(checked(problem, split))
        if not error <= tolerance:
            found.append(f"{problem} {order} {way}: {name} off by {error:.1e}")
    return found


def on_ranks(function, world: int, *args) -> None:
    """Every rank must find nothing."""
    for rank, found in enumerate(launch(function, world, *args)):
        assert found == [], f"rank {rank} of {world}"


def some_blocks(length, keys, size):
    """Some blocks; the queries of the second one see none."""
    made = torch.Generator().manual_seed(length + keys + size)
    table = torch.rand(-(-length // size), -(-keys // size), generator=made) > 0.4
    table[1] = False
    return BlockSparse(size, table)


MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(window=3),
    "causal window": Mask(causal=True, window=4),
    "prefix": Mask(causal=True, prefix=2),
    "documents": Mask(causal=True, documents=(6, 1, 0, 6)),
    "documents, both ways": Mask(documents=(1, 10, 2)),
    "blocks": Mask(blocks=some_blocks(13, 13, 3)),
    "causal blocks": Mask(causal=True, blocks=some_blocks(13, 13, 4)),
    "blocks in documents": Mask(window=5, documents=(6, 7), blocks=some_blocks(13, 13, 2)),
}


def masks_on_ranks(orders, names):
    problems = [Problem(13, groups=2, mask=MASKS[name]) for name in names]
    return faults(problems, orders=orders)


@pytest.mark.parametrize("world", [1, 2])
def test_every_method_order_and_mask_equals_one_process(world):
    on_ranks(masks_on_ranks, world, ORDERS, list(MASKS))


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_every_method_order_and_mask_on_three_and_four_ranks(world):
    on_ranks(masks_on_ranks, world, ORDERS, list(MASKS))


def test_every_method_and_mask_on_three_ranks():
    on_ranks(masks_on_ranks, 3, ("zigzag",), list(MASKS))


def test_every_method_on_four_ranks():
    on_ranks(masks_on_ranks, 4, ("zigzag",), ["causal", "window", "documents", "causal blocks"])


def block_lengths():
    world = int(os.environ["WORLD_SIZE"])
    problems = [
        Problem(n, groups=2, mask=Mask(causal=causal, blocks=some_blocks(n, n, 2)))
        for n, causal in itertools.product((world + 2, 2 * world + 1), (0, 1))
    ]
    wide = Mask(causal=True, blocks=some_blocks(150, 150, 32))
    problems += [Problem(150, mask=wide, hidden=True), Problem(150, mask=wide, bias=(1, 4))]
    return faults(problems, orders=("zigzag", "contiguous"), only=("ring", "all_gather"))


@pytest.mark.parametrize("world", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_blocks_of_positions_that_divide_nothing(world):
    """Beside hidden keys and biases too; a rank may hold no position of a block."""
    on_ranks(block_lengths, world)


def lengths_on_ranks():
    world = int(os.environ["WORLD_SIZE"])
    lengths = (0, 1, world - 1, world + 1, 2 * world + 1)
    problems = [Problem(n, 8, 2, mask=Mask(causal=causal)) for n in lengths for causal in (0, 1)]
    return faults(problems, orders=("zigzag",), only=("ring", "all_gather"))


@pytest.mark.parametrize("world", [2, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_lengths_that_divide_nothing_and_ranks_without_a_position(world):
    on_ranks(lengths_on_ranks, world)


def many_ranks():
    return faults([Problem(23, mask=Mask(causal=True))], orders=("zigzag",))


@pytest.mark.parametrize("world", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_every_method_on_six_and_eight_ranks(world):
    on_ranks(many_ranks, world)


HEADS = [(30, 30), (8, 2), (7, 1), (6, 2), (3, 3), (2, 1)]


def heads_on_ranks():
    problems = [Problem(9, h, g, mask=Mask(causal=True)) for h, g in HEADS]
    return faults(problems, orders=("zigzag",), only=("ring",))


@pytest.mark.parametrize("world", [3, 4])
def test_heads_that_do_not_divide_the_ranks(world):
    """30 over 4, grouped and multi-query heads, fewer heads than ranks."""
    on_ranks(heads_on_ranks, world)


def beside_on_ranks():
    biases = [(2, 4), (1, 4), (2, 1), (1, 1)]
    problems = [Problem(11, bias=b, mask=Mask(causal=b[0] == 1)) for b in biases]
    problems += [
        Problem(11, hidden=True, mask=mask)
        for mask in MASKS.values()
        if not (mask.documents or mask.blocks)
    ]
    problems += [Problem(11, bias=(1, 4), hidden=True, groups=2, mask=Mask(causal=True))]
    return faults(problems, orders=("zigzag",))


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_biases_that_learn_and_keys_that_do_not_count(world):
    """One row of the batch has no key at all: its output is 0 and nothing is NaN."""
    on_ranks(beside_on_ranks, world)


def wide_gaps():
    """Scores so far apart that a merge without care would overflow: log-sum-exps differ by 200."""
    return faults([Problem(12, spread=9.0, mask=Mask(causal=c)) for c in (False, True)])


def test_scores_that_are_far_apart():
    on_ranks(wide_gaps, 3)


def crossing():
    mesh, found = line(), []
    for (length, keys), way in itertools.product([(13, 5), (4, 21)], ways(mesh.world)):
        split = SequenceSplit(mesh, "sp", Order("contiguous", length), **way)
        for mask in (Mask(), Mask(blocks=some_blocks(length, keys, 2))):
            problem = Problem(length, groups=2, keys=keys, mask=mask)
            error, name = worst(checked(problem, split, Order("contiguous", keys)))
            if not error <= 1e-12:
                found.append(f"{length} x {keys} {mask} {way}: {name} off by {error:.1e}")
    return found


@pytest.mark.parametrize("world", [1, 3, 4])
def test_queries_of_one_sequence_and_keys_of_another(world):
    on_ranks(crossing, world)


def documents_zigzag():
    mesh, found = line(), []
    for documents in ((5, 1, 9), (2,), (1, 1, 1), (16, 0, 3)):
        order = Order("documents", sum(documents), documents)
        split = SequenceSplit(mesh, "sp", order)
        problem = Problem(sum(documents), mask=Mask(causal=True, documents=documents))
        error, name = worst(checked(problem, split))
        if not error <= 1e-12:
            found.append(f"{documents}: {name} off by {error:.1e}")
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_documents_dealt_each_in_zigzag(world):
    """Documents shorter than the world among them."""
    on_ranks(documents_zigzag, world)


def in_float32():
    problems = [Problem(33, groups=2, d=8, dtype=torch.float32, mask=Mask(causal=True))]
    return faults(problems, orders=("zigzag",), tolerance=5e-6)


def test_in_float32():
    on_ranks(in_float32, 4)


def bf16_errors():
    """By method: squared errors of this rank's part, and of the single kernel's whole."""
    mesh = line()
    problem = Problem(96, 4, 2, d=16, dtype=torch.bfloat16, mask=Mask(causal=True))
    alone = Mesh(sp=1)
    found = []
    for way in ways(mesh.world):
        split = SequenceSplit(mesh, "sp", Order("zigzag", problem.length), **way)
        single = SequenceSplit(alone, "sp", Order("contiguous", problem.length))
        one, many = checked(problem, single), checked(problem, split)
        want = truth(problem)
        for name in ("out", "q", "k", "v"):
            error = (one["got"][name].to(WIDE) - want[name]).square().sum()
            mine = (many["got"][name].to(WIDE) - many["want"][name]).square().sum()
            found.append((way, name, float(mine), float(error)))
    return found


def test_bfloat16_errs_no_more_than_one_kernel_does():
    results = launch(bf16_errors, 4)
    for each in zip(*results, strict=True):
        way, name, _, single = each[0]
        split = sum(error for _, _, error, _ in each)
        assert split <= 1.5**2 * single, (way, name, split, single)


def parts(problem, split):
    whole = problem.tensors()
    return {n: whole[n][:, :, split.positions].clone().requires_grad_() for n in ("q", "k", "v")}


def checkpointed():
    mesh, found = line(), []
    problem = Problem(11, groups=2, mask=Mask(causal=True))
    for way, reentrant in itertools.product(ways(mesh.world), (False, True)):
        split = SequenceSplit(mesh, "sp", Order("zigzag", 11), **way)
        grads = []
        for again in (False, True):
            held = parts(problem, split)

            def run(q, k, v, split=split):
                return attention(q, k, v, split, mask=problem.mask)

            out = (
                checkpoint(run, *held.values(), use_reentrant=reentrant)
                if again
                else run(*held.values())
            )
            out.square().sum().backward()
            grads.append([x.grad for x in held.values()])
        if not all(map(torch.equal, *grads)):
            found.append(f"{way} reentrant={reentrant}")
    return found


def test_both_kinds_of_checkpointing_change_no_bit():
    on_ranks(checkpointed, 4)


def dropped(mesh, way, seed=3):
    problem = Problem(12, groups=2, mask=Mask(causal=True))
    split = SequenceSplit(mesh, "sp", Order("zigzag", 12), **way)
    held = parts(problem, split)
    out = attention(*held.values(), split, mask=problem.mask, dropout=0.4, seed=seed)
    out.backward(problem.tensors()["grad"][:, :, split.positions])
    return split.positions, {"out": out.detach(), **{n: x.grad for n, x in held.items()}}


def dropout_on_ranks():
    mesh, found = line(), []
    _, whole = dropped(Mesh(sp=1), {})
    for way in ways(mesh.world):
        if way["schedule"] == "rsa":
            continue
        held, mine = dropped(mesh, way)
        for name, x in mine.items():
            if not torch.allclose(x, whole[name][:, :, held], rtol=0, atol=1e-12):
                found.append(f"{way}: {name}")
    return found


def test_dropout_drops_the_same_weights_on_any_number_of_ranks():
    on_ranks(dropout_on_ranks, 4)


def test_dropout_drops_the_share_it_is_asked_to():
    problem = Problem(64, 2, 2, batch=1)
    whole = problem.tensors()
    split = SequenceSplit(Mesh(sp=1), "sp", Order("contiguous", 64))
    q = torch.zeros_like(whole["q"])  # equal weights, so the output is the mean of what is kept
    v = torch.ones_like(whole["v"])
    outs = [attention(q, whole["k"], v, split, dropout=0.25, seed=s) for s in range(2)]
    assert abs(float(outs[0].mean()) - 1.0) < 0.02
    assert float(outs[0].std()) > 0.03
    assert not torch.equal(*outs)


# ------------------------------------------------------------------------------------- what is sent


def sent(way: dict, problem: Problem) -> list[tuple[int, int, int]]:
    """(bytes, messages, collectives) of the forward, and of the backward, on this rank."""
    mesh = line()
    split = SequenceSplit(mesh, "sp", Order("zigzag", problem.length), **way)
    held = parts(problem, split)
    counts = []
    start = mesh.traffic.snapshot()
    out = attention(*held.values(), split, mask=problem.mask)
    middle = mesh.traffic.snapshot()
    out.sum().backward()
    for now, before in ((middle, start), (mesh.traffic.snapshot(), middle)):
        spent = now.since(before)
        counts.append((spent.bytes_sent, spent.messages, spent.collectives))
    return counts


@pytest.mark.parametrize(
    ("world", "groups"), [(4, 8), (4, 2), (8, 2), pytest.param(8, 8, marks=pytest.mark.slow)]
)
def test_bytes_and_collectives_are_those_of_the_formulas(world, groups):
    """SYSTEMS.md 4-7: of ring, all-gather, Ulysses and USP, forward and backward, to the byte."""
    h, d, length, b = 8, 4, 64, 8  # float64
    s, p = length // world, world
    problem = Problem(length, h, groups, d=d, batch=1, mask=Mask(causal=True))
    kv = 2 * s * groups * d * b
    turned = (p - 1) * s * (h // p) * d * b  # one head set of this rank's rows to every other
    key_heads = max(groups // p, 1) * 2 * (p - 1) * s * d * b  # only what is needed
    expected = {
        "ring": ((p - 1) * kv, 2 * (p - 1) * kv, p - 1, 2 * (p - 1)),
        "all_gather": ((p - 1) * kv, (p - 1) * kv, 1, 1),
    }
    for schedule, (forward, backward, rounds, rounds_back) in expected.items():
        for counts in launch(sent, world, {"schedule": schedule}, problem):
            assert counts[0][0] == forward
            assert counts[1][0] == backward
            assert (counts[0][2], counts[1][2]) == (rounds, rounds_back)
    for counts in launch(sent, world, {"heads": world}, problem):
        assert counts[0][0] == 2 * turned + key_heads
        assert counts[0][2] == 2
        assert counts[1][2] == 2
    total = sum(counts[1][0] for counts in launch(sent, world, {"heads": world}, problem))
    assert total == world * (2 * turned + key_heads)


def test_usp_sends_what_its_two_parts_send():
    h, d, length, b, u, r = 8, 4, 64, 8, 2, 2
    s = length // (u * r)
    problem = Problem(length, h, h, d=d, batch=1)
    forward = (u - 1) * s * 4 * (h // u) * d * b + (r - 1) * 2 * (u * s) * (h // u) * d * b
    for inside in (True, False):
        for counts in launch(sent, 4, {"heads": u, "heads_inside": inside}, problem):
            assert counts[0][0] == forward


def rsa_sent():
    problem = Problem(16, 2, 2, d=4, batch=1)
    return sent({"schedule": "rsa"}, problem)


def test_ring_self_attention_sends_what_was_published():
    """2 (P-1) s H D forward; in the backward two rings and two all-reduces."""
    block = 4 * 2 * 4 * 8
    for counts in launch(rsa_sent, 4):
        assert counts[0][0] == 2 * 3 * block
        assert counts[1][0] == 2 * 3 * block + 2 * 2 * 3 * block


# ------------------------------------------------------------------------------------ bad input


def a_split(ranks=4, length=16, **way):
    return SequenceSplit(Mesh(sp=ranks), "sp", Order("contiguous", length), **way)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "heads=3 does not divide the 4 ranks"),
        ({"heads": 0}, "heads=0"),
        ({"inner": 3, "schedule": "double_ring"}, "inner=3 does not divide the 4 ring places"),
        ({"schedule": "circle"}, "write one of ring, double_ring"),
        ({"schedule": "rsa", "heads": 2}, "give heads=1"),
    ],
)
def test_splits_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        a_split(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window=0"),
        ({"documents": (3, -1)}, "lengths are 0 or more"),
        ({"prefix": 2, "window": 3}, "leaves gaps"),
        ({"prefix": 2, "blocks": some_blocks(4, 4, 2)}, "leaves gaps"),
    ],
)
def test_masks_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        Mask(**change)


@pytest.mark.parametrize(
    ("size", "table", "words"),
    [
        (0, torch.ones(2, 2, dtype=torch.bool), "block_size=0"),
        (4, torch.ones(2, 2), r"torch.float32 \(2, 2\); give a bool tensor"),
        (4, torch.ones(3, dtype=torch.bool), r"torch.bool \(3,\)"),
        (4, [[True]], r"\[\[True\]\]; give a bool tensor"),
    ],
)
def test_blocks_that_cannot_be(size, table, words):
    with pytest.raises(ValueError, match=words):
        BlockSparse(size, table)


def test_equal_blocks_are_one_mask():
    one, other = (Mask(blocks=some_blocks(13, 13, 3)) for _ in range(2))
    assert one == other
    assert len({one, other, Mask(blocks=some_blocks(13, 13, 2))}) == 2
    assert "5 x 5 blocks of 3" in repr(one)


def test_orders_that_cannot_be():
    with pytest.raises(ValueError, match="write one of contiguous"):
        Order("spiral", 4)
    with pytest.raises(ValueError, match="the sequence 4"):
        Order("documents", 4, (1, 2))
    with pytest.raises(ValueError, match="length -1"):
        Order("zigzag", -1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 4, 5, 8)}, "holds 4 of 16 positions"),
        ({"k": (2, 3, 4, 8), "v": (2, 3, 4, 8)}, "4 query heads over 3 key/value heads"),
        ({"k": (1, 4, 4, 8)}, "q and k share batch"),
        ({"mask": Mask(documents=(3, 4))}, "the documents have 7 positions"),
        ({"mask": Mask(blocks=some_blocks(16, 12, 4))}, r"is \[4, 3\]; .* need \[4, 4\]"),
        ({"bias": (1, 4, 4, 15)}, r"\[2 or 1, 4 or 1, 4, 16\]"),
        ({"key_mask": (2, 5)}, r"bool \[2, 4\]"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"v": torch.float64}, "give all in one floating-point dtype"),
    ],
)
def test_calls_that_cannot_be_right_are_refused_before_anything_is_sent(change, words):
    """On a mesh that is only a description: anything sent would be another error."""
    shapes = {"q": (2, 4, 4, 8), "k": (2, 4, 4, 8), "v": (2, 4, 4, 8)}
    tensors = {n: torch.zeros(shape) for n, shape in shapes.items()}
    beside = {}
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            tensors[name] = tensors[name].to(value)
        elif isinstance(value, tuple):
            made = torch.zeros(value)
            (tensors if name in tensors else beside)[name] = made.bool() if "mask" in name else made
        else:
            beside[name] = value
    with pytest.raises(ValueError, match=words):
        attention(*tensors.values(), a_split(), **beside)


def test_a_second_derivative_is_refused():
    split = SequenceSplit(Mesh(sp=1), "sp", Order("contiguous", 3))
    x = torch.randn(1, 1, 3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(x, x, x, split).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def two_axes():
    """The sequence on one axis of a mesh of two, other data along the other."""
    mesh = init_mesh(dp=2, sp=2, timeout_s=30)
    problem = dataclasses.replace(Problem(9, mask=Mask(causal=True)), heads=4)
    split = SequenceSplit(mesh, "sp", Order("zigzag", 9), heads=1)
    error, name = worst(checked(problem, split))
    return [] if error <= 1e-12 else [f"{name} {error}"]


def test_on_one_axis_of_two():
    on_ranks(two_axes, 4)


def evaluated_first():
    """Gradients of a split that was first used for inference, and of another that was not."""
    mesh, found = line(), []
    made = torch.Generator().manual_seed(0)
    whole = torch.randn(1, 4, 24, 8, dtype=WIDE, generator=made)
    for way in ({}, {"turns": 3}, {"heads": 2}, {"order": "striped"}):
        options = {"order": "zigzag"} | way
        order = Order(options.pop("order"), 24)
        mask = Mask(causal=True, blocks=BlockSparse(6, torch.ones(4, 4).tril() > 0))
        fresh, used = (SequenceSplit(mesh, "sp", order, **options) for _ in range(2))
        with torch.inference_mode():
            part = take(whole, used, 2)
            attention(part, part, part, used, mask=mask)
            put_together(part, used, 2, grad="replicated")
        grads = []
        for split in (fresh, used):
            x = whole.clone().requires_grad_()
            part = take(x, split, 2)
            y = attention(part, part, part, split, mask=mask, dropout=0.1)
            put_together(y, split, 2, grad="replicated").square().sum().backward()
            grads.append(x.grad)
        kept = [used.positions, *(t for call in used.calls.values() for t in call.keys.values())]
        if not torch.equal(*grads) or any(t.is_inference() for t in kept):
            found.append(str(way))
    return found


def test_a_split_that_evaluated_under_inference_mode_trains_afterwards():
    on_ranks(evaluated_first, 2)
