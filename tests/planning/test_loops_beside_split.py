"""Loops on each rank of a split: values of one process, the peak as certified on every rank."""

import pytest
import torch

import hairpin as hp
from hairpin.bench.evoformer import EvoformerBlock, Size, randomise
from hairpin.errors import MemoryBudgetError, PlanError
from hairpin.planning.split.derive import derive_attends
from hairpin.run.launch import launch
from hairpin.run.profile import peak_cpu_bytes

SMALL = Size(c_m=16, c_z=8, msa_heads=2, pair_heads=2, head_dim=4, outer=4, triangle=8)
SEQUENCES, RESIDUES = 6, 17


def block():
    return randomise(EvoformerBlock(SMALL)).eval().double()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((SEQUENCES, RESIDUES, 16), (RESIDUES, RESIDUES, 8))
    )


def on_a_rank(plan):
    """Greatest error against one process, and the measured peak."""
    mesh, model, given = hp.init_mesh(dp=1, sp=plan.degree), block(), inputs()
    with torch.no_grad():
        truth = model(*given)
        hp.parallelize(model, plan, mesh)
        error = max(float((x - y).abs().max()) for x, y in zip(model(*given), truth, strict=True))
        return error, peak_cpu_bytes(lambda: model(*given))


@pytest.fixture(scope="module")
def attends():
    return derive_attends(block(), inputs())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_unedited_evoformer_block_keeps_to_a_budget_on_each_rank(attends, ranks):
    budget = int(0.55 * hp.estimate(block(), inputs()))
    plan = hp.plan(block(), inputs(), hp.Mesh(sp=ranks), attends=attends, memory=budget)
    assert plan.loops
    assert plan.stages
    for error, peak in launch(on_a_rank, ranks, plan):
        assert error <= 1e-13
        assert peak <= plan.peak_bytes <= budget


@pytest.mark.slow
def test_a_budget_that_no_loops_meet_names_the_floor(attends):
    with pytest.raises(MemoryBudgetError, match="the floor is about") as caught:
        hp.plan(block(), inputs(), hp.Mesh(sp=2), attends=attends, memory="20KB")
    assert caught.value.floor_bytes > 20_000


def test_a_budget_for_a_backward_beside_a_split_is_refused(attends):
    with pytest.raises(PlanError, match="beside a split is not built yet"):
        hp.plan(block(), inputs(), hp.Mesh(sp=2), attends=attends, memory="1GiB", backward=True)
