"""Loops over rows that neighbouring chunks share: convolutions, against eager."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hairpin as hp
from hairpin.graph.axes import Span
from hairpin.graph.export import packed_outputs, trace
from hairpin.graph.halo import bounds, has_halo
from hairpin.planning.loops.emit import Region, emit
from hairpin.planning.loops.search import Search
from hairpin.run.profile import peak_cpu_bytes
from planning.looping import WIDE, try_regions


class Layers(nn.Module):
    """A function of an image and convolutions."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def conv(*sizes, kind=nn.Conv2d, **settings):
    return kind(*sizes, **settings).double()


def norm(*sizes, **settings):
    made = nn.GroupNorm(*sizes, **settings).double()
    for tensor in made.parameters():
        nn.init.normal_(tensor)
    return made


def up(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


MODELS = {
    "3 x 3": lambda: Layers(lambda x, c: c(x.exp()).tanh(), conv(3, 4, 3, padding=1)),
    "5 x 5": lambda: Layers(lambda x, c: c(x), conv(3, 4, 5, padding=2, bias=False)),
    "apart": lambda: Layers(lambda x, c: c(x), conv(3, 4, 3, padding=2, dilation=2)),
    "uneven": lambda: Layers(lambda x, c: c(x), conv(3, 4, (3, 1), padding=(1, 0))),
    "stride 2": lambda: Layers(lambda x, c: c(x.exp()).tanh(), conv(3, 4, 3, padding=1, stride=2)),
    "windows of 4": lambda: Layers(lambda x, c: c(x), conv(3, 4, 4, padding=1, stride=2)),
    "groups": lambda: Layers(lambda x, c: c(x), conv(3, 6, 3, padding=1, groups=3)),
    "two": lambda: Layers(
        lambda x, a, b: b(a(x.exp()).relu()), conv(3, 4, 3, padding=1), conv(4, 2, 5, padding=2)
    ),
    "beside itself": lambda: Layers(
        lambda x, c: (lambda y: y + c(y.sin()))(x.exp()),  # noqa: PLC3002
        conv(3, 3, 3, padding=1),
    ),
    "two beside": lambda: Layers(
        lambda x, a, b: (lambda y: y * a(y) + b(y))(x.exp()),  # noqa: PLC3002
        conv(3, 3, 3, padding=1),
        conv(3, 3, 5, padding=2),
    ),
    "normed": lambda: Layers(
        lambda x, g, c: c(g(x.exp()).tanh()) + 1, norm(3, 3), conv(3, 4, 3, padding=1)
    ),
    "normed twice": lambda: Layers(
        lambda x, g, c, h: (lambda y: y + c(F.silu(h(c(F.silu(g(y)))))))(x.exp()),  # noqa: PLC3002
        norm(1, 3, affine=False),
        conv(3, 3, 3, padding=1),
        norm(3, 3),
    ),
    "larger": lambda: Layers(lambda x, c: c(up(x.exp())).tanh(), conv(3, 4, 3, padding=1)),
    "smaller and larger": lambda: Layers(
        lambda x, a, b: b(up(a(x))), conv(3, 4, 3, padding=1, stride=2), conv(4, 3, 3, padding=1)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_region_computes_the_same(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6, dtype=WIDE)
    found = try_regions(MODELS[name]().eval(), (x,), others=[(torch.randn_like(x[..., :4]),)])
    assert found.runs, "nothing to loop over"
    assert not found.faults, found.faults[:3]


@pytest.mark.parametrize("length", [7, 13])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_odd_lengths_and_dims(dims, length):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = Layers(lambda x, c: c(x.exp()).tanh(), conv(2, 3, 3, padding=1, kind=kind)).eval()
    found = try_regions(model, (torch.randn(1, 2, length, *[4] * (dims - 1), dtype=WIDE),))
    assert found.runs
    assert not found.faults, found.faults[:3]


def test_a_convolution_by_rows_holds_no_more_than_its_parts():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 64, 64)
    model = Layers(
        lambda x, a, b: b(a(x).relu()),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(32, 4, 3, padding=1),
    ).eval()
    whole = peak_cpu_bytes(lambda: run(model, x))
    plan = hp.plan(model, x, memory=whole // 3)
    expected = run(model, x)
    hp.parallelize(model, plan)
    measured = peak_cpu_bytes(lambda: run(model, x))
    assert measured == plan.peak_bytes <= whole // 3
    error = (run(model, x) - expected).abs().max() / expected.abs().max()
    assert error <= 2e-6


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", ["two", "normed", "stride 2"])
def test_gradients_of_overlapping_rows(name):
    """Every region as a loop, and its backward."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x = torch.randn(1, 3, 10, 5, dtype=WIDE, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    traced = trace(model, (x,), {})
    search = Search.of(traced)
    overlapping = 0
    for candidate in search.found:
        emitted = emit(
            search.flow, [Region(candidate.start, candidate.end, candidate.seed)], reuse=False
        )
        loop = emitted.module.get_submodule("loop_1")
        overlapping += any(has_halo(cut) for cut in loop.cuts)
        values = emitted.module(*traced.flat_inputs(model, model.forward, (x,), {}), 2)
        out = packed_outputs(traced, values)
        got = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert overlapping


def test_a_training_step_with_overlapping_rows():
    torch.manual_seed(0)
    model = MODELS["two"]().eval()
    x = torch.randn(1, 3, 11, 5, dtype=WIDE, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    plan = hp.plan(model, x, memory=hp.estimate(model, x, backward=True) - 1, backward=True)
    hp.parallelize(model, plan)
    assert plan.loops
    got = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_parts_end_at_the_edges():
    span = Span(0, 2, 3, 1)
    assert bounds(span, 0, 1, 10) == (0, 3)
    assert bounds(span, 2, 1, 10) == (1, 7)
    assert bounds(span, 4, 1, 10) == (5, 10)
