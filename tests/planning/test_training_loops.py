"""Loops in training: gradients, masks and peaks, against the block itself and the profiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.bench import evoformer
from hairpin.errors import MemoryBudgetError, PlanError, TraceError
from hairpin.graph.export import trace
from hairpin.graph.meter import measure
from hairpin.planning.loops.masks import keyed_dropout, mask
from hairpin.planning.loops.search import Search
from hairpin.planning.loops.training import TrainingProgram, make_training_program
from hairpin.planning.speeds import Speeds
from hairpin.run import profile

_SMALL = evoformer.Size(
    c_m=16, c_z=8, msa_heads=2, pair_heads=2, head_dim=4, outer=4, triangle=8, factor=2
)


class Mlp(nn.Module):
    """A norm, a wide hidden layer and dropouts around a residual."""

    def __init__(self, p: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8 * width)
        self.mid = nn.Dropout(p)
        self.down = nn.Linear(8 * width, width)
        self.last = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mid(torch.nn.functional.gelu(self.up(self.norm(x))))
        out: Tensor = x + self.last(self.down(hidden))
        return out


class Attention(nn.Module):
    """Plain attention with dropout on its weights: ``x[b, n, c]``; a second output."""

    def __init__(self, p: float = 0.0, width: int = 16, *, fused: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(p)
        self.p, self.fused = p, fused

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.p)
        else:
            mixed = self.drop((q @ k.transpose(-1, -2)).softmax(-1)) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(-2)), x * 2


def _program(block: nn.Module, args: tuple[Tensor, ...], ratio: float) -> TrainingProgram:
    detached = tuple(x.detach() for x in args)
    traced = trace(block, detached, {})
    peak = measure(block, args, grad=True).peak_bytes
    flat = traced.flat_inputs(block, block.forward, args, {})
    return make_training_program(Search.of(traced), int(ratio * peak), flat, Speeds())


def _run(program: TrainingProgram, block: nn.Module) -> Callable[..., Any]:
    return lambda *args: program.run(block, block.forward, args, {})


def _loss(outputs: Any) -> Tensor:
    tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    return torch.stack([(x * torch.linspace(-1, 1, x.shape[-1])).sum() for x in tensors]).sum()


def _gradients(fn: Callable[..., Any], block: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [*block.parameters(), *(x for x in args if x.requires_grad)]
    for leaf in leaves:
        leaf.grad = None
    _loss(fn(*args)).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def _close(found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Each within a tolerance of its size, or of a thousandth of the largest where it cancels."""
    largest = max(float(t.norm()) for t in truth)
    for mine, true in zip(found, truth, strict=True):
        scale = max(float(true.norm()), 1e-3 * largest)
        assert float((mine - true).norm()) <= tolerance * scale


