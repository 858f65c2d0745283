"""The longest sequence that fits a budget of bytes per rank, against the number of ranks.

One attention layer, forward and backward: its inputs, output and gradients, and all that it holds
meanwhile. Bytes are counted exactly (:func:`hairpin.run.profile.peak_cpu_bytes`), on every rank;
the rank that holds most decides. Tensors lie in memory as a model's projections leave them, heads
beside their channels: so one rank needs no copy and is as lean as can be.

The ring takes the turns that ``plan_sequence(method="ring", shape=..., memory=budget)`` chooses. A
length that this refuses does not fit, and what it takes has to fit as counted.
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
from hairpin.errors import MemoryBudgetError
from hairpin.exchange.api import attention
from hairpin.exchange.linear import linear_attention
from hairpin.exchange.mask import Mask
from hairpin.planning.sequence.plan import plan_sequence
from hairpin.planning.sequence.work import AttentionShape
from hairpin.run.launch import launch
from hairpin.units import format_bytes

AXIS = "sp"
RING = "ring attention"
CAUSAL = Mask(causal=True)
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
        rank that holds most), ``turns`` that keys cross in, ``growth`` (length
        over that on the first number of ranks) and ``linear`` (growth over that of the ranks).
    """
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        first: dict[str, Any] | None = None
        for size in settings.ranks:
            say(f"longest {method} in {format_bytes(settings.budget_bytes)}: {size} ranks")
            found = launch(_search, size, method, settings)[0]
            row = {"method": method, "ranks": size, **found}
            say(f"{row['length']} positions, {row['turns']} turns")
            first = first or row
            growth = row["length"] / first["length"] if first["length"] else 0.0
            ideal = size / first["ranks"]
            rows.append({**row, "growth": growth, "linear": growth / ideal})
    return {"budget_bytes": settings.budget_bytes, "rows": rows}


def _search(method: str, settings: Longest) -> dict[str, int]:
    """On a rank: double, then bisect, all ranks alike."""
    mesh = join(Loopback())
    held: dict[int, int] = {}

    def fits(rows: int) -> bool:
        try:
            held[rows] = _peak_bytes(method, rows * mesh.size(AXIS), mesh, settings)
        except MemoryBudgetError:  # on all ranks alike, before anything is sent
            return False
        return held[rows] <= settings.budget_bytes

    fits(_STEP)  # what torch allocates once
    most = _bisect(fits)
    length = most * mesh.size(AXIS)
    turns = _turns(length, mesh, settings) if method == RING and most else 1
    return {"length": length, "peak_bytes": held.get(most, 0), "turns": turns}


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
    q, k, v = (_projected(h, rows, d).requires_grad_() for h in (heads, groups, groups))
    out = attend(q, k, v)
    out.backward(_projected(heads, rows, d))


def _projected(heads: int, rows: int, head_dim: int) -> Tensor:
    """``[1, h, s, d]`` as a projection ``[1, s, h * d]`` leaves it in memory."""
    return torch.randn(1, rows, heads, head_dim).transpose(1, 2)


def _ring(length: int, mesh: Mesh, settings: Longest) -> tuple[Attend, int, int]:
    turns = _turns(length, mesh, settings)
    split = plan_sequence(mesh, length=length, mask=CAUSAL, axis=AXIS, turns=turns).split

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, split, mask=CAUSAL)

    return attend, len(split.positions), settings.groups


def _turns(length: int, mesh: Mesh, settings: Longest) -> int:
    """Turns that the planner chooses for the budget."""
    shape = AttentionShape(
        length=length,
        heads=settings.heads,
        groups=settings.groups,
        head_dim=settings.head_dim,
        mask=CAUSAL,
    )
    plan = plan_sequence(mesh, axis=AXIS, shape=shape, memory=settings.budget_bytes)
    return plan.split.turns


def _lasp(length: int, mesh: Mesh, settings: Longest) -> tuple[Attend, int, int]:
    log_decay = -torch.logspace(-3, -1, settings.heads)
    attend = partial(_chained, log_decay=log_decay, mesh=mesh)
    return attend, length // mesh.size(AXIS), settings.heads


def _chained(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, mesh: Mesh) -> Tensor:
    return linear_attention(q, k, v, log_decay, mesh=mesh, axis=AXIS, schedule="chain")


Make = Callable[[int, Mesh, Longest], tuple[Attend, int, int]]
METHODS: Mapping[str, Make] = {RING: _ring, "linear attention, chain": _lasp}
