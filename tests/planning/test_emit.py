"""Regions written by hand: parts at the end, sums, several outputs, storages written again."""

import pytest
import torch
from torch import Tensor

from hairpin.graph.export import packed_outputs, trace
from hairpin.graph.memory import flow_of
from hairpin.planning.loops.emit import Region, emit
from hairpin.planning.loops.regions import Seed
from planning.looping import WIDE, Block, Calls, pairs


def graph_of(function, *args):
    model = Calls(lambda _, *a: function(*a))
    traced = trace(model, args, {})
    return model, traced, flow_of(traced.graph)


def seed_along(flow, place, dim):
    """The seed that cuts a step's result along a dim; ``dim`` None for a sum."""
    step = flow.steps[place]
    for number, axis in enumerate(step.axes):
        if axis.sums if dim is None else (axis.outputs and axis.outputs[0].dim == dim):
            return Seed(step.index, number)
    raise AssertionError(f"{step.node.name} cannot be cut along {dim}: {step.axes}")


def run(traced, model, emitted, args, *chunks):
    flat = traced.flat_inputs(model, model.forward, args, {})
    with torch.no_grad():
        return packed_outputs(traced, emitted.module(*flat, *chunks))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 7])
def test_the_last_part_may_be_shorter(chunk):
    args = (torch.randn(3, 7, 4, dtype=WIDE),)
    model, traced, flow = graph_of(lambda x: x.exp().tanh() * 3, *args)
    end = len(flow.steps)
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, 1))])
    assert torch.equal(run(traced, model, emitted, args, chunk), model(*args))


def test_the_body_sees_parts_only():
    """Nothing inside a loop is longer along the cut dim than its chunk."""
    args = (torch.randn(3, 8, 4, dtype=WIDE),)
    model, traced, flow = graph_of(lambda x: x.exp().tanh() * 3, *args)
    end = len(flow.steps)
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, 1))])
    loop = emitted.module.get_submodule("loop_1")
    seen = []
    body = loop.body.forward
    loop.body.forward = lambda count, *parts: (
        seen.append((count, parts[0].shape[1])) or body(count, *parts)
    )
    run(traced, model, emitted, args, 3)
    assert seen == [(3, 3), (3, 3), (2, 2)]


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_a_summed_dim_adds_up(chunk):
    args = (torch.randn(5, 11, dtype=WIDE), torch.randn(11, 6, dtype=WIDE))
    model, traced, flow = graph_of(lambda a, b: a.exp() @ b, *args)
    end = len(flow.steps)
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, None))])
    torch.testing.assert_close(
        run(traced, model, emitted, args, chunk), model(*args), rtol=1e-13, atol=1e-13
    )


def test_two_loops_take_their_own_chunks():
    args = (torch.randn(4, 9, 6, dtype=WIDE),)
    model, traced, flow = graph_of(lambda x: pairs(pairs(x)), *args)
    half = next(s.index for s in flow.steps if s.node.name.startswith("div")) + 1
    regions = [
        Region(0, half, seed_along(flow, half - 1, 1)),
        Region(half, len(flow.steps), seed_along(flow, len(flow.steps) - 1, 2)),
    ]
    emitted = emit(flow, regions)
    assert list(emitted.loops) == ["loop_1", "loop_2"]
    for chunks in ((1, 1), (2, 5), (9, 6)):
        torch.testing.assert_close(
            run(traced, model, emitted, args, *chunks), model(*args), rtol=1e-13, atol=1e-13
        )


def test_several_outputs_come_out_whole():
    def function(x: Tensor):
        y = x.exp()
        return y * 2, (y - 1).tanh()

    args = (torch.randn(2, 7, 3, dtype=WIDE),)
    model, traced, flow = graph_of(function, *args)
    end = len(flow.steps)
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, 1))])
    for got, wanted in zip(run(traced, model, emitted, args, 3), model(*args), strict=True):
        assert torch.equal(got, wanted)


def test_outputs_keep_the_order_of_their_dims_in_memory():
    args = (torch.randn(2, 7, 3, dtype=WIDE),)
    model, traced, flow = graph_of(lambda x: x.exp().transpose(1, 2).tanh(), *args)
    end = len(flow.steps)
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, 1))])
    assert run(traced, model, emitted, args, 2).stride() == model(*args).stride()


@pytest.mark.parametrize("reuse", [True, False])
def test_what_the_caller_gave_is_never_written_to(reuse):
    args = (torch.randn(2, 7, 3, dtype=WIDE), torch.randn(2, 7, 3, dtype=WIDE))
    model, traced, flow = graph_of(lambda x, y: ((x + y) * x).add(y).relu() + x, *args)
    end = len(flow.steps)
    kept = [x.clone() for x in args]
    emitted = emit(flow, [Region(0, end, seed_along(flow, end - 1, 1))], reuse=reuse)
    assert torch.equal(run(traced, model, emitted, args, 2), model(*args))
    assert all(torch.equal(x, y) for x, y in zip(args, kept, strict=True))


def test_views_of_what_was_given_are_never_written_to():
    args = (torch.randn(2, 6, 4, dtype=WIDE),)
    model, traced, flow = graph_of(
        lambda x: x.reshape(12, 4).mul(2.0).add(x.view(12, 4)).exp(), *args
    )
    kept = args[0].clone()
    emitted = emit(flow, [])
    assert torch.equal(run(traced, model, emitted, args), model(*args))
    assert torch.equal(args[0], kept)


def test_a_value_that_is_read_again_is_not_overwritten():
    """In place only where nobody reads the operand later, views of it included."""

    def function(x: Tensor):
        y = x.exp()
        view = y.transpose(1, 2)
        z = y.mul(3.0)
        return z + view.transpose(1, 2), y.tanh(), view.sum(1)

    args = (torch.randn(2, 5, 5, dtype=WIDE),)
    model, traced, flow = graph_of(function, *args)
    for got, wanted in zip(run(traced, model, emit(flow, []), args), model(*args), strict=True):
        assert torch.equal(got, wanted)


def test_an_operand_read_in_another_arrangement_is_not_overwritten():
    args = (torch.randn(3, 5, 5, dtype=WIDE),)
    model, traced, flow = graph_of(lambda x: (lambda y: y + y.transpose(1, 2))(x.exp()), *args)  # noqa: PLC3002
    assert torch.equal(run(traced, model, emit(flow, []), args), model(*args))


def test_writing_again_saves_what_it_should():
    """A chain of pointwise operations holds one tensor, not two."""
    from hairpin.graph.meter import measure

    args = (torch.randn(4, 8, 8, dtype=WIDE),)
    _, _, flow = graph_of(lambda x: x.exp().mul(2.0).add(1.0).tanh(), *args)
    size = args[0].numel() * 8
    kept = measure(emit(flow, [], reuse=False).module, args).peak_bytes
    again = measure(emit(flow, [], reuse=True).module, args).peak_bytes
    assert (kept, again) == (
        2 * size + 8,
        size + 8,
    )  # and the number 2.0, for as long as it is read


def test_the_same_graph_fits_every_block_of_its_structure():
    torch.manual_seed(0)
    first, second = Block().double().eval(), Block().double().eval()
    args = (torch.randn(2, 9, 8, dtype=WIDE),)
    traced = trace(first, args, {})
    emitted = emit(flow_of(traced.graph), [])
    for block in (first, second):
        got = run(traced, block, emitted, args)
        torch.testing.assert_close(got, block(*args), rtol=1e-13, atol=1e-13)
