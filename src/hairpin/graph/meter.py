"""Bytes that are alive while a model runs, counted without allocating any of them.

Every tensor lives in a storage; a run's memory is the sum of the storages that exist at one time. A
run on fake tensors makes the same storages as a real one, only empty, so the peak of a real run can
be read off. What a kernel takes for itself while it runs is added from a table (workspace.py).
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hairpin.graph.strides import layout
from hairpin.graph.workspace import Formula, workspace_formula

Shape = tuple[int, ...]
_OWNED_BELOW = 3  # references to an argument that no Python code holds: ours
_OWNED_BY_ENGINE = (
    4  # and references to its tensor, ours among them, where one gradient buffer has it
)
_NUMBER_BYTES = 8  # a float or an int as a tensor
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Moment:
    """One change of the bytes that are alive.

    Attributes:
        op: operation that runs, such as ``"aten.addmm"``.
        label: what the caller said is running (``Meter.label``).
        live_bytes: after the allocation, with what the operation takes for itself as it runs.
    """

    op: str
    label: str
    live_bytes: int


@dataclass(frozen=True)
class Held:
    """A storage that was alive at the peak; for a kernel's own memory ``op`` ends in "workspace".

    Attributes:
        shape: of the first tensor in the storage.
    """

    label: str
    op: str
    nbytes: int
    shape: Shape
    dtype: str


@dataclass
class Timeline:
    """How many bytes were alive during a run.

    Attributes:
        at_peak: everything that was alive at the (first) peak, largest first; adds up to it.
        end_bytes: alive at the end, outputs included.
    """

    peak_bytes: int
    moments: list[Moment]
    at_peak: tuple[Held, ...]
    end_bytes: int


class _Block:
    """One storage: what it is, and at which allocations it came and went."""

    __slots__ = ("born", "died", "dtype", "label", "nbytes", "op", "reference", "shape")

    def __init__(
        self, op: str, label: str, nbytes: int, *, shape: Shape, dtype: torch.dtype, born: int
    ) -> None:
        self.op, self.label, self.nbytes, self.shape, self.dtype = op, label, nbytes, shape, dtype
        self.born = born
        self.died: int | None = None
        self.reference: Any = None  # keeps the weak reference, and so its callback, alive

    def held(self) -> Held:
        dtype = str(self.dtype).removeprefix("torch.")
        return Held(self.label, self.op, self.nbytes, self.shape, dtype)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the meter has to know about one operation, looked up once."""

    name: str
    composite: bool
    aliases: bool  # results live in storages of the arguments
    writes: bool  # ... and may have been enlarged (out=)
    adds: bool
    scales: bool
    lays_out: Callable[[Any, Tensor], Tensor] | None
    formula: Formula | None

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation's result, laid out in memory as its kernel would."""
        out = func(*args, **kwargs)
        if self.lays_out is not None and type(out) is FakeTensor and 1 in out.shape:
            return self.lays_out(args, out)
        return out


