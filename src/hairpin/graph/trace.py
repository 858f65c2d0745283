"""Recording the operations of a model run, with the module each belongs to and every shape.

A run on fake tensors costs no memory and no arithmetic, so a model of any size can be recorded at
its global shape and again at the shape that one rank of a split would see.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hairpin.graph.axes import Operation, Shape, composite, operation

__all__ = ["OpCall", "Recording", "Shape", "fake_inputs", "recording"]


@dataclass(frozen=True)
class OpCall:
    """One call of an ATen operation.

    Attributes:
        name: overload packet, such as ``"aten.addmm"``, or ``"linear"``, ``"matmul"``,
            ``"einsum"``, ``"reshape"``, ``"tensor"``, which are kept whole.
        module: path of the innermost module running, ``""`` for the root.
        place: how many stages had begun and how many had ended, set by the planner's hooks.
        operation: the call as the rules of :mod:`hairpin.graph.axes` see it.
        sources: names of parameters and buffers among the inputs.
        flops: multiply and add operations, 0 where torch knows no formula.
    """

    name: str
    module: str
    place: tuple[int, int]
    operation: Operation
    sources: tuple[str, ...]
    flops: int
    tags: tuple[Any, ...]


@dataclass
class Recording:
    """All operations of one run, and the peak of bytes that were alive outside the parameters."""

    calls: list[OpCall] = field(default_factory=list)
    peak_bytes: int = 0
    live_bytes: int = 0
    failed_in: str | None = None


class _Recorder(TorchDispatchMode):
    """Writes down every operation that passes through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self.path: list[str] = [""]
        self.place = (0, 0)
        self.muted = False
        self.muted_flops = 0
        self._names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:  # a view holds no bytes of its own; of a weight, none that we count
            for result in _tensors(out):
                self._count(result)
        if func.namespace != "prim":
            flops = _flops(func, args, kwargs, out)
            if self.muted:
                self.muted_flops += flops
            else:
                found = operation(func, args, kwargs, out)
                self._write(found.name, found, (args, kwargs), flops, tuple(func.tags))
        return out

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Write down no operation inside the block; memory is still counted."""
        was_muted, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = was_muted

    def composite(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a composite function and write it down as one operation."""
        before = self.muted_flops
        with self.quietly():
            out = func(*args, **kwargs)
        if not self.muted:
            found = composite(_ATEN.get(name, f"aten.{name}"), args, kwargs, out)
            self._write(name, found, (args, kwargs), self.muted_flops - before, ())
        return out

    def _write(
        self, name: str, found: Operation, given: Any, flops: int, tags: tuple[Any, ...]
    ) -> None:
        names = (self._names.get(id(tensor)) for tensor in _tensors(given))
        self.recording.calls.append(
            OpCall(
                name=name,
                module=self.path[-1],
                place=self.place,
                operation=found,
                sources=tuple(name for name in names if name is not None),
                flops=flops,
                tags=tags,
            )
        )

    def _count(self, result: Tensor) -> None:
        """Add a new storage to the live bytes until it is freed."""
        storage = result.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size_bytes = storage.nbytes()
        recording = self.recording
        recording.live_bytes += size_bytes
        recording.peak_bytes = max(recording.peak_bytes, recording.live_bytes)

        def freed(known: set[int] = self._known) -> None:
            known.discard(key)
            recording.live_bytes -= size_bytes

        weakref.finalize(storage, freed)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


_ATEN = MappingProxyType({"tensor": "aten.lift_fresh"})
"""What ATen does in the functions that have another name there."""

_RESHAPES = (
    torch.reshape,
    torch.flatten,
    torch.Tensor.reshape,
    torch.Tensor.reshape_as,
    torch.Tensor.flatten,
    torch.Tensor.unflatten,
    torch.Tensor.view_as,
)


class _Composites(TorchFunctionMode):
    """Hands some functions to the recorder whole, before torch takes them apart.

    Products and reshapes: how torch does them depends on strides and on lengths of 1, not only on
    what is computed. Constants: their values are seen here and no longer below.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.names = {
            torch.nn.functional.linear: "linear",
            torch.matmul: "matmul",
            torch.Tensor.matmul: "matmul",
            torch.Tensor.__matmul__: "matmul",
            torch.einsum: "einsum",
            torch.tensor: "tensor",
            torch.as_tensor: "tensor",
            **dict.fromkeys(_RESHAPES, "reshape"),
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = self.names.get(func)
        if func is torch.Tensor.view and not any(isinstance(a, torch.dtype) for a in args):
            name = "reshape"
        if name is None:
            return func(*args, **(kwargs or {}))
        return self.recorder.composite(name, func, args, kwargs or {})


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Multiply and add operations of one call; 0 where torch knows no formula."""
    if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tuple(x.shape) for x in args[:3])))
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


@contextmanager
def recording(model: nn.Module) -> Iterator[_Recorder]:
    """Record every operation inside the block, with the path of the module it runs in."""
    recorder = _Recorder(model)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_enter(recorder, path), prepend=True))
        handles.append(module.register_forward_hook(_leave(recorder)))
    try:
        with recorder, _Composites(recorder):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _enter(recorder: _Recorder, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        recorder.path.append(path)

    return hook


def _leave(recorder: _Recorder) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder.path.pop()

    return hook


@contextmanager
def fake_inputs(example: Any, device: torch.device) -> Iterator[Any]:
    """The example with every tensor replaced by a fake one on ``device``, inside fake mode.

    Parameters of the model may stay real or on the meta device; nothing is computed or allocated.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield tree_map_only(
            Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), example
        )
