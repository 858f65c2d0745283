"""Blocks as graphs: the same numbers, for every block of the structure and no other call."""

import pytest
import torch
from torch import nn

from hairpin.errors import TraceError
from hairpin.graph.export import packed_outputs, trace
from planning.looping import WIDE, Block, Calls, pairs


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 7, 8, dtype=WIDE)


@pytest.fixture(scope="module")
def of_a_block():
    """The graph of a block on tensors like ``x``, and the block."""
    block = Block().double()
    return trace(block, (torch.randn(2, 7, 8, dtype=WIDE),), {}), block


def replay(traced, block, *args, **kwargs):
    flat = traced.flat_inputs(block, block.forward, args, kwargs)
    module = torch.fx.GraphModule(nn.Module(), traced.graph)
    with torch.no_grad():
        return packed_outputs(traced, module(*flat))


def test_a_graph_computes_what_the_block_does_with_any_weights_at_any_length(x):
    torch.manual_seed(0)
    first, second = Block().double(), Block().double()
    traced = trace(first, (x,), {})
    for block in (first, second):
        for shape in ((2, 7), (3, 13), (5, 2)):
            other = torch.randn(*shape, 8, dtype=WIDE)
            with torch.no_grad():
                torch.testing.assert_close(
                    replay(traced, block, other), block(other), rtol=1e-13, atol=1e-13
                )


def test_the_digest_names_what_is_computed_not_the_weights(x):
    first = trace(Block().double(), (x,), {}).digest
    assert trace(Block().double(), (x[:, :5],), {}).digest == first
    assert trace(Block(heads=4).double(), (x,), {}).digest != first
    assert trace(Block().double().eval(), (x,), {}).digest != first
    assert trace(Block(), (x.float(),), {}).digest != first


def test_arguments_by_name_and_by_place_are_one_call(x):
    block = Calls(lambda _, x, scale=2.0: pairs(x) * scale)
    traced = trace(block, (x,), {"scale": 3.0})
    assert torch.equal(replay(traced, block, x, scale=3.0), pairs(x) * 3.0)


@pytest.mark.parametrize("other", [2.5, None, 3, "3.0"])
def test_another_plain_argument_is_refused(x, other):
    block = Calls(lambda _, x, scale=2.0: pairs(x))
    traced = trace(block, (x, 3.0), {})
    with pytest.raises(TraceError, match="plan with an example"):
        replay(traced, block, x, other)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.float(), lambda x: x[0], lambda x: x[..., :4], lambda x: x[:, :1], lambda _: None],
)
def test_another_kind_of_tensor_is_refused(x, change, of_a_block):
    traced, block = of_a_block
    with pytest.raises(TraceError, match="plan with an example"):
        replay(traced, block, change(x))


def test_a_condition_on_lengths_is_kept(x):
    block = Calls(lambda _, x: x * 2 if x.shape[1] > 5 else x * 3)
    traced = trace(block, (x,), {})
    assert torch.equal(replay(traced, block, x[:, :6].clone()), x[:, :6] * 2)
    with pytest.raises(TraceError):
        replay(traced, block, x[:, :5].clone())


def test_equal_lengths_of_two_arguments_may_not_part(x):
    block = Calls(lambda _, a, b: a + b)
    traced = trace(block, (x, x.clone()), {})
    with pytest.raises(TraceError):
        replay(traced, block, x, torch.cat([x, x], 1))


def test_a_tensor_given_twice_is_two_arguments(x):
    block = Calls(lambda _, a, b: a - b)
    traced = trace(block, (x, x), {})
    assert torch.equal(replay(traced, block, x, x * 3), x - x * 3)


def test_code_that_branches_on_values_is_refused_in_words(x):
    block = Calls(lambda _, x: x if x.sum() > 0 else -x)
    with pytest.raises(TraceError, match="branches on values of its input"):
        trace(block, (x,), {})


def test_an_error_of_the_block_itself_is_named(x):
    block = Calls(lambda _, x: x @ x)
    with pytest.raises(TraceError, match="Calls cannot be exported"):
        trace(block, (x,), {})


def test_constants_and_buffers_are_inputs_of_the_graph(x):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((8,), 2.0, dtype=WIDE))

        def forward(self, x):
            return x * self.scale + torch.tensor([1.0] * 8, dtype=WIDE)

    block = Holds()
    traced = trace(block, (x,), {})
    block.scale.fill_(5.0)
    assert torch.equal(replay(traced, block, x), x * 5 + 1)
    assert {"state", "constant", "given"} == {port.kind for port in traced.inputs}
