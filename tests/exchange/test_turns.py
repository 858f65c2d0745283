"""Keys and values that cross the ranks in turns: the same numbers and bytes, less held."""

import itertools
import os

import pytest
import torch

from exchange.cases import Problem, checked, line, worst
from exchange.test_attention import MASKS, on_ranks, parts, ways
from hairpin.bench.virtual import virtual_attention
from hairpin.comm.mesh import Mesh
from hairpin.errors import SequenceError
from hairpin.exchange.api import attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.exchange.turns import ways as turns_of
from hairpin.run.launch import launch
from hairpin.run.profile import peak_cpu_bytes
from marks import slow

CAUSAL = Mask(causal=True)


def faults(problems, turns, *, order="zigzag", tolerance=1e-12, only=None) -> list[str]:
    """Every problem in every way, in so many turns; what is not equal to one process."""
    mesh, found = line(), []
    for problem, way, count in itertools.product(problems, ways(mesh.world), turns):
        if way["schedule"] == "rsa" or only not in (None, way["schedule"]):
            continue
        split = SequenceSplit(mesh, "sp", Order(order, problem.length), turns=count, **way)
        error, name = worst(checked(problem, split))
        if not error <= tolerance:
            found.append(f"{problem} {order} {way} in {count}: {name} off by {error:.1e}")
    return found


def masks_in_turns(order, turns):
    return faults([Problem(13, groups=2, mask=mask) for mask in MASKS.values()], turns, order=order)


@pytest.mark.parametrize(
    ("world", "order", "turns"),
    [
        (1, "zigzag", (4,)),
        (2, "striped", (5,)),
        (3, "zigzag", (2,)),
        slow(2, "striped", (2,)),
        slow(3, "zigzag", (6,)),
        slow(4, "zigzag", (2, 7)),
    ],
)
def test_every_method_and_mask_in_turns(world, order, turns):
    """Turns over two key heads, and over parts of their keys; some parts are empty."""
    on_ranks(masks_in_turns, world, order, turns)


def heads_in_turns():
    shapes = [(10, 10), (6, 3), (7, 1), (3, 3), (2, 1)]
    return faults([Problem(9, h, g, batch=1, mask=CAUSAL) for h, g in shapes], (2, 5), only="ring")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_heads_that_divide_neither_turns_nor_ranks(world):
    """Among them places whose query heads share key heads unevenly, and places without heads."""
    on_ranks(heads_in_turns, world)


def methods_in_turns():
    return faults([Problem(13, groups=2, mask=CAUSAL)], (2, 5))


def test_every_method_on_four_ranks():
    on_ranks(methods_in_turns, 4)


def beside_in_turns():
    biases = [(2, 4), (1, 1)]
    problems = [Problem(11, bias=b, mask=Mask(causal=b[0] == 1)) for b in biases]
    problems += [Problem(11, bias=(1, 4), hidden=True, groups=2, mask=CAUSAL)]
    problems += [Problem(n, mask=CAUSAL) for n in (0, 1, 2)]
    return faults(problems, (3, 8), only="ring")


def test_biases_that_learn_and_ranks_without_a_position():
    on_ranks(beside_in_turns, 3)


def narrow_in_turns():
    """bfloat16: gradients are added up in float32, whatever the turns."""
    found = faults([Problem(12, mask=CAUSAL, dtype=torch.bfloat16)], (1, 4, 8), tolerance=0.02)
    return found + faults([Problem(12, dtype=torch.float32)], (1, 4, 8), tolerance=5e-6)


def test_narrow_numbers():
    on_ranks(narrow_in_turns, 2)


def crossing_in_turns():
    mesh, found = line(), []
    for (length, keys), turns in itertools.product([(13, 5), (4, 21)], (2, 12)):
        split = SequenceSplit(mesh, "sp", Order("contiguous", length), turns=turns)
        problem = Problem(length, keys=keys)
        error, name = worst(checked(problem, split, Order("zigzag", keys)))
        if not error <= 1e-12:
            found.append(f"{length} x {keys} in {turns}: {name} off by {error:.1e}")
    return found


def test_queries_and_keys_of_two_sequences():
    on_ranks(crossing_in_turns, 3)


