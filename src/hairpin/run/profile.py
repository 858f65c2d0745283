"""What one step of a model costs on this rank: peak memory, time, bytes sent.

On CPU the peak is exact: the running sum of every allocation and release that the profiler records,
not a sample. On CUDA it is the allocator's own high-water mark.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from hairpin.comm.mesh import Mesh, Traffic
from hairpin.errors import HairpinError
from hairpin.planning.example import as_example
from hairpin.units import format_bytes, format_time

Loss = Callable[[Any], Tensor]


class ProfileError(HairpinError, ValueError):
    """A step cannot be measured as asked."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of one step on this rank.

    Attributes:
        peak_bytes: most memory in use during the step beyond what was in use before it: activations
            and, with a backward, gradients; not parameters, not inputs.
        parameter_bytes: parameters and buffers held by this rank.
        time_s: median wall time, measured without the profiler.
        bytes_sent: payload bytes sent to other ranks; 0 where no mesh was given.
        messages: messages sent to single ranks.
        collectives: transfers begun.
        backward: whether a backward is part of the step.
        device: type of device, such as ``"cpu"``.
    """

    peak_bytes: int
    parameter_bytes: int
    time_s: float
    bytes_sent: int
    messages: int
    collectives: int
    backward: bool
    device: str

    def __str__(self) -> str:
        step = "forward and backward" if self.backward else "forward"
        rows = {
            "step": f"{step} on {self.device}",
            "peak memory": f"{format_bytes(self.peak_bytes)} beyond parameters and inputs",
            "parameters": format_bytes(self.parameter_bytes),
            "time": format_time(self.time_s),
            "sent": f"{format_bytes(self.bytes_sent)} in {self.messages} messages, "
            f"{self.collectives} transfers",
        }
        return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


def profile(
    model: nn.Module,
    inputs: Any,
    *,
    backward: bool = False,
    loss: Loss | None = None,
    mesh: Mesh | None = None,
    repeats: int = 3,
) -> Profile:
    """Measure one step of ``model`` on this rank. Under a plan, call it on all ranks alike.

    The model's parameters, their gradients and the global random state are left as they were;
    buffers that a forward updates are not.

    Args:
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        backward: run a backward too.
        loss: scalar of the model's output to go back from; default: the sum of all its tensors.
        mesh: counts what is sent over it.
        repeats: timed steps, after one that is not timed; the median counts.

    Raises:
        PlanError: ``inputs`` is something else.
        ProfileError: a backward is asked for and no output carries a gradient.
    """
    args, kwargs = as_example(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def step() -> None:
        with torch.set_grad_enabled(backward):
            output = model(*args, **kwargs)
            if backward:
                (loss or _total)(output).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with _undisturbed(model, device):
        before = _traffic(mesh)
        step()
        sent = _traffic(mesh).since(before)
        times_s = [_timed(model, step) for _ in range(repeats)]
        _drop_gradients(model)
        peak = _peak_cuda_bytes if device.type == "cuda" else peak_cpu_bytes
        peak_bytes = peak(step)
    return Profile(
        peak_bytes=peak_bytes,
        parameter_bytes=sum(_bytes(t) for t in (*model.parameters(), *model.buffers())),
        time_s=median(times_s),
        bytes_sent=sent.bytes_sent,
        messages=sent.messages,
        collectives=sent.collectives,
        backward=backward,
        device=device.type,
    )


def _traffic(mesh: Mesh | None) -> Traffic:
    return mesh.traffic.snapshot() if mesh is not None else Traffic()


def _timed(model: nn.Module, step: Callable[[], None]) -> float:
    _drop_gradients(model)
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def peak_cpu_bytes(step: Callable[[], None]) -> int:
    """Most bytes in use on the CPU during ``step`` beyond what was in use before it, exactly.

    The highest running sum of what the profiler sees allocated less what it sees released.
    """
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    result = profiler.profiler.kineto_results if profiler.profiler else None
    assert result is not None
    events = [event for event in result.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def _peak_cuda_bytes(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put gradients aside and give them, and the random state, back."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    _drop_gradients(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _total(output: Any) -> Tensor:
    """The sum of all tensors of an output that carry a gradient."""
    sums = [tensor.sum() for tensor in _tensors(output) if tensor.requires_grad]
    if not sums:
        raise ProfileError(
            f"no tensor in the model's output ({type(output).__name__}) carries a gradient, so "
            "there is no backward to measure; give loss=, or leave backward=False"
        )
    return torch.stack([s.real if s.is_complex() else s for s in sums]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
