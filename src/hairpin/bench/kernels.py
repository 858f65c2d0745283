"""Time and memory of the kernels against what torch has, forward and with a backward.

Sizes are those of a triangle update of AlphaFold at R residues: the pair representation
``z[R, R, 128]``, 4 heads of 32 channels.

Dims: b = q = k = R residues, h heads, d channels of a head, c channels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hairpin import kernels
from hairpin.bench.measure import machine
from hairpin.bench.steps import Say, Step, peak_bytes
from hairpin.kernels.attention import key_bias
from hairpin.kernels.choice import why_not_here

OPERATIONS = ("attention", "gated_residual", "layer_norm", "gated_projections")
CPU_LENGTHS, CUDA_LENGTHS = (32, 64, 128), (256, 512, 1024, 2048, 4096)
_HEADS, _HEAD_DIM, _CHANNELS = 4, 32, 128
_RATE = 0.25

Contender = Callable[..., Tensor]
Random = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        operations: of ``OPERATIONS``.
        lengths: R; none: ``CUDA_LENGTHS`` where there is a device, else ``CPU_LENGTHS``.
        rounds: timed turns; the median counts.
    """

    operations: Sequence[str] = OPERATIONS
    lengths: Sequence[int] = ()
    rounds: int = 5


@dataclass(frozen=True)
class Row:
    """One contender on one length; time and peak are None where memory ran out."""

    operation: str
    length: int
    backward: bool
    contender: str
    time_s: float | None
    peak_bytes: int | None


def measure(settings: Settings, *, say: Say) -> dict[str, Any]:
    """Run all contenders. Gives plain data; ``say`` is told each row."""
    on_cuda = torch.cuda.is_available()
    random = partial(_random, device="cuda", dtype=torch.bfloat16) if on_cuda else _random
    about = machine()
    lengths = settings.lengths or (CUDA_LENGTHS if on_cuda else CPU_LENGTHS)
    rows = []
    for operation, length, backward in product(settings.operations, lengths, (False, True)):
        for row in _rows(operation, length, random, backward=backward, rounds=settings.rounds):
            say(_line(row))
            rows.append(row)
    return {
        "benchmark": "kernels",
        "machine": about,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "dtype": str(random(0).dtype),
        "gpu": _gpu(on_cuda=on_cuda),
        "settings": asdict(settings) | {"lengths": list(lengths)},
        "rows": [asdict(row) for row in rows],
    }


def _gpu(*, on_cuda: bool) -> str:
    if not on_cuda:
        return "not yet measured: torch sees no CUDA device"
    reason = why_not_here()
    return "measured" if reason is None else f"torch's own operations only: {reason}"


def _rows(operation: str, length: int, random: Random, *, backward: bool, rounds: int) -> list[Row]:
    make, contenders = _SUBJECTS[operation]
    tensors = make(length, random)
    for tensor in tensors:
        tensor.requires_grad_(backward and tensor.dim() != 2)  # those of two dims are masks
    steps = {name: _step(f, tensors, backward=backward) for name, f in contenders.items()}
    figures = _figures(steps, tensors[0].device, rounds)
    return [
        Row(operation, length, backward, name, time_s, peak)
        for name, (time_s, peak) in figures.items()
    ]


def _random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _step(contender: Contender, tensors: Sequence[Tensor], *, backward: bool) -> Step:
    learning = [tensor for tensor in tensors if tensor.requires_grad]

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = contender(*tensors)
            if backward:
                torch.autograd.grad(out, learning, torch.ones_like(out))

    return step


def _figures(
    steps: Mapping[str, Step], device: torch.device, rounds: int
) -> dict[str, tuple[float | None, int | None]]:
    """Time and peak of each step; they take turns, and each round begins with another one."""
    peaks = {name: _peak(step, device) for name, step in steps.items()}
    names = [name for name, peak in peaks.items() if peak is not None]
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            times_s[name].append(_time(steps[name], device))
    return {
        name: (median(times_s[name]) if name in times_s else None, peaks[name]) for name in steps
    }


def _peak(step: Step, device: torch.device) -> int | None:
    """Most bytes beyond those before the step; None where they do not fit."""
    if device.type == "cpu":
        return peak_bytes(step)
    try:
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return torch.cuda.max_memory_allocated() - before


