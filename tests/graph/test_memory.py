"""Live bytes from the graph alone against the profiler, and at other lengths against a trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hairpin.graph.export import trace
from hairpin.graph.memory import flow_of
from hairpin.planning.loops.emit import emit
from hairpin.run.profile import peak_cpu_bytes
from planning.looping import WIDE, Block, Calls, pairs

FUNCTIONS = {
    "chain": lambda x: x.exp().tanh().relu(),
    "views cost nothing": lambda x: (
        x.exp().transpose(1, 2).reshape(-1, x.shape[1]).unsqueeze(0)[:, 1:]
    ),
    "a view keeps its storage": lambda x: (lambda v: pairs(x).sum() + v.exp())(x.exp()[:, :1]),  # noqa: PLC3002
    "pairs": pairs,
    "two outputs": lambda x: (x.exp(), x.exp().tanh()),
    "parts": lambda x: torch.cat([part.exp() for part in x.split(4, 2)], 2),
    "softmax": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "largest": lambda x: x.exp().topk(3, 1)[0].tanh(),
    "the other result": lambda x: x.exp().topk(3, 1)[1] + 1,
    "both results": lambda x: (lambda r: r[0] * r[1])(x.exp().topk(3, 1)),  # noqa: PLC3002
    "views of several": lambda x: x.exp().chunk(2, 1)[0].tanh(),
    "same output twice": lambda x: (lambda y: (y, y, y.view(-1)))(x.exp()),  # noqa: PLC3002
}


def flow_for(function, x):
    traced = trace(Calls(lambda _, x: function(x)), (x,), {})
    return traced, flow_of(traced.graph)


def measured(traced, x):
    module = emit(flow_of(traced.graph), []).module
    with torch.no_grad():
        return peak_cpu_bytes(lambda: module(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_peak_of_a_graph_is_the_profilers(name):
    """But for the bytes of numbers, which operations wrap in tensors of 8, and for kernels' own."""
    x = torch.randn(3, 11, 8, dtype=WIDE)
    traced, flow = flow_for(FUNCTIONS[name], x)
    assert 0 <= measured(traced, x) - flow.peak_bytes <= 64


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_at_other_lengths_are_those_of_a_trace_there(name):
    traced, flow = flow_for(FUNCTIONS[name], torch.randn(3, 11, 8, dtype=WIDE))
    other = torch.randn(5, 17, 8, dtype=WIDE)
    _, there = flow_for(FUNCTIONS[name], other)
    found = flow.at(traced.lengths([other]))
    assert [step.nbytes for step in found.steps] == [step.nbytes for step in there.steps]
    assert found.peak_bytes == there.peak_bytes


def test_what_is_alive_between_steps():
    x = torch.randn(4, 8, dtype=WIDE)
    size = x.numel() * 8
    _, flow = flow_for(lambda x: x.exp().tanh().sum(1), x)
    assert flow.live_bytes == [0, size, size, 4 * 8]
    assert [step.node.name for step in flow.live_roots(1)] == ["exp"]
    assert flow.peak_bytes == size + 4 * 8  # tanh goes where exp was


def test_parameters_and_inputs_are_not_counted():
    x = torch.randn(2, 9, 8, dtype=WIDE)
    layer = nn.Linear(8, 4).double()
    traced = trace(layer, (x,), {})
    assert flow_of(traced.graph).peak_bytes == 2 * 9 * 4 * 8


def test_a_block_and_its_attention_hold_what_the_profiler_says():
    torch.manual_seed(0)
    block, x = Block().double().eval(), torch.randn(2, 31, 8, dtype=WIDE)
    flow = flow_of(trace(block, (x,), {}).graph)
    traced = trace(block, (x,), {})
    module = emit(flow, []).module
    with torch.no_grad():
        flat = traced.flat_inputs(block, block.forward, (x,), {})
        real = peak_cpu_bytes(lambda: module(*flat))
        assert real <= peak_cpu_bytes(lambda: block(x))
    assert flow.peak_bytes == pytest.approx(real, rel=0.01)


def test_what_steps_hold_beside_their_results_counts():
    _, flow = flow_for(lambda x: F.relu(x.exp()), torch.randn(4, 8, dtype=WIDE))
    more = flow.with_extra({flow.steps[1].node: 10_000})
    assert more.peak_bytes == 4 * 8 * 8 + 10_000