class Meter(TorchDispatchMode):
    """Counts the bytes of every storage made inside the block, from its creation to its release.

    Enter it inside a ``FakeTensorMode`` to count without allocating; it counts real tensors as
    well. Storages that existed before are not counted, nor are views of them.

    Attributes:
        label: what is running, written beside every allocation; set it as the run proceeds.
        paused: nothing is counted while this is set.
        live_bytes: alive now.
        peak_bytes: most that was alive since the start or the last ``reset_peak``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.paused = False
        self.live_bytes = 0
        self.peak_bytes = 0
        self._peak_at = -1
        self._extra: Held | None = None  # workspace at the peak
        self._blocks: dict[int, _Block] = {}  # by storage
        self._gone: list[_Block] = []
        self._factors: list[_Block] = []  # numbers that autograd keeps
        self._moments: list[tuple[str, str, int]] = []
        self._known: dict[Any, _Known] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = _known(func)
        if self.paused:
            return known.run(func, args, kwargs)
        if known.composite:  # reaches us whole in inference mode only
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if known.adds and sys.getrefcount(args[0]) == _OWNED_BELOW and _adds_in_place(*args[:2]):
            self._forget(args[0])
        out = known.run(func, args, kwargs)
        if known.aliases:
            if known.writes:
                self._rewritten(known, out)
        else:
            self._allocated(known.name, out)
        if known.formula is not None:
            self._work(known, args, kwargs, out)
        return out

    def bump(self, nbytes: int, op: str = "workspace") -> None:
        """Count as if ``nbytes`` more were allocated and released at once."""
        live_bytes = self.live_bytes + nbytes
        self._moments.append((op, self.label, live_bytes))
        if live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_at = live_bytes, len(self._moments) - 1
            self._extra = Held(self.label, op, nbytes, (nbytes,), "uint8")

    def adopt(self, output: Any) -> None:
        """Count the storages of tensors that were made while the meter was paused."""
        self._allocated("block", output)

    def mark(self) -> int:
        """A point of time, for :meth:`peak_since`."""
        return len(self._moments)

    def peak_since(self, mark: int) -> int:
        """Most bytes alive since a point of time."""
        return max((live for _, _, live in self._moments[mark:]), default=self.live_bytes)

    def reset_peak(self) -> None:
        """Forget what was; the peak is what is alive now."""
        self._moments.clear()
        self._gone.clear()
        for block in (*self._blocks.values(), *self._factors):
            block.born = -1
        self.peak_bytes, self._peak_at, self._extra = self.live_bytes, -1, None

    def timeline(self) -> Timeline:
        """What was counted since the start or the last ``reset_peak``."""
        at = self._peak_at
        blocks = [*self._blocks.values(), *self._factors, *self._gone]
        alive = [b.held() for b in blocks if b.born <= at and (b.died is None or b.died > at)]
        if self._extra is not None:
            alive.append(self._extra)
        return Timeline(
            peak_bytes=self.peak_bytes,
            moments=[Moment(*moment) for moment in self._moments],
            at_peak=tuple(sorted(alive, key=lambda held: -held.nbytes)),
            end_bytes=self.live_bytes,
        )

    def _allocated(self, op: str, out: Any) -> None:
        """Count the storages of an operation's results that are new."""
        for result in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                key = storage._cdata
                if key not in self._blocks:
                    self._add(op, key, storage, result)

    def _add(self, op: str, key: int, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        nbytes = storage.nbytes()
        shape = tuple(tensor.shape)
        born = len(self._moments)
        block = _Block(op, self.label, nbytes, shape=shape, dtype=tensor.dtype, born=born)

        def released(_: Any) -> None:
            if self._blocks.pop(key, None) is not None:
                self._close(block)

        block.reference = weakref.ref(storage, released)
        self._blocks[key] = block
        if nbytes:
            self._grow(op, nbytes)

    def _grow(self, op: str, nbytes: int) -> None:
        self.live_bytes = live_bytes = self.live_bytes + nbytes
        self._moments.append((op, self.label, live_bytes))
        if live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_at = live_bytes, len(self._moments) - 1
            self._extra = None

    def _close(self, block: _Block) -> None:
        self.live_bytes -= block.nbytes
        block.died = len(self._moments)
        block.reference = None
        if block.born < block.died and block.nbytes:
            self._gone.append(block)

    def _rewritten(self, known: _Known, out: Any) -> None:
        """An operation that writes to an argument may have given it more room."""
        for result in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            block = None
            if isinstance(result, Tensor):
                block = self._blocks.get(result.untyped_storage()._cdata)
            if block is not None:
                grown = result.untyped_storage().nbytes() - block.nbytes
                if grown:
                    block.nbytes += grown
                    block.shape = tuple(result.shape)
                    self._grow(known.name, grown)

    def _work(self, known: _Known, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Count what the kernel takes for itself."""
        assert known.formula is not None
        nbytes = known.formula(args, kwargs, out)
        if known.scales and not isinstance(args[1], Tensor):
            self._scaled(known.name, args[0], nbytes)
        elif nbytes:
            self.bump(nbytes, f"{known.name} workspace")

    def _scaled(self, op: str, tensor: Any, nbytes: int) -> None:
        """A factor that is a number became a tensor, which autograd keeps for the backward."""
        node: Any = torch._C._current_autograd_node()
        scales = node is not None and node.name() in {"MulBackward0", "DivBackward0"}
        if scales and self._factors:
            self.bump(nbytes - _NUMBER_BYTES, f"{op} workspace")  # that one is there already
            self._close(self._factors.pop())
            return
        self.bump(nbytes, f"{op} workspace")
        if torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad:
            born = len(self._moments)
            block = _Block(
                f"{op} factor", self.label, _NUMBER_BYTES, shape=(), dtype=torch.float64, born=born
            )
            self._factors.append(block)
            self._grow(block.op, _NUMBER_BYTES)

    def _forget(self, tensor: Tensor) -> None:
        block = self._blocks.pop(tensor.untyped_storage()._cdata, None)
        if block is not None:
            self._close(block)


def _known(func: Any) -> _Known:
    schema = func._schema
    writes = any(argument.is_write for argument in schema.arguments)
    aliased = func.is_view or any(result.alias_info is not None for result in schema.returns)
    return _Known(
        name=str(func.overloadpacket),
        composite=func.namespace != "prim"
        and func.has_kernel_for_dispatch_key(_COMPOSITE)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"),
        aliases=aliased or func is torch.ops.aten._unsafe_view.default,
        writes=writes,
        adds=func is torch.ops.aten.add.Tensor,
        scales=func in {torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor},
        lays_out=layout(func),
        formula=workspace_formula(func),
    )


def _adds_in_place(total: Any, other: Any) -> bool:
    """Whether torch would add in place if no dispatch mode looked on.

    Where one does, torch itself never writes in place, so that the mode sees no mutation
    (``isTensorSubclassLike``). Without one it does in two places, both with a sum that no Python
    code holds: ``linear`` adds a bias of one dim to a product, and the autograd engine, between two
    nodes of the backward graph, adds a gradient to one that nothing else refers to
    (``can_accumulate_inplace`` in input_buffer.cpp).
    """
    if not isinstance(total, Tensor) or not isinstance(other, Tensor):
        return False
    if torch._C._current_graph_task_id() == -1 or torch._C._current_autograd_node() is not None:
        return other.dim() == 1 and total.dim() > 1
    references = total._use_count()  # type: ignore[attr-defined]
    if torch.is_grad_enabled() or references > _OWNED_BY_ENGINE:
        return False
    return total.untyped_storage().nbytes() == total.numel() * total.element_size()


def fake_inputs(example: Any, mode: FakeTensorMode, device: torch.device | None = None) -> Any:
    """The example with every tensor replaced by a fake one of the same shape, strides and dtype.

    Args:
        device: where the copies pretend to be; default: where the originals are, or the CPU for
            those on the meta device.
    """

    def fake(tensor: Tensor) -> Tensor:
        where = device or (torch.device("cpu") if tensor.is_meta else tensor.device)
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode and tensor.device == where:
            return tensor
        sizes, strides = _hints(tensor.shape), _hints(tensor.stride())
        with mode:
            copy = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=where)
        return copy.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, fake, example)


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in sizes]


def measure(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | None = None,
    grad: bool = False,
    meter: Meter | None = None,
) -> Timeline:
    """Bytes that ``fn(*args, **kwargs)`` would hold, from a run on fake tensors.

    Inputs, parameters and buffers are not counted; outputs are, and stay alive to the end.
    Nothing is computed: a value that decides what runs next cannot be known.

    Args:
        fn: a module, whose parameters may be real, fake or on the meta device, or a function;
            tensors that a function brings along may be real as long as ``grad`` is false.
        device: where everything pretends to be; default: where it is.
        grad: run a backward of the sum of all outputs too; gradients are counted.
        meter: the one to count with, where ``fn`` knows it.
    """
    kwargs = kwargs or {}
    state: dict[str, Tensor] = {}
    if isinstance(fn, nn.Module):
        state = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
    mode = _mode_of([*state.values(), *tree_leaves((args, kwargs))])
    meter = meter or Meter()
    with ExitStack() as stack:
        # In inference mode composites would reach the meter whole; what they hold is the same.
        stack.enter_context(torch.inference_mode(mode=False))
        inputs, named, state = fake_inputs((tuple(args), dict(kwargs), state), mode, device)
        for context in (mode, torch.set_grad_enabled(grad), meter):
            stack.enter_context(context)
        if state:
            output = torch.func.functional_call(fn, state, inputs, named)  # type: ignore[arg-type]
        else:
            output = fn(*inputs, **named)
        if grad:
            _total(output).backward()
    timeline = meter.timeline()
    del output
    return timeline


def _mode_of(leaves: Sequence[Any]) -> FakeTensorMode:
    """The mode of the first fake tensor, since modes do not mix; else a new one."""
    modes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    return next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def _total(output: Any) -> Tensor:
    sums = [t.sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([s.real if s.is_complex() else s for s in sums]).sum()