def _evoformer(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    block = evoformer.randomise(evoformer.EvoformerBlock(_SMALL)).to(dtype).train()
    torch.manual_seed(1)
    args = torch.randn(12, 20, 16, dtype=dtype), torch.randn(20, 20, 8, dtype=dtype)
    return block, tuple(x.requires_grad_() for x in args)


def _mlp(p: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple["Mlp", tuple[Tensor]]:
    torch.manual_seed(0)
    return Mlp(p).to(dtype).train(), (torch.randn(2, 500, 16, dtype=dtype, requires_grad=True),)


def _few_turns(program: TrainingProgram, chunk: int) -> None:
    """Cut every loop into turns of this size, whatever would be best."""
    program.chunks = tuple(min(chunk, c.candidate.units) for c in program.choices)


@pytest.fixture(scope="module")
def evo() -> tuple[nn.Module, tuple[Tensor, ...], TrainingProgram]:
    """The Evoformer block in float64, at less than half of its peak."""
    block, args = _evoformer()
    return block, args, _program(block, args, 0.4)


def test_evoformer_gradients_equal_those_of_the_block(evo: Any) -> None:
    block, args, program = evo
    assert program.choices
    truth = _gradients(block, block, args)
    _close(_gradients(_run(program, block), block, args), truth, 1e-12)
    chunks = program.chunks
    try:
        for chunk in (1, 3, 7, 1000):
            _few_turns(program, chunk)
            _close(_gradients(_run(program, block), block, args), truth, 1e-12)
    finally:
        program.chunks = chunks


def test_evoformer_keeps_to_the_budget_as_certified(evo: Any) -> None:
    block, args, program = evo
    leaves = [*block.parameters(), *args]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = program.run(block, block.forward, args, {})
        torch.stack([x.sum() for x in out]).sum().backward()

    step()
    for leaf in leaves:
        leaf.grad = None
    peak = profile.peak_cpu_bytes
    measured = peak(step)
    assert program.backward
    assert measured <= program.budget_bytes
    assert measured == pytest.approx(program.peak_bytes, rel=1e-3)


def test_what_is_kept_adds_up_over_a_stack() -> None:
    block, args = _mlp()
    program = _program(block, args, 0.5)
    run = _run(program, block)
    stack = measure(
        lambda x, *state: run(run(run(x))), args, grad=False
    )  # without gradients nothing is kept
    kept = program.kept
    assert stack.peak_bytes < program.peak_bytes + 2 * kept.kept_bytes

    flat = program.traced.flat_inputs(block, block.forward, args, {})

    def three(*given: Any) -> Any:
        place = next(i for i, p in enumerate(program.traced.inputs) if p.kind == "given")
        values = list(given)
        for _ in range(3):
            values[place] = program.emitted.module(*values, *program.chunks)[0]
        return values[place]

    found = measure(three, flat, grad=True).peak_bytes
    estimate = 3 * (kept.kept_bytes + kept.output_bytes) + kept.backward_bytes
    assert found <= estimate
    assert found >= 2 * kept.kept_bytes


def test_float32_gradients_are_as_good_as_the_blocks_own() -> None:
    block, args = _mlp()
    program = _program(block, args, 0.4)
    assert program.choices
    _few_turns(program, 20)
    _close(_gradients(_run(program, block), block, args), _gradients(block, block, args), 2e-6)


def test_one_turn_and_many_have_the_same_masks() -> None:
    block, args = _mlp(0.3, torch.float64)
    program = _program(block, args, 0.45)
    assert program.choices
    found = []
    for chunk in (10**6, 7, 1):
        _few_turns(program, chunk)
        torch.manual_seed(5)
        found.append([program.run(block, block.forward, args, {}).detach()])
        torch.manual_seed(5)
        found[-1] += _gradients(_run(program, block), block, args)
    for other in found[1:]:
        _close(other, found[0], 1e-12)
    torch.manual_seed(6)
    again = program.run(block, block.forward, args, {})
    assert not torch.equal(again, found[0][0])


def test_masks_do_not_depend_on_where_loops_are() -> None:
    block, args = _mlp(0.3, torch.float64)
    results = []
    for ratio in (0.4, 2.0):
        program = _program(block, args, ratio)
        torch.manual_seed(5)
        results.append(_gradients(_run(program, block), block, args))
        if ratio == 2.0:
            assert not program.choices
    _close(results[1], results[0], 1e-12)


def test_attention_weights_drop_out_in_parts() -> None:
    torch.manual_seed(0)
    block = Attention(0.4).double().train()
    args = (torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True),)
    program = _program(block, args, 0.5)
    assert program.choices
    found = []
    for chunk in (10**6, 5):
        _few_turns(program, chunk)
        torch.manual_seed(3)
        found.append(_gradients(_run(program, block), block, args))
    _close(found[1], found[0], 1e-12)


def test_gradients_with_dropout_are_derivatives_of_the_forward() -> None:
    block, args = _mlp(0.3, torch.float64)
    program = _program(block, args, 0.45)
    _few_turns(program, 7)
    run = _run(program, block)

    def loss(x: Tensor) -> float:
        torch.manual_seed(5)
        return float(_loss(run(x)).detach())

    torch.manual_seed(5)
    found = _gradients(run, block, args)[-1]
    way = torch.randn_like(found)
    with torch.no_grad():
        slope = (loss_at(loss, args[0], way, 1e-5) - loss_at(loss, args[0], way, -1e-5)) / 2e-5
    assert slope == pytest.approx(float((found * way).sum()), rel=1e-6)


def loss_at(loss: Callable[[Tensor], float], x: Tensor, way: Tensor, step: float) -> float:
    """The loss a step away, with gradients recorded as in training."""
    with torch.enable_grad():
        return loss((x + step * way).detach().requires_grad_())


def test_checkpointing_around_a_program_repeats_its_masks() -> None:
    block, args = _mlp(0.3, torch.float64)
    run = _run(_program(block, args, 0.45), block)
    torch.manual_seed(5)
    truth = _gradients(run, block, args)
    torch.manual_seed(5)
    found = _gradients(lambda x: checkpoint(run, x, use_reentrant=False), block, args)
    _close(found, truth, 1e-14)


def test_two_backwards_add_up() -> None:
    block, args = _mlp(dtype=torch.float64)
    run = _run(_program(block, args, 0.45), block)
    once = [g.clone() for g in _gradients(run, block, args)]
    _loss(run(*args)).backward()
    twice = [x.grad for x in (*block.parameters(), *args)]
    _close(twice, [2 * g for g in once], 1e-14)  # type: ignore[arg-type]


def test_inputs_and_weights_without_gradients() -> None:
    block, _ = _mlp(dtype=torch.float64)
    args = (torch.randn(2, 500, 16, dtype=torch.float64),)
    block.up.weight.requires_grad_(False)
    program = _program(block, args, 0.5)
    truth = _gradients(block, block, args)
    _close(_gradients(_run(program, block), block, args), truth, 1e-12)
    assert block.up.weight.grad is None


def test_outputs_that_the_loss_leaves_out() -> None:
    torch.manual_seed(0)
    block = Attention().double().train()
    args = (torch.randn(2, 64, 16, dtype=torch.float64, requires_grad=True),)
    program = _program(block, args, 0.6)
    _few_turns(program, 5)
    run = _run(program, block)
    for place in (0, 1):
        truth = _gradients(lambda x, place=place: block(x)[place], block, args)
        found = _gradients(lambda x, place=place: run(x)[place], block, args)
        _close(found, truth, 1e-12)


class Twice(nn.Module):
    """Reads one input in parts and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((x @ x.transpose(-1, -2)).softmax(-1) @ x) * x
        return out


def test_an_input_that_is_read_in_parts_and_whole() -> None:
    torch.manual_seed(0)
    block = Twice().double().train()
    args = (torch.randn(80, 16, dtype=torch.float64, requires_grad=True),)
    program = _program(block, args, 0.6)
    assert program.choices
    _few_turns(program, 9)
    _close(_gradients(_run(program, block), block, args), _gradients(block, block, args), 1e-12)


def test_a_second_derivative_is_refused() -> None:
    block, args = _mlp()
    run = _run(_program(block, args, 0.45), block)
    with pytest.raises(PlanError, match="cannot be differentiated again"):
        torch.autograd.grad(_loss(run(*args)), args, create_graph=True)


def test_autocast_reaches_the_recomputation() -> None:
    block, args = _mlp()
    program = _program(block, args, 0.45)
    _few_turns(program, 50)
    run = _run(program, block)

    def mixed(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return fn(x)

        return call

    exact = _gradients(block, block, args)
    truth = [g.clone() for g in _gradients(mixed(block), block, args)]
    found = _gradients(mixed(run), block, args)
    assert any(not torch.equal(a, b) for a, b in zip(exact, truth, strict=True))
    _close(found, truth, 2e-2)


def test_other_lengths_fit_without_a_search() -> None:
    block, args = _mlp(dtype=torch.float64)
    program = _program(block, args, 0.45)
    program.budget_bytes *= 2
    longer = (torch.randn(2, 601, 16, dtype=torch.float64, requires_grad=True),)
    truth = _gradients(block, block, longer)
    _close(_gradients(_run(program, block), block, longer), truth, 1e-12)


def test_a_budget_out_of_reach_says_what_was_reached() -> None:
    block, args = _mlp()
    with pytest.raises(MemoryBudgetError, match="cannot be trained in") as caught:
        _program(block, args, 0.01)
    assert caught.value.floor_bytes > 0


def test_a_model_that_no_loops_were_found_for_says_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
    )
    x = torch.randn(2, 3, 32, 32)
    whole = hp.estimate(model, x, backward=True)
    with pytest.raises(MemoryBudgetError, match="no loops were found") as caught:
        hp.plan(model, x, memory=whole // 8, backward=True)
    assert caught.value.floor_bytes == whole


class Masked(Attention):
    """Attention in one kernel that hides some keys."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = nn.functional.scaled_dot_product_attention(
            x, x, x, attn_mask=mask, dropout_p=self.p
        )
        return out


