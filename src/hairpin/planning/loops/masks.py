"""Dropout whose mask depends on a seed and on positions, not on how the work is cut in parts.

A program draws one seed per run from torch's CPU generator, ahead of its loops. Each element's
random number is a hash of the seed, the dropout's number in the graph, and the element's position
in the whole tensor: a turn of a loop makes its own part of the mask, its recomputation makes the
same part again, and activation checkpointing, which restores that generator, repeats all of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

_ROUNDS = (-4658895280553007687, -7723592293110705685)  # splitmix64 (Steele et al. 2014)
_GOLDEN = -7046029254386353131
_MIX = (0x2C1B3C6D, 0x297A2D39)  # odd, of well spread bits (Wellons 2018, "triple32" family)


def draw_seed() -> int:
    """A seed for one run of a program; on fake tensors, where no number is looked at, 0."""
    if detect_fake_mode() is not None:
        return 0
    with unset_fake_temporarily():
        return int(torch.randint(2**62, (), device="cpu").item())


def keyed_dropout(  # noqa: PLR0917 - called by graphs, by place
    x: Tensor, probability: float, seed: int, number: int, dim: int = 0, start: int = 0
) -> Tensor:
    """Zero each element with ``probability`` by its position, and scale up the rest.

    Args:
        x: the whole tensor, or the part of it that begins at ``start`` of ``dim``.
        seed: of the run.
        number: of this dropout in its graph.
    """
    out: Tensor = _Dropout.apply(x, probability, seed, number, dim, start)[0]
    return out


def keyed_native_dropout(  # noqa: PLR0917
    x: Tensor, probability: float, seed: int, number: int, dim: int = 0, start: int = 0
) -> tuple[Tensor, Tensor]:
    """The same, and the mask, true where an element is kept."""
    both: tuple[Tensor, Tensor] = _Dropout.apply(x, probability, seed, number, dim, start)
    return both


class _Dropout(torch.autograd.Function):
    """Keeps the mask for the backward, one byte an element, as torch's own does."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, probability: float, seed: int, number: int, dim: int, start: int
    ) -> tuple[Tensor, Tensor]:
        kept = mask(x, probability, seed, number, dim, start)
        ctx.scale = 0.0 if probability >= 1.0 else 1.0 / (1.0 - probability)
        ctx.save_for_backward(kept)
        ctx.mark_non_differentiable(kept)
        return x.mul(ctx.scale).mul_(kept), kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        (kept,) = ctx.saved_tensors
        return grad.mul(ctx.scale).mul_(kept), None, None, None, None, None


def mask(  # noqa: PLR0917
    x: Tensor, probability: float, seed: int, number: int, dim: int = 0, start: int = 0
) -> Tensor:
    """Which elements of ``x`` are kept: ``bool``, of its shape."""
    with torch.no_grad():
        shape = x.shape if x.dim() else torch.Size([1])
        rows = torch.full((), (seed + number * _GOLDEN) % 2**62, dtype=torch.int64, device=x.device)
        for place, length in enumerate(shape[:-1]):
            rows = _hash(rows.unsqueeze(-1) ^ _positions(x, length, start if place == dim else 0))
        columns = _hash(_positions(x, shape[-1], start if dim == len(shape) - 1 else 0))
        z = _short(_hash(rows)).unsqueeze(-1) ^ _short(columns)
        for factor in _MIX:
            z.mul_(factor)
            z.bitwise_xor_((z >> 15).bitwise_and_(0x1FFFF))
        threshold = min(max(round(probability * 2**32), 0), 2**32 - 1) - 2**31
        return z.mul_(_MIX[0]).ge(threshold).view(x.shape)


def _positions(x: Tensor, length: Any, start: int) -> Tensor:
    """Distinct 64-bit words for the positions along one dim."""
    return torch.arange(start + 1, start + 1 + length, dtype=torch.int64, device=x.device) * _GOLDEN


def _hash(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _ROUNDS[0]
    z = (z ^ _shift(z, 27)) * _ROUNDS[1]
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right of a signed 64-bit integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _short(z: Tensor) -> Tensor:
    """The low 32 bits."""
    return z.to(torch.int32)
