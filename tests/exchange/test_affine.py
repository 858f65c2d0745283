"""The prefix of affine states over ranks: values, gradients of two orders, bytes, refusals."""

import pytest
import torch

from comm.cases import line, near, uniform
from hairpin.comm.mesh import init_mesh
from hairpin.comm.transport import Link
from hairpin.errors import LayoutError
from hairpin.exchange.affine import SCHEDULES, bytes_sent, start_prefix
from hairpin.run.launch import launch
from marks import slow

WORLDS = (1, 2, 3, slow(4), 5, slow(6), 8)
DECAYS = {"none": None, "number": (1, 1, 1, 1), "head": (1, 3, 1, 1), "channel": (2, 3, 4, 1)}
STATE = (2, 3, 4, 5)


def leaves(world, decay, *, seed=0):
    """States and decays of all ranks; one rank forgets all, one keeps all."""
    states = [uniform(*STATE, seed=seed + r).requires_grad_() for r in range(world)]
    if DECAYS[decay] is None:
        return states, [None] * world
    decays = [uniform(*DECAYS[decay], seed=seed + 50 + r).sigmoid() for r in range(world)]
    decays[world // 2] = torch.zeros_like(decays[0])
    decays[-1] = torch.ones_like(decays[0])
    return states, [d.requires_grad_() for d in decays]


def prefix(states, decays, *, backward):
    """The sum as it is defined, for every rank."""
    order = range(len(states))[::-1] if backward else range(len(states))
    incoming, found = torch.zeros_like(states[0]), {}
    for r in order:
        found[r] = incoming
        incoming = states[r] + (incoming if decays[r] is None else decays[r] * incoming)
    return found


def prefixes() -> None:
    mesh = line()
    rank, world = mesh.global_rank, mesh.world
    link = Link(mesh, "sp")
    for schedule in SCHEDULES:
        for kind in DECAYS if world <= 4 else ("none", "channel"):
            for backward in (False, True):
                case = f"{schedule} {kind} backward={backward}"
                states, decays = leaves(world, kind)
                truth = prefix(states, decays, backward=backward)
                mine = [
                    x if x is None else x.detach().clone().requires_grad_()
                    for x in (states[rank], decays[rank])
                ]
                got = start_prefix(*mine, link, schedule=schedule, backward=backward).wait()
                assert near(got, truth[rank]), case
                check_gradients(got, truth, mine, states, decays, rank, case)


def check_gradients(got, truth, mine, states, decays, rank, case):
    """First and second order, of an objective in which every element meets every other."""
    weights = [uniform(*STATE, seed=90 + r) for r in truth]
    every = [x for x in (*states, *decays) if x is not None]
    learning = [x for x in mine if x is not None]
    own = [n for n, x in enumerate(every) if x is states[rank] or x is decays[rank]]
    wanted = sum((weights[r] * x**2).sum() + x.sum() ** 2 for r, x in truth.items()) + cubes(every)
    ours = (weights[rank] * got**2).sum() + got.sum() ** 2 + cubes(learning)
    for order in (1, 2) if len(states) <= 4 else (1,):
        theirs = torch.autograd.grad(wanted, every, create_graph=True)
        found = torch.autograd.grad(ours, learning, create_graph=True)
        for a, n in zip(found, own, strict=True):
            assert near(a, theirs[n], 1e-11), f"order {order}: {case}"
        wanted, ours = (sum((x**2).sum() for x in grads) for grads in (theirs, found))


def cubes(xs):
    """Joins every leaf to the objective, also where no state comes in."""
    return sum((x**3).sum() for x in xs)


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_gets_what_its_predecessors_hand_on(world):
    launch(prefixes, world, timeout_s=60)


def what_is_sent() -> list[tuple]:
    mesh = line()
    found = []
    for schedule in SCHEDULES:
        for kind in ("none", "channel"):
            for dtype in (torch.float32, torch.float64):
                (state, *_), (decay, *_) = leaves(1, kind)
                state = state.detach().to(dtype).requires_grad_()
                decay = None if decay is None else decay.detach().to(dtype)
                before = mesh.traffic.snapshot()
                got = start_prefix(state, decay, Link(mesh, "sp"), schedule=schedule).wait()
                forward = mesh.traffic.since(before)
                before = mesh.traffic.snapshot()
                got.sum().backward()
                sizes = [0 if x is None else x.nbytes for x in (state, decay)]
                found.append((schedule, sizes, forward, mesh.traffic.since(before)))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_bytes_and_messages_are_those_of_the_formula(world):
    for rank, found in enumerate(launch(what_is_sent, world, timeout_s=60)):
        for schedule, sizes, forward, backward in found:
            behind = world - 1 - rank
            assert forward.bytes_sent == bytes_sent(schedule, world, rank, *sizes)
            assert backward.bytes_sent == bytes_sent(schedule, world, behind, *sizes)
            if schedule == "chain":
                assert forward.bytes_sent == (sizes[0] if behind else 0)
                assert forward.messages == (behind > 0)
                assert forward.collectives == (rank > 0) + (behind > 0)
            elif schedule == "all_gather":
                assert forward.bytes_sent + backward.bytes_sent == sum(sizes) * (world - 1)
                assert forward.messages == behind
                assert forward.collectives == (world > 1)
            else:
                rounds = [step for step in (1, 2, 4) if step < world]
                assert forward.messages == sum(step <= behind for step in rounds)
                assert forward.collectives == sum(step <= max(behind, rank) for step in rounds)
            assert forward.control_bytes == 0


def two_at_once() -> None:
    """Both ways under way together, for two states, on one axis of two."""
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    link, rank = Link(mesh, "sp"), mesh.rank("sp")
    states = {n: uniform(*STATE, seed=n + 10 * mesh.rank("dp")) for n in range(4)}
    for schedule in SCHEDULES:
        started = [
            start_prefix(states[2 * n + rank], None, link, schedule=schedule, backward=backward)
            for n in (0, 1)
            for backward in (False, True)
        ]
        got = [pending.wait() for pending in started]
        for n in (0, 1):
            earlier, later = got[2 * n], got[2 * n + 1]
            assert torch.equal(earlier, states[2 * n] if rank else torch.zeros(STATE).double())
            assert torch.equal(later, torch.zeros(STATE).double() if rank else states[2 * n + 1])


def test_several_are_under_way_on_one_axis():
    launch(two_at_once, 4, timeout_s=60)


def test_a_decay_that_does_not_fit_is_refused():
    link = Link(init_mesh(sp=1), "sp")
    state = torch.zeros(1, 2, 3, 4)
    with pytest.raises(LayoutError, match=r"decay of shape \(3, 1, 1\), torch.float32 cannot mult"):
        start_prefix(state, torch.ones(3, 1, 1), link)
    with pytest.raises(LayoutError, match=r"torch\.float64 cannot multiply .* torch\.float32"):
        start_prefix(state, torch.ones(2, 1, 1).double(), link)
    with pytest.raises(LayoutError, match="schedule='ring': write one of 'chain', 'all_gather'"):
        start_prefix(state, None, link, schedule="ring")
