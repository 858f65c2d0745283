"""Budgets under torch.autocast: a plan holds for the setting it was made under."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hairpin as hp
from hairpin.errors import PlanError


class Mlp(nn.Module):
    """A norm and a wide hidden layer around a residual."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 8 * width)
        self.down = nn.Linear(8 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        out: Tensor = x + self.down(hidden)
        return out


class Wide(Mlp):
    """The same in full precision, whatever is around."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Half(nn.Module):
    """A stack that calls its blocks in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                x = block(x)
        return x


def _half(on: bool = True) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def _stack(kind: type[nn.Module] = Mlp) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).eval()


X = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))


def _plan(model: nn.Module, *, on: bool, backward: bool = False) -> hp.Plan:
    with _half(on), torch.no_grad():
        budget = int(0.8 * hp.estimate(model, X, backward=backward))
        plan = hp.plan(model, X, memory=budget, backward=backward)
    assert plan.loops
    return plan


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_a_call_under_another_setting_is_refused(on: bool, backward: bool, tmp_path: Path) -> None:
    model = _stack().train(backward)
    plan = _plan(model, on=on, backward=backward)
    plan.save(tmp_path / "plan.toml")
    for each in (plan, hp.Plan.load(tmp_path / "plan.toml")):
        hp.parallelize(model, each)
        with (
            _half(not on),
            torch.no_grad(),
            pytest.raises(PlanError, match=r"autocast \(cpu bfloat16\).*the same torch"),
        ):
            model(X)
        hp.detach(model)


def test_a_plan_under_autocast_computes_what_the_model_does_there() -> None:
    model = _stack()
    plan = _plan(model, on=True)
    with _half(), torch.no_grad():
        truth = model(X)
        hp.parallelize(model, plan)
        assert torch.equal(model(X), truth)
    hp.detach(model)
    with torch.no_grad():
        assert not torch.equal(model(X), truth)


def test_gradients_under_autocast_are_as_good_as_the_models() -> None:
    model = _stack().train()
    plan = _plan(model, on=True, backward=True)

    def gradients(on: bool) -> Tensor:
        model.zero_grad()
        with _half(on):
            loss = model(X).float().square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, eager = gradients(False), gradients(True)
    hp.parallelize(model, plan)
    found = gradients(True)
    assert (found - exact).norm() < 2 * (eager - exact).norm()


def test_a_setting_within_a_setting_is_left_alone() -> None:
    model = _stack(Wide)
    with _half(), pytest.raises(hp.MemoryBudgetError, match=r"sets torch\.autocast itself"):
        hp.plan(model, X, memory=hp.estimate(model, X) // 2)
    plan = _plan(model, on=False)
    with torch.no_grad():
        truth = model(X)
        hp.parallelize(model, plan)
        torch.testing.assert_close(model(X), truth)


def test_blocks_that_the_model_calls_in_half_precision_stay_right() -> None:
    torch.manual_seed(0)
    model = Half().eval()
    plan = _plan(model, on=False)
    with torch.no_grad():
        truth = model(X)
        hp.parallelize(model, plan)
        assert torch.equal(model(X), truth)
