"""Four ways to run the 2-D transformer split over ranks, each as good as its authors could make it.

Input and output of all four are ``x[b, t/sp, s, c]``; all move bytes through the same transport.
M is the whole activation, N the ranks; sent per rank in the forward of a pair of layers:

- ``dsp``: Dynamic Sequence Parallelism (arXiv 2403.10266), 2 M (N-1)/N^2.
- ``ulysses``: DeepSpeed-Ulysses (arXiv 2309.14509), 4 M (N-1)/N^2; q, k and v travel together.
- ``ring``: Ring Attention (arXiv 2310.01889), 2 M (N-1)/N; transfers run behind the attention.
- ``megatron``: tensor with sequence parallelism (arXiv 2205.05198), 8 M (N-1)/N; the gathered
  activation is kept, so the backward gathers nothing twice, and its reduce-scatter runs behind
  the weight gradient.

Dims: b batch, t frames, s patches, c channels, h heads, d channels of a head, n items of a shard.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hairpin.bench.transformer import Layer, Size, Transformer2d, attention, fold, unfold
from hairpin.comm.mesh import Mesh
from hairpin.comm.verbs import gather, reduce_scatter, switch
from hairpin.exchange.api import attention as ring_attention
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.layout import Layout, shard_offset, shard_size, shard_sizes

AXIS = "sp"
Split = tuple[Layout, Mesh]


class Method(Protocol):
    """A split transformer: ``x[b, t/sp, s, c] -> x[b, t/sp, s, c]``.

    Attributes:
        model: holds the parameters of which every rank has a copy.
    """

    model: Transformer2d

    def __call__(self, x: Tensor) -> Tensor:
        """The forward."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """This rank's term of every whole parameter's gradient; the sum over ranks is the truth."""
        ...


class Dsp:
    """The split turns to patches before a layer along frames, and back after it."""

    def __init__(self, model: Transformer2d, size: Size, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.frames = Layout("b t/sp s c", b=size.b, t=size.t, s=size.s, c=size.c)
        self.patches = self.frames.split("s", AXIS)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.model:
            if layer.along == "t":
                x = switch(x, self.frames, self.patches, self.mesh)  # x[b, t, s/sp, c]
                x = layer(x)
                x = switch(x, self.patches, self.frames, self.mesh)  # x[b, t/sp, s, c]
            else:
                x = layer(x)
        return x

    def gradients(self) -> dict[str, Tensor]:
        return _gradients(self.model)


class Ulysses:
    """The split turns from frames to heads around the attention along frames."""

    def __init__(self, model: Transformer2d, size: Size, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        sizes = {"b": size.b, "t": size.t, "s": size.s, "h": size.heads, "d": size.c // size.heads}
        self.qkv = Layout("b t/sp s three h d", three=3, **sizes)
        self.out = Layout("b t/sp s h d", **sizes)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x, self._attend if layer.along == "t" else None)
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        qkv = switch(qkv, self.qkv, self.qkv.split("h", AXIS), self.mesh)  # [b, t, s, 3, h/sp, d]
        mixed = attention(qkv, along="t")
        return switch(mixed, self.out.split("h", AXIS), self.out, self.mesh)  # [b, t/sp, s, h, d]

    def gradients(self) -> dict[str, Tensor]:
        return _gradients(self.model)


class Ring:
    """Queries stay; keys and values of all frames pass by."""

    def __init__(self, model: Transformer2d, size: Size, mesh: Mesh) -> None:
        self.model, self.split = model, SequenceSplit(mesh, AXIS, Order("contiguous", size.t))

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x, self._attend if layer.along == "t" else None)
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (fold(x, along="t") for x in qkv.unbind(3))  # [(b s), h, t/sp, d]
        return unfold(ring_attention(q, k, v, self.split), batch=qkv.shape[0], along="t")

    def gradients(self) -> dict[str, Tensor]:
        return _gradients(self.model)


class Megatron:
    """Heads and hidden channels are split; activations between are split along frames."""

    def __init__(self, model: Transformer2d, size: Size, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.frames = Layout("b t/sp s c", b=size.b, t=size.t, s=size.s, c=size.c)
        self.parts = [_parts(size, mesh) for _ in model]
        self.weights = [
            {
                name: nn.Parameter(part.of(layer.get_parameter(name).detach()).clone())
                for name, part in parts.items()
            }
            for layer, parts in zip(model, self.parts, strict=True)
        ]
        for layer, parts in zip(model, self.parts, strict=True):
            for name in parts:
                layer.get_parameter(name).requires_grad_(False)  # this rank trains its part

    def __call__(self, x: Tensor) -> Tensor:
        for layer, weights in zip(self.model, self.weights, strict=True):
            x = x + self._attention(layer, weights, layer.norm1(x)) + layer.out.bias
            x = x + self._mlp(weights, layer.norm2(x)) + layer.down.bias
        return x

    def _attention(self, layer: Layer, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        qkv = self._enter(x, weights["qkv.weight"].flatten(0, 2), weights["qkv.bias"].flatten())
        qkv = qkv.unflatten(-1, weights["qkv.bias"].shape)  # [b, t, s, 3, h/sp, d]
        mixed = attention(qkv, along=layer.along).flatten(-2)
        return self._leave(F.linear(mixed, weights["out.weight"].flatten(1)))

    def _mlp(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.gelu(self._enter(x, weights["up.weight"], weights["up.bias"]))
        return self._leave(F.linear(hidden, weights["down.weight"]))

    def _enter(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = _GatherLinear.apply(x, weight, bias, (self.frames, self.mesh))
        return result

    def _leave(self, x: Tensor) -> Tensor:
        return reduce_scatter(x, self.frames, self.mesh)  # x[b, t/sp, s, c]

    def gradients(self) -> dict[str, Tensor]:
        terms = _gradients(self.model)
        for index, (weights, parts) in enumerate(zip(self.weights, self.parts, strict=True)):
            for name, weight in weights.items():
                whole = torch.zeros_like(self.model.get_parameter(f"layers.{index}.{name}"))
                if weight.grad is not None:
                    parts[name].of(whole).copy_(weight.grad)
                terms[f"layers.{index}.{name}"] = whole
        return terms


METHODS: Mapping[str, Callable[[Transformer2d, Size, Mesh], Method]] = {
    "dsp": Dsp,
    "ulysses": Ulysses,
    "ring": Ring,
    "megatron": Megatron,
}


def sent_bytes(method: str, size: Size, ranks: int, *, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes that all ranks together send in one forward and in one backward, exactly.

    Shards may be uneven: an all-to-all from a split of n items to a split of m items moves
    ``sum over i != j of len_n(i) len_m(j)`` times the rest.
    """
    m_bytes = size.activation_elements * element_bytes * size.pairs
    by_patches = m_bytes * _crossing(size.t, size.s, ranks) // (size.t * size.s)
    by_heads = m_bytes * _crossing(size.t, size.heads, ranks) // (size.t * size.heads)
    once_round = m_bytes * (ranks - 1)  # everyone's part visits everyone else
    forward = {
        "dsp": 2 * by_patches,
        "ulysses": 4 * by_heads,
        "ring": 2 * once_round,
        "megatron": 8 * once_round,
    }[method]
    return forward, 2 * forward if method == "ring" else forward


