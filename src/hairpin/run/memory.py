"""The most memory that tensors took during a piece of work, on this rank."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hairpin.errors import MemoryBudgetError
from hairpin.units import format_bytes


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active, and their highest sum.

    Exact for what tensors hold; scratch memory inside a single operation is not seen. Of a tensor
    that is shared out over ranks (DTensor) the slice on this rank counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # its operations come again, on what is on this rank
        known = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):  # torch tries shapes of slices on those; no values
                continue
            if isinstance(tensor, Tensor) and _key(tensor) not in known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self._seen or size_bytes == 0:
            return
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._seen[key] = weakref.finalize(storage, self._release, key, size_bytes)

    def _release(self, key: int, size_bytes: int) -> None:
        self.live_bytes -= size_bytes
        self._seen.pop(key, None)

    def close(self) -> None:
        """Stop watching tensors that are still alive."""
        for watch in list(self._seen.values()):
            watch.detach()
        self._seen.clear()


class Peak:
    """Filled by :func:`measured` when its block ends."""

    peak_bytes = 0


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of a block, beyond what was in use before it.

    On CUDA this is the allocator's own high-water mark, elsewhere the sum of live tensors.
    """
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with TensorMemory() as memory:
        yield peak
    memory.close()
    peak.peak_bytes = memory.peak_bytes


def require_budget(
    peak_bytes: list[int],
    budget_bytes: int | None,
    *,
    batch_size: int,
    ranks: int,
    what: str = "clips",
) -> None:
    """Raise where a rank needs more memory than it may use.

    Args:
        peak_bytes: measured peak of each rank.
        budget_bytes: what each may use; None for no limit.
        what: name of the things that a batch counts.

    Raises:
        MemoryBudgetError: with both figures and what to change.
    """
    if budget_bytes is None or max(peak_bytes) <= budget_bytes:
        return
    rank = peak_bytes.index(max(peak_bytes))
    raise MemoryBudgetError(
        f"a training step needs {format_bytes(peak_bytes[rank])} on rank {rank}, more than the "
        f"{format_bytes(budget_bytes)} that --memory allows; use more ranks than {ranks}, a batch "
        f"smaller than {batch_size} {what}, or a larger budget"
    )


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
