"""The zoo builds and runs, the hand-chunked Evoformer is the Evoformer, the tables add up."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.bench import chunking, peers, steps, zoo
from hairpin.bench.evoformer import EvoformerBlock, HandChunked, Size, randomise
from hairpin.errors import MemoryBudgetError, MissingExtraError
from hairpin.run.profile import ProfileError

SMALL = Size(c_m=16, c_z=8, msa_heads=2, pair_heads=2, head_dim=4, outer=4, triangle=8)
CASES = {case.title: case for case in zoo.cases()}


def built(case: zoo.Case) -> nn.Module:
    try:
        return case.build()
    except MissingExtraError as error:
        pytest.skip(str(error))


def tiny(title: str) -> zoo.Case:
    case = CASES[title]
    return replace(case, length=case.tiny_length, other_length=case.tiny_length + 1)


# ------------------------------------------------------------------------------------------ the zoo


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("title", CASES)
def test_a_case_runs_alike_twice_and_stays_finite(title):
    case = CASES[title]
    state = torch.random.get_rng_state()
    first, second = (steps.run(built(case), case.inputs(case.tiny_length)) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    tensors = steps.tensors(first)
    assert tensors
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)
    assert steps.errors(first, second) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["GPT-2", "Llama and loss", "ESM-2", "HF ViT", "timm ViT, high resolution", "VAE decoder"],
)
def test_eager_and_sdpa_are_the_same_model(name):
    eager, fused = (CASES[f"{name} ({variant})"] for variant in ("eager", "sdpa"))
    inputs = eager.inputs(eager.tiny_length)
    _, relative = steps.errors(steps.run(built(eager), inputs), steps.run(built(fused), inputs))
    assert relative < 1e-5


@pytest.mark.parametrize("title", [title for title, case in CASES.items() if case.set_option])
@pytest.mark.filterwarnings("ignore")
def test_a_models_own_option_takes_less_and_computes_the_same(title):
    case = CASES[title]
    model, length = built(case), max(case.tiny_length, case.length // 4)
    inputs = case.inputs(length)
    whole = steps.peak_bytes(lambda: steps.run(model, inputs))
    want = steps.run(model, inputs)
    size = case.option_sizes[-1]
    chunked = case.set_option(case.build(), size if case.option != "enable_tiling" else length // 2)
    got = steps.run(chunked, inputs)
    assert steps.peak_bytes(lambda: steps.run(chunked, inputs)) < whole
    if case.option != "enable_tiling":  # which blends tiles
        assert steps.errors(got, want)[1] < 1e-5


def test_lengths_are_primes_that_no_plan_saw():
    for case in CASES.values():
        n = case.other_length
        assert n != case.length
        assert all(n % divisor for divisor in range(2, int(n**0.5) + 1)), case.title


def test_select_by_name_or_title():
    assert [case.title for case in zoo.select("gpt-2", "Wan (sdpa)")] == [
        "GPT-2 (eager)",
        "GPT-2 (sdpa)",
        "Wan (sdpa)",
    ]
    assert len(zoo.select()) == len(CASES)
    with pytest.raises(ProfileError, match=r"no case 'GPT-9'; there are: Evoformer block"):
        zoo.select("GPT-9")


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers.*pip install 'hairpin\[hf\]'"):
        CASES["GPT-2 (eager)"].build()


@pytest.mark.filterwarnings("ignore")
def test_no_placeholder_of_torchvision_stays():
    built(CASES["timm ViT, high resolution (eager)"])
    assert not any(name.partition(".")[0] == "torchvision" for name in sys.modules)


# ------------------------------------------------------------------------------ chunked by hand


def block_and_inputs(n: int):
    generator = torch.Generator().manual_seed(n)
    block = randomise(EvoformerBlock(SMALL)).double().eval()
    m = torch.randn(5, n, 16, generator=generator, dtype=torch.float64)
    return block, (m, torch.randn(n, n, 8, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
@pytest.mark.parametrize("n", [1, 2, 7, 12, 13])
def test_hand_chunked_equals_plain(n, chunk_size, in_place):
    block, (m, z) = block_and_inputs(n)
    by_hand = HandChunked(
        block, chunk_size, in_place_triangles=in_place, triangle_chunk_size=min(chunk_size, 5)
    )
    before = m.clone(), z.clone()
    _, relative = steps.errors(by_hand(m, z), block(m, z))
    assert relative < 1e-13
    assert torch.equal(m, before[0])
    assert torch.equal(z, before[1])


def test_hand_chunked_takes_what_openfold_promises():
    """In place, the triangle multiplication takes 2.5 times z and its parts, else 5 times."""
    n = 96
    block = randomise(EvoformerBlock(Size())).eval()
    inputs = (torch.randn(4, n, 256), torch.randn(n, n, 128)), {}
    z_bytes = n * n * 128 * 4
    whole, standard, in_place = (
        steps.peak_bytes(lambda model=model: steps.run(model, inputs))
        for model in (
            block,
            HandChunked(block, 4),
            HandChunked(block, 4, in_place_triangles=True, triangle_chunk_size=4),
        )
    )
    assert 5 * z_bytes < standard < whole
    # z, the projection a, half of z, and the normed z of triangle attention beside z
    assert 2.5 * z_bytes < in_place < 3.5 * z_bytes


@torch.no_grad()
def test_the_blocks_parts_follow_the_paper():
    """Outer product mean and both triangle multiplications against sums written out."""
    block, (m, z) = block_and_inputs(4)
    layer = block.outer_product_mean
    a, b = layer.left(layer.norm(m)), layer.right(layer.norm(m))
    pairs = [[torch.outer(a[:, i].T[c], b[:, j].T[e]).trace() for c in range(4) for e in range(4)]
             for i in range(4) for j in range(4)]  # fmt: skip
    want = layer.out(torch.tensor(pairs, dtype=torch.float64).reshape(4, 4, 16) / 5)
    torch.testing.assert_close(layer(m), want)
    for triangle in (block.triangle_outgoing, block.triangle_incoming):
        x = torch.zeros(4, 4, 8, dtype=torch.float64)
        for i in range(4):
            for j in range(4):
                for k in range(4):
                    x[i, j] += z[i, k] * z[j, k] if triangle.outgoing else z[k, i] * z[k, j]
        torch.testing.assert_close(triangle.product(z, z), x)


# ----------------------------------------------------------------------------------- the tables


class Refusing:
    """A planner that leaves the model alone, promises its peak and refuses what is below."""

    def __init__(self, peak: int) -> None:
        self.peak = peak
        self.planned: set[int] = set()

    def plan(self, model, inputs, *, memory, backward=False):
        if memory < self.peak:
            error = MemoryBudgetError(f"{memory} bytes are below the floor")
            error.floor_bytes = self.peak
            raise error
        return SimpleNamespace(peak_bytes=self.peak)

    def estimate(self, model, inputs):
        return self.peak if id(model) in self.planned else hp.estimate(model, inputs)

    def parallelize(self, model, plan):
        self.planned.add(id(model))
        return model


@pytest.fixture
def refusing(monkeypatch):
    def use(case: zoo.Case, *, share: float) -> Refusing:
        planner = Refusing(int(share * steps.Eager.of(case).peak_bytes))
        for module in (steps, chunking):
            monkeypatch.setattr(module, "hp", planner)
        return planner

    return use


def test_figures():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert steps.errors({"x": a, "n": 3}, {"x": b, "n": 3}) == (0.5, pytest.approx(0.2))
    assert steps.held_bytes((a, a[:1], [b.view(1, 2)])) == 16
    assert steps.budget_bytes(0.3, peak=1100, output=100) == 400
    assert steps.time_ratio([1.0, 9.0, 3.0], [1.0, 3.0, 2.0]) == 1.5
    assert steps.peak_bytes(lambda: torch.ones(1000).neg().neg()) == 8000


def test_steps_take_turns():
    order = []
    times_s = steps.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(seconds) for seconds in times_s.values()] == [3, 3]


def test_rows_say_what_was_kept(refusing):
    """A plan that promises 0.6 of the peak and takes all of it breaks 0.7 and refuses 0.5."""
    case = tiny("Evoformer block")
    planner = refusing(case, share=0.6)
    rows = chunking.table([case], [1.0, 0.7, 0.5], rounds=1)
    assert [row.honoured for row in rows] == [True, False, None]
    assert [row.exact for row in rows] == [False, False, None]
    assert [row.floor_bytes for row in rows] == [None, None, planner.peak]
    assert rows[0].peak_bytes == rows[0].eager_peak_bytes == rows[0].budget_bytes
    assert rows[0].output_bytes == 4 * (32 * 12 * 256 + 12 * 12 * 128)
    assert rows[0].max_error == 0.0
    lines = chunking.summary(rows)
    assert [(line.ratio, line.feasible, line.infeasible, line.honoured) for line in lines] == [
        (1.0, 1, 0, 1),
        (0.7, 1, 0, 0),
        (0.5, 0, 1, 0),
    ]
    assert lines[2].median_time_ratio is None
    json.dumps([asdict(row) for row in rows])


@pytest.mark.parametrize("most", [1, 2, 5, 63, 64, 1000, 12_345])
@pytest.mark.parametrize("start", [1, 7, 1024])
def test_bisect_finds_the_last_that_fits(most, start):
    found = chunking.bisect(lambda n: n <= most, start=start)
    assert most - max(1, most // 64) <= found <= most


def test_the_longest_eager_length_is_the_last_within_the_budget(refusing):
    case = replace(CASES["Pairformer block"], length=16)
    planner = refusing(case, share=1.0)
    planner.peak = 10**12  # ours never fits
    budget = steps.Eager.of(case, 40).peak_bytes
    found = chunking.longest(case, budget)
    assert 39 <= found.eager_length <= 40
    assert found.length == 0


def test_the_expert_and_ours_share_one_table(refusing):
    refusing(tiny("Evoformer block"), share=1.0)
    found = peers.expert(rounds=1, length=12, chunk_sizes=(12, 2))
    assert [(row.in_place, row.chunk_size) for row in found.rows] == [
        (False, 12),
        (False, 2),
        (True, 12),
        (True, 2),
    ]
    assert found.least_in_place_bytes <= found.least_bytes < found.eager_peak_bytes
    assert found.ours_least_bytes == found.eager_peak_bytes
    assert all(row.relative_error < 1e-5 for row in found.rows)


def test_training_compares_gradients(refusing):
    case = tiny("Evoformer block")
    planner = refusing(case, share=1.0)
    planner.peak = 0
    rows = peers.training([case], ratio=0.5, compile_budgets=(), rounds=1)
    assert [row.method for row in rows] == ["eager", "module checkpointing", "ours"]
    assert all(row.relative_error < 1e-5 for row in rows)
    parameters = sum(p.numel() for p in case.build().parameters())
    assert rows[0].gradient_bytes == 4 * (parameters + 32 * 12 * 256 + 12 * 12 * 128)
    assert rows[1].peak_bytes < rows[0].peak_bytes == rows[2].peak_bytes


def test_estimates_and_options(refusing):
    case = tiny("EsmFold trunk block")
    built(case)
    planner = refusing(case, share=0.1)
    eager, ours = chunking.estimates([case])
    assert eager.ratio == pytest.approx(1.0, abs=0.01)
    assert ours.estimate_bytes == planner.peak
    assert eager.length == case.other_length
    rows = peers.own_options([replace(case, option_sizes=(4, 1))], compiled=False, rounds=1)
    assert [row.size for row in rows] == [4, 1]
    assert all(row.peak_ratio < 1 and row.relative_error < 1e-5 for row in rows)
    assert {row.ours_floor_bytes for row in rows} == {planner.peak}
