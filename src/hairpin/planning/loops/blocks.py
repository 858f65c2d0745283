"""What a model holds while it runs, block by block, seen on one run without values.

A block is a submodule that occurs at least twice with the same structure: the layers of a stack.
Each distinct one is run once; a later one that is the same is only counted.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from hairpin.errors import HairpinError, PlanError, TraceError
from hairpin.graph.autocast import autocast_now
from hairpin.graph.meter import Held, Meter
from hairpin.planning.example import Example, plainly
from hairpin.planning.loops.hookless import hooks_inside
from hairpin.planning.loops.settings import setting

_INDEX_NAMES = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"}
)


@dataclass
class Group:
    """Blocks that compute the same on tensors of the same shapes.

    Attributes:
        paths: of the blocks in the model.
        args, kwargs: of the first call, tensors replaced by empty ones of their shape.
        entry_bytes: most bytes alive when one of them begins.
        inner_bytes: most bytes that one holds while it runs, its outputs included.
        outputs: shapes of what it returns, as empty tensors.
        autocast: setting of torch.autocast that they are called under.
    """

    paths: list[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entry_bytes: int
    inner_bytes: int
    outputs: Any
    signature: tuple[Any, ...]
    ops: tuple[Any, ...]
    autocast: str

    def require_autocast(self) -> None:
        """Raise unless the blocks are called under the setting that is planned under.

        Raises:
            TraceError: the model's own code sets another.
        """
        if self.autocast != autocast_now():
            raise TraceError(
                "the model's own code calls it under another torch.autocast than hp.plan was "
                "called under, and its graph would have other dtypes"
            )


@dataclass
class Overview:
    """What one run of a model showed.

    Attributes:
        peak_bytes: most bytes alive outside parameters and inputs.
        outside_bytes: the same, not counting what blocks hold while they run.
        at_peak: storages alive at the peak.
    """

    peak_bytes: int = 0
    outside_bytes: int = 0
    at_peak: tuple[Held, ...] = ()
    groups: list[Group] = field(default_factory=list)


def overview(
    model: nn.Module,
    example: Example,
    inner: Mapping[str, int] | None = None,
    blocks: Sequence[str] | None = None,
    *,
    really: bool = False,
) -> Overview:
    """Run a model on shapes alone and note what it and its repeated blocks hold.

    A model whose code around the blocks reads values of its input is run for real there.

    Args:
        inner: path of a block -> bytes it is to be taken to hold, instead of running it.
        blocks: paths of the blocks; default: the submodules that repeat.
        really: run the code around the blocks for real: some code goes other ways on fake tensors.

    Raises:
        PlanError: the model cannot run on the example.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    if not really:
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                fake = tree_map_only(Tensor, lambda t: _empty(t, device), example)
            return _overview(model, fake, mode, inner or {}, blocks)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if device.type == "meta" or not all_real(example):
                raise PlanError(
                    f"{type(model).__name__} reads values of its input ({error}), so it cannot be "
                    "planned on shapes alone; build it with real parameters and give a real example"
                ) from error
    with _unchanged(model):
        try:
            return _overview(model, example, None, inner or {}, blocks)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return _overview(model, example, None, inner or {}, ())


def forward_bytes(model: nn.Module, example: Example) -> int:
    """Most bytes that one forward of a model as it is holds, loops included.

    Shapes alone do not tell where code looks at values: transformers leaves out a mask that hides
    nothing. So what comes before the first repeated block is run for real where there are values;
    from the first block on nothing is computed.

    Raises:
        PlanError: the model cannot run on the example.
    """
    blocks = repeated_blocks(model)
    if blocks and "forward" not in vars(model) and can_run_really(model, example):
        # some code does not take values and shapes side by side
        with suppress(Exception):
            return _begun_really(model, example, blocks)
    return overview(model, example, blocks=()).peak_bytes


def _begun_really(model: nn.Module, example: Example, blocks: Mapping[str, nn.Module]) -> int:
    """Peak of a forward that is real up to the first of these blocks."""
    args, kwargs = example
    mode, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
    with torch.no_grad(), plainly(), _unchanged(model), _as_it_was(model):
        for block in blocks.values():
            block.__dict__["forward"] = _OnShapes(block, mode, meter)
        with meter:
            output = model(*args, **kwargs)
        del output
    return meter.peak_bytes


class _OnShapes:
    """Stands in for a block's forward: the same on tensors without values."""

    ours = True

    def __init__(self, block: nn.Module, mode: FakeTensorMode, meter: Meter) -> None:
        own = vars(block).get("forward")
        self.forward = own if own is not None else type(block).forward.__get__(block)
        self.__signature__ = inspect.signature(self.forward)
        self.mode, self.meter = mode, meter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.meter.paused = True
        try:
            with self.mode:
                args, kwargs = tree_map_only(Tensor, self._hollow, (args, kwargs))
        finally:
            self.meter.paused = False
        with self.mode, self.meter:
            return self.forward(*args, **kwargs)

    def _hollow(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else _empty(tensor, tensor.device)


def all_real(example: Any) -> bool:
    """Whether every tensor has values: none is fake or on the meta device."""
    return not any(
        isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor) and leaf.device.type == "meta")
        for leaf in tree_flatten(example)[0]
    )


