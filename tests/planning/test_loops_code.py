"""What a person reads of a plan's loops, and bodies handed to torch.compile."""

import shutil

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.errors import PlanError


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.project = nn.LayerNorm(16), nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).chunk(3, -1)
        return x + (q @ k.mT).softmax(-1) @ v


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attend(), Attend()).eval().double(), torch.randn(1, 96, 16).double()
    return model, x, hp.plan(model, x, memory=int(0.55 * hp.estimate(model, x)))


def test_the_code_shows_each_loop_with_what_it_cuts(planned):
    _, _, plan = planned
    code = plan.code()
    count = sum(len(block.loops) for block in plan.loops)
    assert count >= 1
    for number in range(1, count + 1):
        assert (
            f"# loop_{number}: 96 units, {plan.loops[0].loops[number - 1].chunk} at a time" in code
        )
    assert "is cut along dim 1" in code
    assert "result 0 is put together along dim 1" in code
    assert "aten.softmax.int" in code


def test_a_plan_from_a_file_has_no_code_to_show(planned, tmp_path):
    _, _, plan = planned
    plan.save(tmp_path / "plan.toml")
    with pytest.raises(PlanError, match="it was read from a file; make it again"):
        hp.Plan.load(tmp_path / "plan.toml").code()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_bodies_compute_the_same(planned):
    model, x, plan = planned
    with torch.no_grad():
        truth = model(x)
        hp.parallelize(model, plan, compile_bodies=True)
        try:
            assert torch.allclose(model(x), truth, rtol=1e-12, atol=1e-12)
        finally:
            hp.detach(model)
        assert torch.equal(model(x), truth)
