"""Loops inside the turns of other loops: where one unit of a dim still holds too much."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hairpin as hp
from hairpin.graph.export import trace
from hairpin.planning.loops.search import Search

LENGTH, HEADS = 256, 4


class Attention(nn.Module):
    """Few heads over many rows, none of which fits whole."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 4 * width) for _ in range(3))
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2)
            for each in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(-3, -2).flatten(-2)) + x


def lowest(search: Search) -> Search:
    while search.better is not None:
        search = search.better
    return search


def without_nests(search: Search) -> int:
    """The floor in bytes of the last order that needs no loop inside another."""
    while search.better is not None and not any(c.inside for c in search.better.found):
        search = search.better
    return search.floor_bytes


@pytest.fixture
def example() -> tuple[nn.Module, Tensor, int]:
    """A model, its input, and a budget that only loops inside loops keep to, in bytes."""
    torch.manual_seed(0)
    model = Attention().double().requires_grad_(False)
    x = torch.randn(1, LENGTH, 64, dtype=torch.float64)
    search = Search.of(trace(model, (x,), {}))
    least, plain = lowest(search).floor_bytes, without_nests(search)
    assert least < 0.95 * plain
    return model, x, (least + plain) // 2


def test_a_budget_that_one_loop_cannot_meet(example: tuple[nn.Module, Tensor, int]) -> None:
    model, x, budget = example
    whole = model(x)
    plan = hp.plan(model, x, memory=budget)
    (block,) = plan.loops
    assert any(loop.inner for loop in block.loops)
    assert "inside: " in plan.explain()
    assert "loop_1.loop_1: " in plan.code() or "loop_2.loop_1: " in plan.code()
    hp.parallelize(model, plan)
    torch.testing.assert_close(model(x), whole, rtol=1e-12, atol=1e-12)
    assert hp.profile(model, x).peak_bytes == plan.peak_bytes <= budget


def test_at_another_length_it_is_planned_again(example: tuple[nn.Module, Tensor, int]) -> None:
    model, x, budget = example
    other = torch.randn(1, LENGTH - 19, 64, dtype=torch.float64)
    whole = model(other)
    hp.parallelize(model, hp.plan(model, x, memory=budget))
    torch.testing.assert_close(model(other), whole, rtol=1e-12, atol=1e-12)
    assert hp.profile(model, other).peak_bytes <= budget


def test_it_is_saved_and_read_back(example: tuple[nn.Module, Tensor, int], tmp_path: Path) -> None:
    model, x, budget = example
    whole = model(x)
    plan = hp.plan(model, x, memory=budget)
    plan.save(tmp_path / "plan.toml")
    read = hp.Plan.load(tmp_path / "plan.toml")
    assert read.loops == plan.loops
    hp.parallelize(model, read)
    torch.testing.assert_close(model(x), whole, rtol=1e-12, atol=1e-12)
    assert hp.profile(model, x).peak_bytes == plan.peak_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_its_innermost_bodies_can_be_compiled(example: tuple[nn.Module, Tensor, int]) -> None:
    model, x, budget = example
    whole = model(x)
    plan = hp.plan(model, x, memory=budget)
    hp.parallelize(model, plan, compile_bodies=True)
    torch.testing.assert_close(model(x), whole, rtol=1e-12, atol=1e-12)
