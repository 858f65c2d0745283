"""The four methods compute what one process computes, and send what their formulas say."""

from typing import Any

import numpy as np
import pytest
import torch

from hairpin.bench.measure import join
from hairpin.bench.methods import METHODS, sent_bytes
from hairpin.bench.network import Loopback
from hairpin.bench.transformer import Size, SizeError, build
from hairpin.layout import shard_offset, shard_size
from hairpin.run.launch import launch

EVEN = Size(b=2, t=4, s=8, c=24, heads=4)
UNEVEN = Size(b=2, t=5, s=7, c=24, heads=4, pairs=2)
FEWER_THAN_RANKS = Size(t=2, s=3, c=24, heads=2)


def whole_input(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """``x[b, t, s, c]`` and the cotangent of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, size.b, size.t, size.s, size.c)
    return torch.randn(shape, generator=generator, dtype=torch.float64).unbind()


def run_rank(size: Size) -> dict[str, Any]:
    """All methods on one rank: values, gradients, bytes sent in the forward and the backward."""
    mesh = join(Loopback())
    ranks, rank = mesh.size("sp"), mesh.rank("sp")
    part = slice(
        offset := shard_offset(size.t, ranks, rank), offset + shard_size(size.t, ranks, rank)
    )
    x, cotangent = (whole[:, part] for whole in whole_input(size))
    results = {}
    for name, method_of in METHODS.items():
        method = method_of(build(size, dtype=torch.float64), size, mesh)
        mine = x.clone().requires_grad_()
        begun = mesh.traffic.snapshot()
        y = method(mine)
        middle = mesh.traffic.snapshot()
        y.backward(cotangent)
        sent = middle.since(begun).bytes_sent, mesh.traffic.since(middle).bytes_sent
        gradients = {key: value.numpy() for key, value in method.gradients().items()}
        results[name] = (y.detach().numpy(), mine.grad.numpy(), gradients, sent)
    return results


def run_whole(size: Size) -> tuple[Any, Any, dict[str, Any]]:
    """The truth, from one process: output, gradient of the input, gradients by parameter."""
    model = build(size, dtype=torch.float64)
    x, cotangent = whole_input(size)
    x.requires_grad_()
    y = model(x)
    y.backward(cotangent)
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return y.detach().numpy(), x.grad.numpy(), gradients


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("size", [EVEN, UNEVEN, FEWER_THAN_RANKS], ids=["even", "uneven", "few"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_values_gradients_and_bytes(ranks, size):
    ((y, dx, gradients),) = launch(run_whole, 1, size, timeout_s=60)
    by_rank = launch(run_rank, ranks, size, timeout_s=60)
    for name in METHODS:
        values, input_gradients, terms, sent = zip(*(rank[name] for rank in by_rank), strict=True)
        assert relative(np.concatenate(values, 1), y) <= 1e-12, name
        assert relative(np.concatenate(input_gradients, 1), dx) <= 1e-12, name
        for key, want in gradients.items():
            total = sum(rank[key] for rank in terms)
            assert relative(total, want) <= 1e-12, f"{name}: {key}"
        both_ways = tuple(map(sum, zip(*sent, strict=True)))
        assert both_ways == sent_bytes(name, size, ranks, element_bytes=8), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_the_papers(ranks):
    size = Size(t=16, s=64, c=32, heads=4)
    m_bytes, n = size.activation_elements * 4, ranks
    want = {
        "dsp": 2 * m_bytes * (n - 1) / n**2,
        "ulysses": 4 * m_bytes * (n - 1) / n**2,
        "ring": 2 * m_bytes * (n - 1) / n,
        "megatron": 8 * m_bytes * (n - 1) / n,
    }
    assert {name: sent_bytes(name, size, n)[0] / n for name in METHODS} == want


def test_heads_must_divide_channels():
    with pytest.raises(SizeError, match="30 channels do not divide into 4 heads"):
        Size(c=30, heads=4)