def _crossing(n: int, m: int, ranks: int) -> int:
    """Item pairs whose owner changes when the split turns from ``n`` items to ``m`` items."""
    stay = sum(a * b for a, b in zip(shard_sizes(n, ranks), shard_sizes(m, ranks), strict=True))
    return n * m - stay


@dataclass(frozen=True)
class _Part:
    """A rank's part of a whole parameter: viewed as ``view``, then a range of dim ``dim``."""

    view: tuple[int, ...]
    dim: int
    start: int
    length: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.view(self.view).narrow(self.dim, self.start, self.length)


def _parts(size: Size, mesh: Mesh) -> dict[str, _Part]:
    """Tensor parallelism: which part of which parameter this rank holds."""
    ranks, rank = mesh.size(AXIS), mesh.rank(AXIS)
    hidden, d = size.mlp_ratio * size.c, size.c // size.heads

    def part(length: int, dim: int, *view: int) -> _Part:
        offset, mine = shard_offset(length, ranks, rank), shard_size(length, ranks, rank)
        return _Part(view, dim, offset, mine)

    return {
        "qkv.weight": part(size.heads, 1, 3, size.heads, d, size.c),
        "qkv.bias": part(size.heads, 1, 3, size.heads, d),
        "out.weight": part(size.heads, 1, size.c, size.heads, d),
        "up.weight": part(hidden, 0, hidden, size.c),
        "up.bias": part(hidden, 0, hidden),
        "down.weight": part(hidden, 1, size.c, hidden),
    }


def _gradients(model: Transformer2d) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


class _GatherLinear(torch.autograd.Function):
    """All-gather ``x[b, t/sp, s, c]`` and multiply by this rank's columns.

    Backward: the reduce-scatter of the input's gradient runs behind the weight's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, split: Split) -> Tensor:
        whole = gather(x, *split, grad="partial")  # x[b, t, s, c]
        ctx.save_for_backward(whole, weight)
        ctx.split = split
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        whole, weight = ctx.saved_tensors
        coming = reduce_scatter(grad @ weight, *ctx.split, wait=False)
        rows = grad.flatten(0, -2)
        grad_weight, grad_bias = rows.T @ whole.flatten(0, -2), rows.sum(0)
        return coming.wait(), grad_weight, grad_bias, None
