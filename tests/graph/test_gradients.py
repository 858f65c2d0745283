"""Blocks that change their own gradients: refused where the graph is to be differentiated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hairpin.errors import TraceError
from hairpin.graph.export import trace

WIDTH = 8


class Does(nn.Module):
    """A linear layer, and then what a test asks for."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.function = [function]

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](self, self.linear(x))


class Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@torch.no_grad()
def _mean(y: Tensor) -> Tensor:
    return y.mean(-1, keepdim=True)


def _running_mean(block: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        block.mean.mul_(0.9).add_(y.mean((0, 1)))
    return y - block.mean


def _stopped_under_autocast(_: Any, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y * (y @ y.mT).float().detach().mean()


def _written_then_stopped(_: Any, y: Tensor) -> Tensor:
    whole = torch.zeros(y.shape)
    part = whole[:, :1]
    part.copy_(y[:, :1])
    return y * whole.detach()


def _in_inference_mode(_: Any, y: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = y.abs().amax()
    return y - scale


def _hooked(_: Any, y: Tensor) -> Tensor:
    y.register_hook(lambda grad: 2 * grad)
    return y * 2


def _inner_gradient(_: Any, y: Tensor) -> Tensor:
    with torch.enable_grad():
        free = y.clone().requires_grad_()
        (grad,) = torch.autograd.grad(free.square().sum(), free)
    return y * grad


CHANGES = {
    "detach": (lambda _, y: y * y.detach().amax(-1, keepdim=True), "detach"),
    "a straight-through estimator": (lambda _, y: y + (y.round() - y).detach(), "detach"),
    "a decorated helper": (lambda _, y: y - _mean(y), "no_grad"),
    "a buffer's new value": (_running_mean, "no_grad"),
    "detach under autocast": (_stopped_under_autocast, "detach"),
    "detach of what was written into": (_written_then_stopped, "detach"),
    "inference mode": (_in_inference_mode, "inference_mode"),
    "a hook": (_hooked, "register_hook"),
    "a gradient inside": (_inner_gradient, "autograd.grad"),
    "a function of its own": (lambda _, y: Reversed.apply(y), "autograd function Reversed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_block_that_changes_its_gradients_is_refused_by_name(name: str) -> None:
    function, word = CHANGES[name]
    with pytest.raises(TraceError, match=f"Does changes its own gradients.*{word}"):
        trace(Does(function), (torch.randn(2, 5, WIDTH),), {}, backward=True)


def _index(_: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        best = y.argmax(-1, keepdim=True)
    return y.gather(-1, best)


def _in_grad_mode(_: Any, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return y * 2


HARMLESS = {
    "detach of positions": lambda _, y: y * torch.arange(y.shape[1]).float().detach()[:, None],
    "detach of a comparison": lambda _, y: y * (y > 0).detach(),
    "a constant": lambda _, y: y * torch.tensor(3.0),
    "an index": _index,
    "enable_grad": _in_grad_mode,
    "a checkpoint": lambda block, y: checkpoint(block.linear, y, use_reentrant=False),
    "attention": lambda _, y: nn.functional.scaled_dot_product_attention(y, y, y),
    "batch norm": lambda block, y: nn.functional.batch_norm(
        y.flatten(0, 1), block.mean.clone(), torch.ones(WIDTH), training=True
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_gradient_is_the_same_graph_for_training(name: str) -> None:
    x = torch.randn(2, 5, WIDTH)
    block = Does(HARMLESS[name])
    assert trace(block, (x,), {}, backward=True).digest == trace(block, (x,), {}).digest


@pytest.mark.parametrize("name", ["detach", "a decorated helper", "a function of its own"])
def test_a_graph_for_a_forward_alone_is_made_as_ever(name: str) -> None:
    function, _ = CHANGES[name]
    trace(Does(function), (torch.randn(2, 5, WIDTH),), {})


def test_nothing_stays_of_what_was_watched() -> None:
    before = torch.autograd.Function.__dict__["apply"].__func__
    hook = Tensor.register_hook
    trace(Does(lambda _, y: y), (torch.randn(2, 5, WIDTH),), {}, backward=True)
    assert torch.autograd.Function.__dict__["apply"].__func__ is before
    assert Tensor.register_hook is hook
