"""The longest sequence that fits a budget of bytes per rank, against the number of ranks.

One attention layer, forward and backward: its inputs, output and gradients, and all that it holds
meanwhile. Bytes are counted exactly (:func:`hairpin.run.profile.peak_cpu_bytes`), on every rank;
the rank that holds most decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hairpin.bench.measure import join
from hairpin.bench.network import Loopback
from hairpin.bench.steps import peak_bytes
from hairpin.comm.mesh import Mesh
from hairpin.exchange.api import attention
from hairpin.exchange.linear import linear_attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.run.launch import launch
from hairpin.units import format_bytes

AXIS = "sp"
_STEP = 8  # the length is found to within so many positions per rank


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Longest:
    """What to look for.

    Attributes:
        budget_bytes: that no rank may exceed.
        ranks: numbers of ranks; the first is what growth is counted from.
        groups: key/value heads of the softmax attention.
    """

    budget_bytes: int = 16 << 20
    ranks: Sequence[int] = (1, 2, 4, 8)
    heads: int = 8
    groups: int = 8
    head_dim: int = 64


def find_longest(settings: Longest, *, say: Callable[[str], None]) -> dict[str, Any]:
    """For each method and number of ranks, the longest sequence whose layer fits the budget.

    Returns:
        ``budget_bytes`` and ``rows``: ``method``, ``ranks``, ``length``, ``peak_bytes`` (of the
        rank that holds most), ``growth`` (length over that on the first number of ranks) and
        ``linear`` (growth over that of the ranks).
    """
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        first: dict[str, Any] | None = None
        for size in settings.ranks:
            say(f"longest {method} in {format_bytes(settings.budget_bytes)}: {size} ranks")
            found = launch(_search, size, method, settings)[0]
            row = {"method": method, "ranks": size, **found}
            first = first or row
            growth = row["length"] / first["length"] if first["length"] else 0.0
            ideal = size / first["ranks"]
            rows.append({**row, "growth": growth, "linear": growth / ideal})
    return {"budget_bytes": settings.budget_bytes, "rows": rows}


def _search(method: str, settings: Longest) -> dict[str, int]:
    """On a rank: double, then bisect, all ranks alike."""
    mesh = join(Loopback())
    held: dict[int, int] = {}
    _peak_bytes(method, _STEP * mesh.size(AXIS), mesh, settings)  # what torch allocates once

    def fits(rows: int) -> bool:
        held[rows] = _peak_bytes(method, rows * mesh.size(AXIS), mesh, settings)
        return held[rows] <= settings.budget_bytes

    most = _bisect(fits)
    return {"length": most * mesh.size(AXIS), "peak_bytes": held.get(most, 0)}


def _bisect(fits: Callable[[int], bool]) -> int:
    """The largest multiple of the step that fits, if what is longer never fits again; or 0."""
    high = 1
    while fits(high * _STEP):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
    return low * _STEP


def _peak_bytes(method: str, length: int, mesh: Mesh, settings: Longest) -> int:
    """Most that any rank holds, inputs included."""
    step = partial(_step, METHODS[method], length, mesh, settings)
    held = torch.tensor(peak_bytes(step, warm=False))
    if mesh.world > 1:
        dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def _step(make: "Make", length: int, mesh: Mesh, settings: Longest) -> None:
    attend, rows, groups = make(length, mesh, settings)
    heads, d = settings.heads, settings.head_dim
    q, k, v = (torch.randn(1, h, rows, d).requires_grad_() for h in (heads, groups, groups))
    out = attend(q, k, v)
    out.backward(torch.randn(1, heads, rows, d))


def _ring(length: int, mesh: Mesh, settings: Longest) -> tuple[Attend, int, int]:
    split = SequenceSplit(mesh, AXIS, Order("zigzag", length))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, split, mask=Mask(causal=True))

    return attend, len(split.positions), settings.groups


def _lasp(length: int, mesh: Mesh, settings: Longest) -> tuple[Attend, int, int]:
    log_decay = -torch.logspace(-3, -1, settings.heads)
    attend = partial(_chained, log_decay=log_decay, mesh=mesh)
    return attend, length // mesh.size(AXIS), settings.heads


def _chained(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, mesh: Mesh) -> Tensor:
    return linear_attention(q, k, v, log_decay, mesh=mesh, axis=AXIS, schedule="chain")


Make = Callable[[int, Mesh, Longest], tuple[Attend, int, int]]
METHODS: Mapping[str, Make] = {"ring attention": _ring, "linear attention, chain": _lasp}
