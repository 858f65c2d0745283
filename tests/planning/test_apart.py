"""What one product makes at once and the code then cuts into parts is made apart, if it must be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hairpin as hp
from hairpin.graph.export import trace
from hairpin.planning.loops.apart import Apart
from hairpin.planning.loops.search import Search

LENGTH, WIDTH, HEADS = 96, 32, 4


def by_split(merged: Tensor) -> list[Tensor]:
    parts = merged.split(WIDTH, dim=-1)
    return [part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in parts]


def by_chunk(merged: Tensor) -> list[Tensor]:
    parts = merged.chunk(3, dim=-1)
    return [part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in parts]


def by_unbind(merged: Tensor) -> list[Tensor]:
    heads = merged.reshape(1, LENGTH, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    return list(heads.unbind(0))


def by_index(merged: Tensor) -> list[Tensor]:
    heads = merged.unflatten(-1, (3, HEADS, WIDTH // HEADS))
    return [heads[:, :, place].transpose(1, 2) for place in range(3)]


def by_slice(merged: Tensor) -> list[Tensor]:
    parts = (merged[..., :WIDTH], merged[..., WIDTH : 2 * WIDTH], merged[..., -WIDTH:])
    return [part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in parts]


WAYS = [by_split, by_chunk, by_unbind, by_index, by_slice]


class Attention(nn.Module):
    """Queries, keys and values from one layer, as most models have them."""

    def __init__(self, parts: Callable[[Tensor], list[Tensor]], *, gated: bool = False) -> None:
        super().__init__()
        self.merged = nn.Linear(WIDTH, 3 * WIDTH)
        self.gates = nn.Linear(WIDTH, 3 * WIDTH) if gated else None
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        merged = self.merged(x)
        if self.gates is not None:
            merged = merged * self.gates(x).sigmoid()
        q, k, v = self.parts(merged)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(-3, -2).flatten(-2)


def of(
    parts: Callable[[Tensor], list[Tensor]], *, gated: bool = False
) -> tuple[Attention, Tensor, Search]:
    torch.manual_seed(0)
    model = Attention(parts, gated=gated).double().requires_grad_(False)
    x = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    return model, x, Search.of(trace(model, (x,), {}))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", WAYS)
def test_parts_are_made_apart_where_the_budget_needs_it(
    parts: Callable[[Tensor], list[Tensor]], gated: bool
) -> None:
    model, x, search = of(parts, gated=gated)
    lower = search.better
    assert lower is not None
    assert lower.rewrites == (Apart(3),)
    assert lower.floor_bytes < 0.8 * search.floor_bytes
    budget = (lower.floor_bytes + search.floor_bytes) // 2
    whole = model(x)
    plan = hp.plan(model, x, memory=budget)
    hp.parallelize(model, plan)
    torch.testing.assert_close(model(x), whole, rtol=1e-12, atol=1e-12)
    assert hp.profile(model, x).peak_bytes == plan.peak_bytes <= budget


def test_it_holds_at_other_lengths_and_from_a_file(tmp_path: Path) -> None:
    model, x, search = of(by_split)
    assert search.better is not None
    budget = (search.better.floor_bytes + search.floor_bytes) // 2
    other = torch.randn(1, LENGTH - 7, WIDTH, dtype=torch.float64)
    wholes = model(x), model(other)
    hp.plan(model, x, memory=budget).save(tmp_path / "plan.toml")
    plan = hp.Plan.load(tmp_path / "plan.toml")
    assert plan.loops[0].rewrites == (Apart(3),)
    hp.parallelize(model, plan)
    for given, whole in zip((x, other), wholes, strict=True):
        torch.testing.assert_close(model(given), whole, rtol=1e-12, atol=1e-12)
        assert hp.profile(model, given).peak_bytes <= budget


def test_what_is_read_whole_too_stays_in_one_piece() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merged = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            merged = self.merged(x)
            left, right = merged.chunk(2, dim=-1)
            return (left * right).sum() + merged.norm()

    assert Apart.of(trace(Both(), (torch.randn(3, 5, WIDTH),), {})) is None


def test_what_no_product_makes_stays_in_one_piece() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.sin().chunk(2, dim=-1)
            return left * right

    assert Apart.of(trace(Halves(), (torch.randn(3, 5, WIDTH),), {})) is None