def dropped(mesh, turns):
    problem = Problem(12, groups=2, mask=CAUSAL)
    split = SequenceSplit(mesh, "sp", Order("zigzag", 12), turns=turns)
    held = parts(problem, split)
    out = attention(*held.values(), split, mask=problem.mask, dropout=0.4, seed=3)
    out.backward(problem.tensors()["grad"][:, :, split.positions])
    return split.positions, [out.detach(), *(x.grad for x in held.values())]


def dropout_in_turns():
    mesh, found = line(), []
    _, whole = dropped(Mesh(sp=1), 1)
    for turns in (2, 6):
        held, mine = dropped(mesh, turns)
        for i, (x, want) in enumerate(zip(mine, whole, strict=True)):
            if not torch.allclose(x, want[:, :, held], rtol=0, atol=1e-12):
                found.append(f"{turns} turns: tensor {i}")
    return found


def test_dropout_drops_the_same_weights_in_turns():
    on_ranks(dropout_in_turns, 3)


# ----------------------------------------------------------------------------- what is sent, held


def sent(problem: Problem, turns: int, schedule: str) -> list[tuple[int, int]]:
    """(bytes, messages) forward and backward."""
    mesh = line()
    order = Order("zigzag", problem.length)
    split = SequenceSplit(mesh, "sp", order, schedule=schedule, turns=turns)
    held = parts(problem, split)
    start = mesh.traffic.snapshot()
    out = attention(*held.values(), split, mask=problem.mask)
    middle = mesh.traffic.snapshot()
    out.sum().backward()
    spent = middle.since(start), mesh.traffic.since(middle)
    return [(each.bytes_sent, each.messages) for each in spent]


@pytest.mark.parametrize("schedule", ["ring", "all_gather"])
def test_as_many_bytes_in_more_messages(schedule):
    """P-1 hops of keys a turn, in the backward P-1 of gradients too; a gather keeps its keys."""
    world, problem = 4, Problem(64, groups=4, d=4, batch=1, mask=CAUSAL)
    kv = 2 * (64 // world) * 4 * 4 * 8
    for turns in (2, 8):
        hops = (world - 1) * turns
        back = 2 if schedule == "ring" else 1
        expected = [((world - 1) * kv, hops), (back * (world - 1) * kv, back * hops)]
        for counts in launch(sent, world, problem, turns, schedule):
            assert counts == expected


def most_held(turns: int) -> float:
    """Bytes at the peak of a layer, forward and backward, over those of q.

    Kernels are played, so that their scratch does not count.
    """
    rows, heads, d = 512, 4, 32
    world = int(os.environ["WORLD_SIZE"])
    split = SequenceSplit(line(), "sp", Order("contiguous", rows * world), turns=turns)

    def step():
        q, k, v = (torch.randn(1, rows, heads, d).transpose(1, 2) for _ in range(3))
        grad = torch.randn(1, rows, heads, d).transpose(1, 2)
        attention(*(x.requires_grad_() for x in (q, k, v)), split).backward(grad)

    with virtual_attention(1e15):
        step()
        return peak_cpu_bytes(step) / (rows * heads * d * 4)


def test_a_turn_holds_its_share_of_what_passes_by():
    """Of q's bytes: 8 are inputs, output and gradients; 11 / turns pass by or are added up.

    Two blocks of keys and values, two of their gradients, and three terms that a kernel gives.
    """
    alone = launch(most_held, 1, 1)[0]
    assert alone == pytest.approx(8, abs=0.15)  # and log-sum-exps
    held = {turns: max(launch(most_held, 4, turns)) for turns in (1, 4, 32)}
    for turns, most in held.items():
        assert most == pytest.approx(8 + 11 / turns, abs=0.3)
    assert alone / held[32] >= 0.9, "as many positions a rank, but for a tenth, as one rank has"


@pytest.mark.parametrize(
    ("turns", "groups", "expected"),
    [
        (1, 4, (1, 1)),
        (3, 4, (3, 1)),
        (4, 4, (4, 1)),
        (5, 4, (4, 2)),
        (16, 4, (4, 4)),
        (3, 0, (1, 3)),
    ],
)
def test_turns_cut_heads_first(turns, groups, expected):
    assert turns_of(turns, groups) == expected


@pytest.mark.parametrize("change", [{"turns": 0}, {"turns": 2, "schedule": "rsa"}])
def test_turns_that_cannot_be(change):
    with pytest.raises(SequenceError, match=f"turns={change['turns']} of schedule"):
        SequenceSplit(Mesh(sp=2), "sp", Order("contiguous", 4), **change)