def can_run_really(model: nn.Module, example: Example) -> bool:
    """Whether parameters and example have values."""
    tensors = (*model.parameters(), *model.buffers())
    return all_real(tensors) and all_real(example)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Take away what the forward stores in its modules."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    counters = {
        buffer: buffer.clone()  # fake mode computes numbers such as BatchNorm's count for real
        for buffer in model.buffers()
        if buffer.numel() == 1 and buffer.device.type != "meta"
    }
    try:
        yield
    finally:
        for module, own, buffers in before:
            for now, known in ((vars(module), own), (module._buffers, buffers)):
                for name in list(now):
                    if name in known:
                        now[name] = known[name]
                    else:
                        del now[name]
        with torch.no_grad(), _disable_current_modes():
            for buffer, value in counters.items():
                buffer.copy_(value)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give buffers and the random state back as they were."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(kept[name])


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _overview(
    model: nn.Module,
    example: Example,
    mode: FakeTensorMode | None,
    inner: Mapping[str, int],
    blocks: Sequence[str] | None,
) -> Overview:
    args, kwargs = example
    meter = Meter()
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    watch = _Watch(meter, mode, dict(inner), device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(plainly())
        stack.enter_context(_as_it_was(model))
        if mode is not None:
            stack.enter_context(mode)
        stack.enter_context(watch.over(model, blocks))
        stack.enter_context(meter)
        try:
            output = model(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, HairpinError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            text = str(error).strip().splitlines()
            raise PlanError(
                f"{type(model).__name__} failed on the example: {type(error).__name__}: "
                f"{text[0] if text else ''}. Give one that the model runs"
            ) from error
        timeline = meter.timeline()
        del output
    found = watch.found
    found.peak_bytes, found.at_peak = timeline.peak_bytes, timeline.at_peak
    outside = [
        moment.live_bytes
        for place, moment in enumerate(timeline.moments)
        if not any(start <= place < end for start, end in watch.inside)
    ]
    found.outside_bytes = max(outside, default=0)
    return found


class _Watch:
    """Stands in for the forward of every block while a model runs."""

    def __init__(
        self,
        meter: Meter,
        mode: FakeTensorMode | None,
        inner: dict[str, int],
        device: torch.device,
    ) -> None:
        self.meter = meter
        self.device = device
        self.mode = mode
        self.inner = inner
        self.found = Overview()
        self.inside: list[tuple[int, int]] = []
        self.known: dict[tuple[Any, ...], Group] = {}

    @contextmanager
    def over(self, model: nn.Module, paths: Sequence[str] | None) -> Iterator[None]:
        blocks = (
            repeated_blocks(model)
            if paths is None
            else {path: model.get_submodule(path) for path in paths}
        )
        try:
            for path, block in blocks.items():
                block.__dict__["forward"] = _Watched(self, path, block)
            yield
        finally:
            for block in blocks.values():
                block.__dict__.pop("forward", None)

    def call(self, path: str, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """One call of a block: run and note it, or repeat what an equal one did."""
        autocast = autocast_now()
        kind, hooked = kind_of(block), bool(hooks_inside(block))
        signature = (kind, hooked, _call_signature(args, kwargs), autocast)
        exact = (signature, _numbers(block))
        entry = self.meter.live_bytes
        group = self.known.get(exact)
        if group is not None:
            return self._repeat(path, group, entry)
        start = self.meter.mark()
        stand_in = self.inner.get(path)
        if self.mode is None:
            output, ops, inner = self._on_shapes(block, args, kwargs)
            self.meter.bump(inner if stand_in is None else stand_in)
            self.meter.adopt(output)
        else:
            self.meter.paused = stand_in is not None
            with _Sequence(block, args, kwargs) as ops:
                output = type(block).forward(block, *args, **kwargs)
            if stand_in is not None:
                self.meter.paused = False
                self.meter.bump(stand_in)
                self.meter.adopt(output)
            inner = self.meter.peak_since(start) - entry
        self.inside.append((start, self.meter.mark()))
        same = next(
            (g for g in self.found.groups if g.signature == signature and g.ops == ops.written()),
            None,
        )
        if same is None:
            same = Group(
                paths=[],
                args=self._hollow(args),
                kwargs=self._hollow(kwargs),
                entry_bytes=entry,
                inner_bytes=inner,
                outputs=self._hollow(output),
                signature=signature,
                ops=ops.written(),
                autocast=autocast,
            )
            self.found.groups.append(same)
        self.known[exact] = same
        _join(same, path, entry)
        return output

    def _on_shapes(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, "_Sequence", int]:
        """Outputs of zeros, operations and bytes of a block, while the model runs for real."""
        self.meter.paused = True
        mode, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
        try:
            with mode:
                fake = tree_map_only(Tensor, lambda t: _empty(t, t.device), (args, kwargs))
                ops = _Sequence(block, *fake)
                with meter, ops:
                    output = type(block).forward(block, *fake[0], **fake[1])
                peak = meter.peak_bytes
            real = tree_map_only(Tensor, lambda t: _zeros(t, t.device), output)
        finally:
            self.meter.paused = False
        return real, ops, peak

    def _hollow(self, tree: Any) -> Any:
        """Tensors replaced by meta tensors of the same shape and strides, which count nothing."""
        was_paused, self.meter.paused = self.meter.paused, True
        try:
            return tree_map_only(Tensor, lambda t: _empty(t, torch.device("meta")), tree)
        finally:
            self.meter.paused = was_paused

    def _repeat(self, path: str, group: Group, entry: int) -> Any:
        start = self.meter.mark()
        inner = self.inner.get(path, group.inner_bytes)
        self.meter.bump(inner)
        self.inside.append((start, self.meter.mark()))
        _join(group, path, entry)
        if self.mode is not None:
            return tree_map_only(Tensor, lambda t: _empty(t, self.device), group.outputs)
        self.meter.paused = True
        try:
            output = tree_map_only(Tensor, lambda t: _zeros(t, self.device), group.outputs)
        finally:
            self.meter.paused = False
        self.meter.adopt(output)
        return output


def _zeros(tensor: Tensor, device: torch.device) -> Tensor:
    return _empty(tensor, device).zero_()


def _join(group: Group, path: str, entry: int) -> None:
    if path not in group.paths:
        group.paths.append(path)
    group.entry_bytes = max(group.entry_bytes, entry)


class _Watched:
    def __init__(self, watch: _Watch, path: str, block: nn.Module) -> None:
        self.watch, self.path, self.block = watch, path, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch.call(self.path, self.block, args, kwargs)


def _call_signature(args: Any, kwargs: Any) -> tuple[Any, ...]:
    leaves, spec = tree_flatten((args, kwargs))
    words = [
        (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    ]
    return (str(spec), tuple(words))


class _Constant:
    """A tensor of the code. Equal to itself, and to one of equal values where both are known."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # kept, so that no other comes to lie where it lay
        value = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        self.value = None if value is None or value.device.type == "meta" else value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant):
            return NotImplemented
        if self.tensor is other.tensor:
            return True
        mine, theirs = self.value, other.value
        if mine is None or theirs is None or mine.dtype != theirs.dtype:
            return False
        with _disable_current_modes():
            return mine.device == theirs.device and torch.equal(mine, theirs)

    __hash__ = None  # type: ignore[assignment]


class _Sequence(TorchDispatchMode):
    """Writes down the operations of one block with the tensors they take, for comparison."""

    def __init__(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self._lines: list[Any] = []
        self._names: dict[int, tuple[weakref.ref[Tensor], Any]] = {}  # by id, while they live
        self._count = 0
        state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        for name, tensor in state.items():
            self._name(tensor, name)
        for leaf in tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor) and self._named(leaf) is None:
                self._renumber(leaf)

    def _name(self, tensor: Tensor, name: Any) -> None:
        self._names[id(tensor)] = (weakref.ref(tensor), name)

    def _named(self, tensor: Tensor) -> Any:
        """Its name; None for a new tensor, though it lies where one lay that is gone."""
        known, name = self._names.get(id(tensor), (lambda: None, None))
        return name if known() is tensor else None

    def _word(self, tensor: Tensor) -> Any:
        """A tensor's name; what came from nowhere is a constant of the code."""
        name = self._named(tensor)
        return _Constant(tensor) if name is None else name

    def _renumber(self, tensor: Tensor) -> None:
        self._count += 1
        self._name(tensor, self._count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_flatten((args, kwargs or {}))[0]
        words = [self._word(x) if isinstance(x, Tensor) else repr(x) for x in leaves]
        self._lines.append((str(func), *words))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                self._renumber(leaf)
        return out

    def written(self) -> tuple[Any, ...]:
        """All lines."""
        return tuple(self._lines)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost elements of lists that occur at least twice and hold several layers."""
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    elements = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, lists)
        for name, _ in module.named_children()
    }
    kinds = {path: kind_of(module) for path, module in model.named_modules() if path}
    counts = Counter(kinds.values())
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path not in elements or counts[kinds[path]] < 2 or _is_small(module):
            continue
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        found[path] = module
    return found


def _is_small(module: nn.Module) -> bool:
    """A layer, a bare list, or something without a forward of its own."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return True
    holders = [m for m in module.modules() if m is not module and list(m.parameters(recurse=False))]
    return len(holders) < 3


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """Structure of a module: classes, settings, shapes; all but the place in the stack."""
    lines = []
    for path, part in module.named_modules():
        lines.append((path, type(part), part.training, _settings(part, index=False)))
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in state.items())
    return (tuple(lines), shapes)


def _numbers(module: nn.Module) -> tuple[Any, ...]:
    """Settings that look like a block's place in the stack; code may branch on them."""
    return tuple(_settings(part, index=True) for part in module.modules())


def _settings(module: nn.Module, *, index: bool) -> tuple[Any, ...]:
    found = []
    for name, value in sorted(vars(module).items()):
        if (
            name.startswith("_")
            or name in ("training", "forward")
            or (name in _INDEX_NAMES) != index
        ):
            continue
        found.append((name, setting(value)))
    return tuple(found)
