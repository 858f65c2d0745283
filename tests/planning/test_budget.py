"""A budget is kept to the byte: certified, measured and promised peaks are one number."""

import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

import hairpin as hp
from hairpin.run.profile import peak_cpu_bytes
from marks import slow
from planning.looping import Block, Stack, difference, looped, mixed


def floor_of(model, args):
    with pytest.raises(hp.MemoryBudgetError) as refused:
        hp.plan(model, args, memory=1)
    return refused.value.floor_bytes


def require_kept(model, args, budget_bytes):
    """The plan's peak is the profiler's, within the budget, and the numbers are eager's."""
    plan = hp.plan(model, args, memory=budget_bytes)
    with torch.no_grad():
        expected = tree_leaves(model(*args))
        hp.parallelize(model, plan)
        try:
            got = tree_leaves(model(*args))
            measured = peak_cpu_bytes(lambda: model(*args))
        finally:
            hp.detach(model)
    assert difference(got, expected, 1e-12) is None
    assert measured == plan.peak_bytes
    assert measured <= budget_bytes


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_random_models_keep_to_random_budgets(seed):
    model, args, _ = mixed(seed)
    with torch.no_grad():
        peak = peak_cpu_bytes(lambda: model(*args))
    floor = floor_of(model, args)
    draw = random.Random(seed)
    kept = 0
    for share in (draw.random(), draw.random()):
        try:
            require_kept(model, args, int(floor + share * (peak - floor)))
            kept += 1
        except hp.MemoryBudgetError as error:  # the estimate of the floor was too low
            assert error.floor_bytes <= peak  # noqa: PT017
    require_kept(model, args, peak)


def test_a_stack_keeps_to_its_budgets():
    torch.manual_seed(0)
    model, args = Stack(Block(), Block()).double().eval(), (torch.randn(2, 61, 8).double(),)
    with torch.no_grad():
        peak = peak_cpu_bytes(lambda: model(*args))
    floor = floor_of(model, args)
    for share in (0.3, 0.6, 1.0):
        require_kept(model, args, int(floor + share * (peak - floor)))


def test_a_refusal_names_the_floor_and_the_floor_is_near_what_works():
    model, args = Stack(Block(), Block()).double().eval(), (torch.randn(2, 61, 8).double(),)
    floor = floor_of(model, args)
    with pytest.raises(hp.MemoryBudgetError, match="floor is about") as refused:
        hp.plan(model, args, memory=floor // 2)
    assert refused.value.floor_bytes == pytest.approx(floor, rel=0.05)
    require_kept(model, args, int(floor * 1.1))


def test_a_budget_above_the_peak_needs_no_loops():
    model, args = Stack(Block(), Block()).double().eval(), (torch.randn(2, 61, 8).double(),)
    plan = hp.plan(model, args, memory="1GiB")
    assert plan.loops == ()
    with torch.no_grad():
        assert torch.equal(looped(model, plan, *args), model(*args))
