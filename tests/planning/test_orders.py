"""Budgets that a graph's own order does not allow, and masks that blocks make themselves."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hairpin as hp
from hairpin.graph.export import trace
from hairpin.planning.loops.emit import Region, emit
from hairpin.planning.loops.graphs import Graphs
from hairpin.planning.loops.program import make_program
from hairpin.planning.loops.search import Search
from hairpin.planning.speeds import Speeds


class Triangle(nn.Module):
    """Triangle multiplication, outgoing, ``z[i, j, c]`` (Jumper et al. 2021, Suppl. Alg. 11)."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.norm, self.norm_out = nn.LayerNorm(c), nn.LayerNorm(c)
        self.left, self.right, self.gate, self.out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(z)
        left, right = self.left(x), self.right(x)
        mixed = left.permute(2, 0, 1) @ right.permute(2, 1, 0)
        return z + torch.sigmoid(self.gate(x)) * self.out(self.norm_out(mixed.permute(1, 2, 0)))


class Twice(nn.Module):
    """Two of them, so that the second has an argument of its own to write into."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Triangle(), Triangle()

    def forward(self, z: Tensor) -> Tensor:
        return self.two(self.one(z))


def test_another_order_lowers_the_floor_and_changes_no_result() -> None:
    torch.manual_seed(0)
    model, z = Twice().double(), torch.randn(40, 40, 16, dtype=torch.float64)
    search = Search.of(trace(model, (z,), {}))
    assert search.better is not None
    lowest = search
    while lowest.better is not None:
        lowest = lowest.better
    assert lowest.floor_bytes < 0.85 * search.floor_bytes
    assert lowest.rewrites
    flat = search.traced.flat_inputs(model, model.forward, (z,), {})
    budget = (lowest.floor_bytes + search.floor_bytes) // 2
    program = make_program(search, budget, flat, Speeds())
    assert program.search.rewrites
    assert program.peak_bytes <= budget
    with torch.no_grad():
        found = program.run_flat(model, flat)
        torch.testing.assert_close(found, model(z), rtol=1e-12, atol=1e-12)


def test_a_plan_in_another_order_is_saved_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, z = Twice(), torch.randn(40, 40, 16)
    whole = model(z).detach()
    floor = Search.of(trace(model, (z,), {})).floor_bytes
    plan = hp.plan(model, z, memory=int(0.95 * floor))
    assert any(block.rewrites for block in plan.loops)
    plan.save(tmp_path / "plan.toml")
    read = hp.Plan.load(tmp_path / "plan.toml")
    assert read.to_toml() == plan.to_toml()
    hp.parallelize(model, read)
    with torch.no_grad():
        torch.testing.assert_close(model(z), whole)
        assert hp.profile(model, z).peak_bytes == plan.peak_bytes <= 0.95 * floor


class Layer(nn.Module):
    """Causal attention written out, with a mask from outside: ``x[b, t, c], mask[1, 1, t, t]``."""

    def __init__(self, c: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(c)
        self.q, self.k, self.v, self.out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self._maps())
        weights = ((q @ k.transpose(-1, -2)) / 8**0.5 + mask).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(-2))

    def _maps(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Language(nn.Module):
    """A stack that makes its mask once: ``tokens[b, t] -> [b, t, c]``."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        places = torch.arange(t)
        allowed = places[None, :] <= places[:, None]
        mask = torch.where(allowed, 0.0, -1e9)[None, None]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return F.layer_norm(x, (16,))


LENGTH = 512
MASK_BYTES = 4 * LENGTH * LENGTH


def _language() -> tuple[Language, Tensor]:
    torch.manual_seed(0)
    return Language().eval(), torch.randint(0, 11, (1, LENGTH))