def _time(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start_s = time.process_time()
        step()
        return time.process_time() - start_s
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _line(row: Row) -> str:
    what = "forward and backward" if row.backward else "forward"
    start = f"{row.operation}, R = {row.length}, {what}, {row.contender}: "
    if row.time_s is None or row.peak_bytes is None:
        return start + "out of memory"
    return f"{start}{row.time_s * 1e3:.2f} ms, {row.peak_bytes / 2**20:.1f} MiB"


# ----------------------------------------------------------------------------------- contenders

Make = Callable[[int, Random], list[Tensor]]


def _attention_inputs(r: int, random: Random) -> list[Tensor]:
    """Heads lie beside channels, as linear layers leave them; the last residue is masked."""
    q, k, v = (random(r, r, _HEADS, _HEAD_DIM).transpose(1, 2) for _ in range(3))
    mask = torch.ones_like(q[:, 0, :, 0])
    mask[:, -1] = 0
    return [q, k, v, mask, random(_HEADS, r, r)]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return kernels.attention(q, k, v, mask=mask, bias=bias)


def _attend_eagerly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    logits: Tensor = (
        (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias + key_bias(mask, q.dtype)
    )
    return logits.softmax(-1) @ v


def _attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    added = bias[None] + key_bias(mask, q.dtype)  # [b, h, q, k]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def _gated_inputs(r: int, random: Random) -> list[Tensor]:
    x, gate, residual = (random(r, r, _CHANNELS) for _ in range(3))
    return [x, gate, residual, torch.rand_like(x[0]).gt(_RATE).to(x.dtype) / (1 - _RATE)]


def _gate(x: Tensor, gate: Tensor, residual: Tensor, kept: Tensor) -> Tensor:
    return kernels.gated_residual(x, gate=gate, kept=kept[None], residual=residual)


def _gate_eagerly(x: Tensor, gate: Tensor, residual: Tensor, kept: Tensor) -> Tensor:
    return residual + torch.sigmoid(gate) * x * kept[None]


def _gate_by_addcmul(x: Tensor, gate: Tensor, residual: Tensor, kept: Tensor) -> Tensor:
    return torch.addcmul(residual, torch.sigmoid(gate) * x, kept[None])


def _norm_inputs(r: int, random: Random) -> list[Tensor]:
    return [random(r, r, _CHANNELS), random(_CHANNELS), random(_CHANNELS)]


def _norm_by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _projection_inputs(r: int, random: Random) -> list[Tensor]:
    """``z``, its mask, and for both operands weight and gate's weight; biases after them."""
    weights = [random(1, _CHANNELS, _CHANNELS) / _CHANNELS**0.5 for _ in range(4)]
    mask = torch.ones_like(random(r, r))
    return [random(r, r, _CHANNELS), mask, *weights, *(random(_CHANNELS) for _ in range(4))]


def _layers(tensors: Sequence[Tensor]) -> tuple[kernels.GatedLinear, kernels.GatedLinear]:
    a, b, c, d, *biases = tensors
    left = kernels.GatedLinear(a[0], biases[0], b[0], biases[1])
    return left, kernels.GatedLinear(c[0], biases[2], d[0], biases[3])


def _project(z: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
    """Both operands and their product, which reads them in the layout they lie in."""
    return _multiply(*kernels.gated_projections(z, mask, *_layers(tensors)))


def _project_apart(z: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
    a, b = (
        torch.sigmoid(F.linear(z, layer.gate_weight, layer.gate_bias))
        * F.linear(z, layer.weight, layer.bias)
        * mask[..., None]
        for layer in _layers(tensors)
    )
    return _multiply(a, b)


def _project_merged(z: Tensor, mask: Tensor, *tensors: Tensor) -> Tensor:
    left, right = _layers(tensors)
    both = kernels.GatedLinear(*(torch.cat(pair) for pair in zip(left, right, strict=True)))
    gate = torch.sigmoid(F.linear(z, both.gate_weight, both.gate_bias))
    a, b = (gate * F.linear(z, both.weight, both.bias) * mask[..., None]).chunk(2, -1)
    return _multiply(a, b)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a.permute(2, 0, 1) @ b.permute(2, 1, 0)


_SUBJECTS: Mapping[str, tuple[Make, Mapping[str, Contender]]] = {
    "attention": (
        _attention_inputs,
        {"hairpin": _attend, "eager": _attend_eagerly, "sdpa": _attend_by_sdpa},
    ),
    "gated_residual": (
        _gated_inputs,
        {"hairpin": _gate, "eager": _gate_eagerly, "addcmul": _gate_by_addcmul},
    ),
    "layer_norm": (_norm_inputs, {"hairpin": kernels.layer_norm, "torch": _norm_by_torch}),
    "gated_projections": (
        _projection_inputs,
        {"hairpin": _project, "apart": _project_apart, "merged": _project_merged},
    ),
}
