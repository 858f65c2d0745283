"""Bytes alive along a step: against the profiler, and named by the module that holds them."""

import pytest
import torch
from torch import Tensor, nn

import hairpin as hp
from hairpin.errors import PlanError
from hairpin.run.profile import peak_cpu_bytes
from hairpin.run.timeline import memory_timeline, memory_timelines

LENGTH, WIDTH = 192, 16
SCORES_BYTES = LENGTH * LENGTH * 4


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x, x], -1).exp().sum(-1, keepdim=True) + x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Scores(), Scores())
        self.wide = Wide()

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.blocks(x))


class Peeks(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool((x > 0).any()) else x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Stack, Peeks])
@pytest.mark.parametrize("backward", [False, True])
def test_the_peak_is_the_profilers(kind, backward, x):
    model = kind()
    found = memory_timeline(model, x, backward=backward)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            output = model(x)
            if backward:
                output.sum().backward()

    step()
    model.zero_grad()
    slack = 64 if kind is Peeks or backward else 0  # numbers on the way: any(), the sum
    assert abs(found.peak_bytes - peak_cpu_bytes(step)) <= slack


def test_what_is_alive_is_named_by_its_module(x):
    found = memory_timeline(Stack(), x)
    assert found.at_peak[0].nbytes == SCORES_BYTES
    # The second block is the higher one: its input is an activation, the model's is not.
    assert {held.label for held in found.at_peak if held.nbytes == SCORES_BYTES} == {"blocks.1"}
    order = list(dict.fromkeys(moment.label for moment in found.moments))
    assert order.index("blocks.0.q") < order.index("blocks.1.q") < order.index("wide")


def test_the_backward_is_named_too(x):
    labels = [moment.label for moment in memory_timeline(Stack(), x, backward=True).moments]
    assert labels.index("wide (backward)") < labels.index("blocks.1 (backward)")
    assert labels.index("blocks.1 (backward)") < labels.index("blocks.0 (backward)")


def test_a_model_and_its_gradients_are_left_as_they_were(x):
    model = Peeks()
    model.wide.register_parameter("unused", nn.Parameter(torch.ones(1)))
    model.wide.unused.grad = torch.full((1,), 3.0)
    state = torch.get_rng_state()
    memory_timeline(model, x, backward=True)
    assert model.wide.unused.grad.item() == 3
    assert model.blocks[0].q.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_before_and_after_a_plan(x):
    model = Stack().eval()
    plan = hp.plan(model, x, memory=SCORES_BYTES)
    before, after = memory_timelines(model, x, plan)
    assert before == memory_timeline(model, x)
    assert before.peak_bytes == plan.whole_peak_bytes >= 2 * SCORES_BYTES
    assert after.peak_bytes == plan.peak_bytes <= SCORES_BYTES
    assert hp.plan_of(model) is None
    # A plan from a file has no programs yet; it comes to the same.
    assert memory_timelines(model, x, hp.Plan.from_toml(plan.to_toml())) == (before, after)


def test_a_model_that_carries_a_plan_is_refused(x):
    model = Stack().eval()
    plan = hp.plan(model, x, memory="1GiB")
    hp.parallelize(model, plan)
    with pytest.raises(PlanError, match="already carries a plan"):
        memory_timelines(model, x, plan)


def test_a_split_shows_one_rank(x):
    model = Stack().eval()
    attends = {"blocks.*": "b [s] c", "wide": "b s c"}
    plan = hp.plan(model, x.expand(4, -1, -1), hp.Mesh(sp=2), attends=attends, free_dims="b")
    before, after = memory_timelines(model, x.expand(4, -1, -1), plan)
    assert after.peak_bytes < before.peak_bytes
    assert hp.plan_of(model) is None