def test_dropout_inside_masked_fused_attention_is_refused() -> None:
    args = (torch.randn(2, 64, 16, requires_grad=True), torch.randn(64, 64))
    with pytest.raises(TraceError, match="set the attention's dropout to 0"):
        _program(Masked(0.1).train(), args, 0.5)


def test_masks_are_even_and_independent() -> None:
    x = torch.empty(64, 128, 256)
    kept = mask(x, 0.3, 11, 0, 0, 0)
    n = kept.numel()
    sigma = (0.3 * 0.7 / n) ** 0.5
    assert abs(float(kept.double().mean()) - 0.7) < 4 * sigma
    other = [
        mask(x, 0.3, 12, 0, 0, 0),
        mask(x, 0.3, 11, 1, 0, 0),
        *(kept.roll(1, d) for d in range(3)),
    ]
    for each in other:
        both = (kept & each).double().mean()
        assert abs(float(both) - 0.49) < 5 * (0.49 * 0.51 / n) ** 0.5


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_part_of_a_mask_is_that_part(dim: int) -> None:
    x = torch.ones(5, 6, 7)
    whole = keyed_dropout(x, 0.5, 3, 2)
    part = keyed_dropout(x.narrow(dim, 2, 3), 0.5, 3, 2, dim, 2)
    assert torch.equal(part, whole.narrow(dim, 2, 3))
    assert set(whole.unique().tolist()) == {0.0, 2.0}
