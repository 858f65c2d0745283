"""Transfers that are started now and awaited later, in another order, twice, or never."""

import gc

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from comm.cases import line, near, part_of, places, uniform
from hairpin.layout import Layout
from hairpin.run.launch import launch

FRAMES, PATCHES = Layout("t/sp s", t=7, s=5), Layout("t s/sp", t=7, s=5)


def mine(mesh, seed=0):
    return part_of(uniform(7, 5, seed=seed), FRAMES, places(mesh)).clone()


def awaited_twice() -> None:
    mesh = line()
    x = mine(mesh).requires_grad_()
    pending = hp.switch(x, FRAMES, PATCHES, mesh, wait=False)
    assert isinstance(pending, hp.Pending)
    first, second = pending.wait(), pending.wait()
    assert first is second
    (first.sum() + (second**2).sum()).backward()
    want = part_of(1 + 2 * uniform(7, 5), FRAMES, places(mesh))
    assert near(x.grad, want)
    assert mesh.traffic.collectives == (2 if mesh.world > 1 else 0)  # there, and back once


@pytest.mark.parametrize("world", [1, 2, 3])
def test_wait_gives_the_same_result_again(world):
    launch(awaited_twice, world, timeout_s=60)


def out_of_order() -> None:
    mesh = line()
    xs = [mine(mesh, seed).requires_grad_() for seed in range(4)]
    flights = [hp.switch(x, FRAMES, PATCHES, mesh, wait=False) for x in xs]
    flights.append(hp.gather(xs[0], FRAMES, mesh, grad="partial", wait=False))
    now = hp.switch(xs[1], FRAMES, PATCHES, mesh)  # another one, while five are under way
    wanted = [part_of(uniform(7, 5, seed=seed), PATCHES, places(mesh)) for seed in range(4)]
    wanted.append(uniform(7, 5))
    for index in (4, 2, 0, 3, 1):
        assert torch.equal(flights[index].wait(), wanted[index])
    assert torch.equal(now, wanted[1])
    sum((k + 1) * flights[k].wait().sum() for k in (3, 0, 2, 1)).backward()
    for k, x in enumerate(xs):
        assert torch.equal(x.grad, torch.full_like(x, k + 1))


@pytest.mark.parametrize("world", [2, 3])
def test_many_under_way_and_awaited_in_any_order(world):
    launch(out_of_order, world, timeout_s=60)


def dropped(side: int, *, of_torch: bool) -> None:
    mesh = line(timeout_s=10)
    if of_torch:
        mesh = init_device_mesh("cpu", (mesh.world,), mesh_dim_names=("sp",))
    src, dst = Layout("t/sp s", t=side, s=side), Layout("t s/sp", t=side, s=side)
    whole = torch.arange(side * side, dtype=torch.float32).view(side, side)
    x = hp.scatter(whole, src, mesh)
    want = hp.scatter(whole, dst, mesh)
    for turn in range(20):
        hp.switch(x - 1000, src, dst, mesh, wait=False)  # nobody awaits it
        if turn % 5 == 0:
            gc.collect()
        assert torch.equal(hp.switch(x, src, dst, mesh), want), turn


@pytest.mark.parametrize("side", [16, pytest.param(700, marks=pytest.mark.slow)])
def test_one_that_nobody_awaits_disturbs_no_other(side):
    launch(dropped, 2, side, of_torch=False, timeout_s=60)


def test_one_that_nobody_awaits_on_a_mesh_of_torch():
    launch(dropped, 2, 700, of_torch=True, timeout_s=60)


def dropped_with_gradients() -> None:
    mesh = line(timeout_s=10)
    x = mine(mesh).requires_grad_()
    for _ in range(5):
        hp.switch(x * 2, FRAMES, PATCHES, mesh, wait=False)
        unused = hp.switch(x * 3, FRAMES, PATCHES, mesh, wait=False).wait()
        y = hp.switch(x, FRAMES, PATCHES, mesh, wait=False).wait()
        y.sum().backward()
        del unused
    assert torch.equal(x.grad, torch.full_like(x, 5))


def test_one_that_nobody_uses_has_no_gradient():
    launch(dropped_with_gradients, 2, timeout_s=60)


def first_seen_without_gradients() -> None:
    mesh = line()
    x = mine(mesh).requires_grad_()
    pending = hp.switch(x, FRAMES, PATCHES, mesh, wait=False)
    with torch.no_grad():
        pending.wait()  # a look at it
    (pending.wait() ** 2).sum().backward()
    assert near(x.grad, 2 * mine(mesh))


def test_a_look_under_no_grad_does_not_lose_the_gradient():
    launch(first_seen_without_gradients, 2, timeout_s=60)


def started_outside_a_checkpoint() -> None:
    mesh = line()
    for reentrant in (False, True):
        x = mine(mesh).requires_grad_()
        pending = hp.switch(x, FRAMES, PATCHES, mesh, wait=False)
        other = uniform(1).requires_grad_()
        y = checkpoint(lambda o, p=pending: (p.wait() * o).tanh(), other, use_reentrant=reentrant)
        y.sum().backward()
        whole = uniform(7, 5).requires_grad_()
        (whole * uniform(1)).tanh().sum().backward()
        want = part_of(whole.grad, FRAMES, places(mesh))
        assert x.grad is not None, f"reentrant={reentrant}: the gradient was lost"
        assert near(x.grad, want), f"reentrant={reentrant}"


def test_started_outside_a_checkpoint_and_awaited_inside():
    launch(started_outside_a_checkpoint, 2, timeout_s=60)
