"""A device that is played: kernels do not compute, they take as long as it would.

Where ranks are more than cores, real work of one rank delays the transfers of another, and nothing
can be said of overlap. Here every kernel of torch, whoever calls it, forward and backward, gives
tensors of the right shape and layout without content, and the rank sleeps as long as the work would
take. Views, transfers and memory for results are real.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from hairpin.graph.work import kernel_work

_LEAST_S = 1e-3  # that is slept at once; less is owed until more has come together
_MOST_AHEAD_S = 0.02  # that a sleep which was too long is made up for
_REAL = frozenset({"_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty"})

Place = tuple[int | None, str]  # of an argument: its position, or its name


@dataclass(frozen=True)
class _Call:
    """What one kernel does with arguments of some shapes."""

    flops: float
    touched_bytes: float
    out: Any  # its results on the meta device
    written: tuple[Place, ...]  # arguments that it gives back instead


class PlayedDevice(TorchDispatchMode):
    """In this context kernels sleep instead of computing.

    Work is counted as :class:`hairpin.graph.work.WorkMeter` counts it. The time that handling a
    call takes here counts as part of the call. Sleeps that are too short or too long are made up
    for by those that follow.

    Args:
        flops_per_s: of matrix products.
        touched_per_s: bytes that kernels read and write.

    Attributes:
        flops, touched_bytes: work so far.
    """

    def __init__(self, flops_per_s: float, touched_per_s: float) -> None:
        super().__init__()
        self.flops = self.touched_bytes = 0.0
        self.play(flops_per_s, touched_per_s)
        self._calls: dict[Any, _Call] = {}

    def play(self, flops_per_s: float, touched_per_s: float) -> None:
        """From now on, play a device of these speeds; nothing is owed."""
        self.flops_per_s, self.touched_per_s = flops_per_s, touched_per_s
        self._owed_s = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        began_s = time.perf_counter()
        kwargs = kwargs or {}
        if _is_real(func):
            return func(*args, **kwargs)
        key = (func, *_shapes(args), *kwargs, *_shapes(kwargs.values()))
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._learnt(func, args, kwargs)
        self.flops += call.flops
        self.touched_bytes += call.touched_bytes
        if call.written:
            given = [kwargs[name] if at is None else args[at] for at, name in call.written]
            out = given[0] if len(given) == 1 else tuple(given)
        else:
            out = tree_map_only(Tensor, _empty, call.out)
        seconds = call.flops / self.flops_per_s + call.touched_bytes / self.touched_per_s
        self._spend(seconds, began_s)
        return out

    def _spend(self, seconds: float, began_s: float) -> None:
        """Sleep what is owed, less the time since the call began."""
        self._owed_s += seconds - (time.perf_counter() - began_s)
        if self._owed_s >= _LEAST_S:
            start_s = time.perf_counter()
            time.sleep(self._owed_s)
            self._owed_s -= time.perf_counter() - start_s
        self._owed_s = max(self._owed_s, -_MOST_AHEAD_S)

    def _learnt(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        metas: dict[int, Tensor] = {}

        def meta(x: Any) -> Any:
            if isinstance(x, Tensor):
                shape, stride = x.shape, x.stride()
                same = torch.empty_strided(shape, stride, dtype=x.dtype, device="meta")
                return metas.setdefault(id(x), same)
            return torch.device("meta") if isinstance(x, torch.device) else x

        meta_args, meta_kwargs = tree_map(meta, args), tree_map(meta, kwargs)
        out = func(*meta_args, **meta_kwargs)
        flops, touched_bytes = kernel_work(func, meta_args, meta_kwargs, out)
        written = tuple(_written(func)) if func._schema.returns else ()
        return _Call(flops, touched_bytes, out, written)


def _is_real(func: Any) -> bool:
    """Whether a call is made as it is: views, memory, and what is not a kernel of torch."""
    return (
        func.is_view
        or torch.Tag.inplace_view in func.tags
        or func.namespace == "c10d"
        or func._overloadpacket.__name__ in _REAL
    )


def _shapes(values: Any) -> Iterator[Any]:
    """What the shapes of a call's results and its work depend on; hashable."""
    for x in values:
        if isinstance(x, Tensor):
            yield x.shape, x.stride(), x.dtype
        elif isinstance(x, list | tuple):
            yield tuple(_shapes(x))
        else:
            yield type(x), x


def _empty(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def _written(func: Any) -> Iterator[Place]:
    """The arguments that a call writes to and gives back."""
    back = any(result.alias_info is not None for result in func._schema.returns)
    for at, argument in enumerate(func._schema.arguments):
        if back and argument.is_write:
            yield (None if argument.kwarg_only else at), argument.name
