"""What a recording says of a run: operations, their modules, shapes, work, memory."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hairpin.graph.axes import TensorRef
from hairpin.graph.trace import fake_inputs, recording


class Model(nn.Module):
    """A linear map inside a block, and an addition outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        self.offset = nn.Parameter(torch.zeros(5))
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x):
        return self.block(x) * self.scale + self.offset


def record(model, *inputs):
    with torch.no_grad(), recording(model) as recorder:
        out = model(*inputs)
    return out, recorder.recording


def test_operations_with_their_modules_and_parameters():
    _, run = record(Model(), torch.zeros(2, 3))
    assert [(call.name, call.module, call.sources) for call in run.calls] == [
        ("linear", "block.0", ("block.0.weight", "block.0.bias")),
        ("aten.relu", "block.1", ()),
        ("aten.mul", "", ("scale",)),
        ("aten.add", "", ("offset",)),
    ]


def test_shapes_stand_for_tensors():
    _, run = record(Model(), torch.zeros(2, 3))
    linear, _, scaled, _ = run.calls
    assert linear.operation.inputs == ((2, 3), (5, 3), (5,))
    assert linear.operation.outputs == ((2, 5),)
    assert linear.operation.arguments["weight"] == TensorRef(1)
    assert scaled.operation.inputs == ((2, 5), (5,))
    assert scaled.operation.arguments["other"] == TensorRef(1)


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.matmul, [(7, 3), (3, 5)], 2 * 7 * 3 * 5),
        (torch.bmm, [(4, 7, 3), (4, 3, 5)], 4 * 2 * 7 * 3 * 5),
        (F.linear, [(6, 7, 3), (5, 3)], 6 * 2 * 7 * 3 * 5),
        (
            lambda a, b: torch.einsum("bij,bjk->bik", a, b),
            [(4, 7, 3), (4, 3, 5)],
            4 * 2 * 7 * 3 * 5,
        ),
        (torch.add, [(7, 3), (7, 3)], 0),
        (F.conv1d, [(2, 3, 9), (5, 3, 2)], 2 * 2 * 5 * 8 * 3 * 2),
        (F.scaled_dot_product_attention, [(2, 3, 7, 4)] * 3, 2 * 2 * 2 * 3 * 7 * 7 * 4),
    ],
)
def test_work(function, shapes, flops):
    class Calls(nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    _, run = record(Calls(), *[torch.zeros(shape) for shape in shapes])
    assert sum(call.flops for call in run.calls) == flops


def test_peak_of_live_bytes():
    class Steps(nn.Module):
        def forward(self, x):
            a = x + 1  # 1 alive
            b = a + 1  # 2
            c = (a * b).view(-1)  # 3, and a view costs nothing
            del a, b
            return c + 1  # 2

    x = torch.zeros(1000)
    out, run = record(Steps(), x)
    assert run.peak_bytes == 3 * 4000
    assert run.live_bytes == 4000
    del out
    gc.collect()
    assert run.live_bytes == 0


@pytest.mark.parametrize("fake", [False, True])
def test_weights_and_inputs_are_not_activations(fake):
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4)), nn.BatchNorm1d(100))
    x = torch.zeros(2, 100)
    if fake:
        with fake_inputs(x, torch.device("cpu")) as x:
            _, run = record(model.eval(), x.view(1, 2, 100)[0])
    else:
        _, run = record(model.eval(), x.view(1, 2, 100)[0])
    assert run.peak_bytes == 2 * 800


def test_a_run_on_fake_tensors_has_the_same_operations():
    model = Model()
    _, real = record(model, torch.zeros(2, 3))
    with fake_inputs(torch.zeros(2, 3), torch.device("cpu")) as x:
        out, fake = record(model, x)
    assert [c.name for c in fake.calls] == [c.name for c in real.calls]
    assert [c.operation for c in fake.calls] == [c.operation for c in real.calls]
    assert fake.peak_bytes == real.peak_bytes
    assert out.shape == (2, 5)


def test_a_terabyte_is_recorded_without_taking_it():
    with torch.device("meta"):
        model = nn.Linear(2**12, 2**12)
    example = torch.empty(2**16, 2**12, 2**10, device="meta").transpose(1, 2)
    with fake_inputs(example, torch.device("meta")) as x:
        _, run = record(model, x)
    assert run.peak_bytes >= 2**40


def test_nothing_stays_on_the_model():
    model = Model()
    record(model, torch.zeros(2, 3))
    with pytest.raises(RuntimeError), recording(model):
        model(torch.zeros(2, 4))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
