"""Every region that the search offers computes what eager computes, at any chunk size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hairpin.errors import MemoryBudgetError
from hairpin.graph.export import trace
from hairpin.graph.memory import flow_of
from hairpin.planning.loops.program import make_program
from hairpin.planning.loops.regions import Seed, axis_length, candidates, seeds, walk
from hairpin.planning.loops.search import Search
from hairpin.planning.speeds import Speeds
from marks import slow
from planning.looping import LAYERS, WIDE, Calls, mixed, try_regions

# Each is run as 2 * f(1.5 * tanh(x)), so that there is something to cut on both sides of it.
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "lower triangle": lambda x: x.tril(),
    "upper triangle": lambda x: x.triu(1),
    "running sum": lambda x: x.cumsum(1),
    "running maximum": lambda x: x.cummax(1)[0],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(2, 1),
    "sort": lambda x: x.sort(1)[0],
    "largest": lambda x: x.topk(3, 1),
    "maximum and place": lambda x: x.max(1),
    "place of all": lambda x: x.argmax(),
    "variance": lambda x: x.var((1, 2), keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "sum of all": lambda x: x.sum(),
    "sum of two": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(1),
    "product": lambda x: x.prod(1),
    "diagonal": lambda x: torch.diagonal(x, 0, 1, 2),
    "windows": lambda x: x.unfold(1, 3, 2),
    "pad": lambda x: F.pad(x, (1, 2, 3, 1)),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "interleave": lambda x: x.repeat_interleave(3, 1),
    "chunks": lambda x: torch.cat([a * 2 for a in x.chunk(3, 2)], 1),
    "parts of other lengths": lambda x: [a.exp() for a in x.split([3, x.shape[1] - 3], 1)],
    "unbind": lambda x: list(x.unbind(2)),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "slices": lambda x: (x[:, 1:5] * 2, x[:, ::2] * 2, x[:, -2:], x[:, 3] + x[:, 0]),
    "index": lambda x: x[:, torch.tensor([0, 3, 3, 1])],
    "where": lambda x: torch.where(x > 0, x, x.mean(1, keepdim=True)),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x),
    "merge": lambda x: x.reshape(-1, x.shape[2]).exp(),
    "heads": lambda x: x.unflatten(2, (3, 4)).transpose(1, 2).reshape(x.shape[0], 3, -1) + 1,
    "other order": lambda x: x.permute(2, 0, 1).contiguous() + 1,
    "outer": lambda x: (x[:, :, None] - x[:, None]) ** 2,
    "distance": lambda x: torch.cdist(x, x),
    "einsum": lambda x: torch.einsum("bic,bjd->ijcd", x, x),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "positions": lambda x: x + torch.arange(x.shape[1], dtype=WIDE)[:, None],
    "made of sizes": lambda x: torch.full(x.shape[:2], 2.0, dtype=WIDE) * x.sum(2),
    "expand": lambda x: x.mean(1)[:, None].expand_as(x).exp() * x,
    "read twice": lambda x: (lambda y: y * y + y.transpose(1, 2).sum(1)[..., None])(x.exp()),  # noqa: PLC3002
    "added with a factor": lambda x: torch.add(x, x.exp(), alpha=3),
    "in place": lambda x: x.exp().add_(1).mul_(x),
    "slice in place": lambda x: (lambda y: (y[:, 1:4].mul_(2.0), y)[1])(x.exp()),  # noqa: PLC3002
    "layer norm of two": lambda x: F.layer_norm(x, x.shape[1:]) if x.shape[1] == 7 else x * 0,
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 3),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "average pool": lambda x: F.avg_pool1d(x, 3, 2),
    "linear upsampling": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "cross entropy": lambda x: F.cross_entropy(x.transpose(1, 2), (x > 0).long().sum(2) % 12),
    "quotients of integers": lambda x: (x * 10).long() // 3,
    "spectrum": lambda x: torch.fft.rfft(x, dim=1).abs(),
}
OTHERS = set(OPERATIONS) - {"layer norm of two", "causal attention", "slices"}


def doubled(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t * 2, value)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number % 3 else [])
        for number, name in enumerate(OPERATIONS)
    ],
)
def test_every_region_around_one_operation_computes_the_same(name):
    torch.manual_seed(0)
    model = Calls(lambda _, x: doubled(OPERATIONS[name](torch.tanh(x) * 1.5)))
    args = (torch.randn(2, 7, 12, dtype=WIDE),)
    others = [(torch.randn(5, 13, 12, dtype=WIDE),)] if name in OTHERS else []
    tried = try_regions(model, args, others=others, most=15)
    assert tried.faults == []
    assert tried.runs > 20


def test_an_einsum_of_one_tensor_is_no_product():
    """It turns dims around; there is no second factor whose shape could count."""
    model = Calls(lambda _, x: torch.einsum("bic->cib", torch.tanh(x)).exp())
    tried = try_regions(model, (torch.randn(2, 7, 12, dtype=WIDE),), others=[], most=15)
    assert tried.faults == []
    assert tried.runs > 5


class Merged(nn.Module):
    """Views that merge and part dims, and parts that are equally long in the example alone."""

    def forward(self, x):
        b, n, c = x.shape
        y = x.permute(2, 0, 1).reshape(c, b * n).exp().view(c, b, n).mul(2.0)
        z = x.tanh()
        return y, z[:, 1:5] * 3, z[:, ::2] * 2


@pytest.mark.parametrize("shape", [(2, 7, 12), (3, 13, 12), (5, 29, 12), (2, 64, 12)])
def test_a_program_is_right_at_other_lengths_where_dims_merge_or_are_equal_by_chance(shape):
    model, example = Merged(), torch.randn(2, 7, 12, dtype=WIDE)
    search = Search.of(trace(model, (example,), {}))
    least = search.floor_bytes
    for budget in (least * 1.05, least * 1.3, least * 2):
        flat = search.traced.flat_inputs(model, model.forward, (example,), {})
        try:
            program = make_program(search, int(budget), flat, Speeds())
        except MemoryBudgetError:
            continue
        x = torch.randn(shape, dtype=WIDE)
        program.budget_bytes = 10**9  # what fits is not asked here, only what comes out
        for got, wanted in zip(program.run(model, model.forward, (x,), {}), model(x), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("seed", [slow(0), 1, 2, 3, slow(4)])
def test_every_region_of_a_random_model_computes_the_same(seed):
    model, args, _ = mixed(seed)
    tried = try_regions(model, args, most=8)
    assert tried.faults == [], model.plan
    assert tried.runs > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(150))
def test_every_region_of_many_random_models_computes_the_same(seed):
    model, args, _ = mixed(seed)
    assert try_regions(model, args, most=60).faults == [], model.plan


@pytest.mark.parametrize("seed", range(5))
def test_a_loop_runs_at_lengths_that_were_not_traced(seed):
    """At other lengths a graph computes what eager does, or says that it cannot."""
    model, args, other = mixed(seed)
    assert try_regions(model, args, others=[other], most=5).faults == [], model.plan


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["Evoformer block", "Pairformer", "GPT-2", "ESM-2", "ViT"])
def test_every_region_of_third_party_blocks_computes_the_same(name):
    from hairpin.bench import zoo
    from hairpin.planning.loops.blocks import overview

    pytest.importorskip("transformers")
    case = next(case for case in zoo.cases() if name.lower() in case.title.lower())
    model = case.build().double()
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, case.inputs(case.tiny_length)
    )
    groups = overview(model, (args, kwargs)).groups
    if groups:
        model = model.get_submodule(groups[0].paths[0])
        args, kwargs = tree_map_only(Tensor, _filled, (groups[0].args, groups[0].kwargs))
    bound = Calls(lambda self, *given: self.model(*given, **kwargs), model=model)
    assert try_regions(bound, args, most=30, rtol=1e-11).faults == []


def _filled(shape: Tensor) -> Tensor:
    real = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
    return real.normal_() if real.is_floating_point() else real.zero_()


def flow_for(function: Callable[..., Any], *args: Tensor):
    return flow_of(trace(Calls(lambda _, *a: function(*a)), args, {}).graph)


def test_seeds_cut_every_dim_of_the_last_tensor_that_is_longer_than_one():
    flow = flow_for(lambda x: (x.exp() + 1).tanh(), torch.randn(2, 1, 5, dtype=WIDE))
    found = list(seeds(flow, len(flow.steps)))
    last = flow.steps[-1]
    lengths = [axis_length(last, last.axes[seed.axis]) for seed in found]
    assert sorted(lengths) == [2, 5]


def test_a_dim_that_softmax_needs_whole_is_never_cut():
    """Nothing between the scores and the weights may be in parts along the keys."""
    flow = flow_for(lambda x: (x @ x.transpose(1, 2)).softmax(-1).exp(), torch.randn(3, 5, 4))
    place = next(s.index for s in flow.steps if "softmax" in s.node.name)
    for found in candidates(flow, range(len(flow.steps) + 1)):
        state = walk(flow, found.end, found.seed)
        if found.start <= place < found.end and state.status.get(place) == "loop":
            axis = flow.steps[place].axes[state.demands[place][0]]
            assert axis.outputs[0].dim != 2


def test_steps_that_a_region_computes_ahead_are_those_needed_whole():
    """In softmax(x q) v with queries cut, keys and values are made once, before the loop."""
    torch.manual_seed(0)
    flow = flow_for(
        lambda q, x, w: (q @ (x @ w).transpose(1, 2)).softmax(-1) @ x.exp(),
        torch.randn(2, 7, 4),
        torch.randn(2, 9, 4),
        torch.randn(4, 4),
    )
    last = flow.steps[-1]
    axis = next(n for n, a in enumerate(last.axes) if a.outputs and a.outputs[0].dim == 1)
    state = walk(flow, len(flow.steps), Seed(last.index, axis))
    ahead = {flow.steps[i].node.name for i, s in state.status.items() if s == "ahead"}
    inside = {flow.steps[i].node.name for i, s in state.status.items() if s == "loop"}
    assert any(name.startswith("exp") for name in ahead)
    assert any("softmax" in name for name in inside)
    assert not ahead & inside


def test_the_layers_of_the_random_models_are_all_drawn():
    drawn = {name for seed in range(150) for name in mixed(seed)[0].plan}
    assert drawn == set(LAYERS)