def test_a_mask_is_made_inside_the_blocks() -> None:
    model, tokens = _language()
    with torch.no_grad():
        whole = model(tokens)
        plan = hp.plan(model, tokens, memory=MASK_BYTES // 2)
        hp.parallelize(model, plan)
        torch.testing.assert_close(model(tokens), whole)
        assert hp.profile(model, tokens).peak_bytes == plan.peak_bytes <= MASK_BYTES // 2


def test_blocks_that_make_their_masks_take_other_lengths_and_come_from_a_file(
    tmp_path: Path,
) -> None:
    model, tokens = _language()
    other = torch.randint(0, 11, (1, 331))
    with torch.no_grad():
        wholes = model(tokens), model(other)
        hp.plan(model, tokens, memory=MASK_BYTES // 2).save(tmp_path / "plan.toml")
        hp.parallelize(model, hp.Plan.load(tmp_path / "plan.toml"))
        for given, whole in zip((tokens, other), wholes, strict=True):
            torch.testing.assert_close(model(given), whole)
            assert hp.profile(model, given).peak_bytes <= MASK_BYTES // 2
    hp.detach(model)
    torch.testing.assert_close(model(other).detach(), wholes[1])


def test_a_mask_of_what_the_blocks_are_given_anyway() -> None:
    class Padded(Layer):
        def forward(self, x: Tensor, pad: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, mask) * pad[..., None]

    class Model(Language):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Padded() for _ in range(2))

        def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
            places = torch.arange(tokens.shape[1])
            allowed = (places[None, :] <= places[:, None]) & (pad[:, None, None, :] > 0)
            mask, x = torch.where(allowed, 0.0, -1e9), self.embed(tokens)
            for layer in self.layers:
                x = layer(x, pad, mask)
            return x

    torch.manual_seed(0)
    model, tokens = Model().eval(), torch.randint(0, 11, (1, LENGTH))
    pad = (torch.arange(LENGTH) < LENGTH - 50).float()[None]
    with torch.no_grad():
        whole = model(tokens, pad)
        hp.parallelize(model, hp.plan(model, (tokens, pad), memory=MASK_BYTES // 2))
        torch.testing.assert_close(model(tokens, pad), whole)
        assert hp.profile(model, (tokens, pad)).peak_bytes <= MASK_BYTES // 2


def test_a_loop_never_writes_into_what_it_reads_whole() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin() * x.cos()
            return (y @ y).tanh() + y

    torch.manual_seed(0)
    model, x = Square(), torch.randn(12, 12, dtype=torch.float64)
    search = Search.of(trace(model, (x,), {}))
    flat = search.traced.flat_inputs(model, model.forward, (x,), {})
    loops = [c for c in search.found if c.start > 0]
    assert loops
    for candidate in loops:
        module = emit(search.flow, [Region(candidate.start, candidate.end, candidate.seed)]).module
        (found,) = module(*flat, 1)
        torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
        assert candidate.saved_bytes == 0
        assert all(out.into is None for out in module.get_submodule("loop_1").outs)


@pytest.mark.slow
def test_blocks_with_different_masks_keep_them() -> None:
    class Mixed(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            places = torch.arange(tokens.shape[1])
            ahead = places[None, :] <= places[:, None]
            near = (places[None, :] - places[:, None]).abs() < 9
            x = self.embed(tokens)
            for layer, allowed in zip(self.layers, (ahead, near, ahead), strict=True):
                x = layer(x, torch.where(allowed, 0.0, -1e9)[None, None])
            return x

    torch.manual_seed(0)
    model, tokens = Mixed().eval(), torch.randint(0, 11, (1, LENGTH))
    graphs = Graphs(model, ((tokens,), {}), MASK_BYTES // 2)
    graphs.look_inside()
    graphs.look_around()
    assert graphs.around is not None
    assert not graphs.given
    with pytest.raises(hp.MemoryBudgetError):
        hp.plan(model, tokens, memory=MASK_BYTES // 2)
    with torch.no_grad():
        whole = model(tokens)
        hp.parallelize(model, hp.plan(model, tokens, memory=4 * MASK_BYTES))
        torch.testing.assert_close(model(tokens), whole)
