"""What planning costs: many equal blocks against one, chunk sizes at lengths never seen, the cache.

Times are process time on one thread, so that a busy machine disturbs them little.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hairpin as hp
from hairpin.bench.steps import Say, one_thread
from hairpin.bench.zoo import Case, Inputs
from hairpin.errors import HairpinError, MemoryBudgetError
from hairpin.planning.cache import VARIABLE
from hairpin.planning.loops.program import Program

SHARES = (0.3, 0.5, 0.7)  # of the model's own peak; the first that can be met is planned for
OFFSETS = (-1, -3, -5, -7, -11, -13, -17, 1, 3, 5)  # from the planned lengths


@dataclass(frozen=True, kw_only=True)
class Replans:
    """Chunk sizes for lengths never seen.

    Attributes:
        programs: distinct graphs with loops.
        first_s: at the first such length, where the sizes are turned into code.
        worst_s, median_s: at the others.
        planned_s: working out the plan, tracing included.
        note: why there are no figures.
    """

    model: str
    variant: str
    programs: int = 0
    first_s: float | None = None
    worst_s: float | None = None
    median_s: float | None = None
    planned_s: float | None = None
    note: str = ""


def replans(chosen: Sequence[Case], *, say: Say = lambda _: None) -> list[Replans]:
    """Plan each case and work out its chunk sizes at ten lengths near the planned one."""
    rows = []
    with one_thread():
        for case in chosen:
            rows.append(_replans(case))
            say(f"{case.title}: {rows[-1]}")
    return rows


def _replans(case: Case) -> Replans:
    model, inputs = case.build().requires_grad_(False), case.inputs(case.length)
    try:
        plan, planned_s = _planned(model, inputs)
    except HairpinError as error:
        return Replans(model=case.name, variant=case.variant, note=str(error).splitlines()[0])
    times_s = [
        sum(_fit_s(program, offset) for program in plan.programs.values()) for offset in OFFSETS
    ]
    later_s = sorted(times_s[1:])
    return Replans(
        model=case.name,
        variant=case.variant,
        programs=len(plan.programs),
        first_s=times_s[0],
        worst_s=later_s[-1],
        median_s=later_s[len(later_s) // 2],
        planned_s=planned_s,
    )


def _fit_s(program: Program, offset: int) -> float:
    lengths = {symbol: size + offset for symbol, size in program.traced.example.items()}
    return _timed(lambda: program.fit(lengths, program.margin_bytes))[1]


def _planned(model: nn.Module, inputs: Inputs) -> tuple[Any, float]:
    """A plan for the least of the shares that can be met, and the seconds it took."""
    with torch.no_grad():
        peak = hp.estimate(model, inputs)
        for share in SHARES:
            try:
                return _timed(lambda: hp.plan(model, inputs, memory=int(share * peak), cache=False))  # noqa: B023
            except MemoryBudgetError:
                if share == SHARES[-1]:
                    raise
    raise AssertionError("the last share is planned or raises")


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """Planning stacks of equal blocks; ``ratio`` is of many blocks to one."""

    few: int
    many: int
    few_s: float
    many_s: float
    ratio: float


def stacks(build: Callable[[int], nn.Module], inputs: Inputs, *, many: int = 48) -> Stacks:
    """Plan a stack of one kind of block, two of them and many, for the same share of its peak.

    One block alone does not repeat, so that it is a part of the graph around; two are the least
    that are planned as many are.

    Args:
        build: makes a model of so many blocks.
    """
    times_s = {}
    with one_thread():
        _planned(build(2), inputs)  # imports and compiled rules
        for count in (2, many):
            model = build(count).requires_grad_(False)
            times_s[count] = _planned(model, inputs)[1]
    few_s, many_s = times_s[2], times_s[many]
    return Stacks(few=2, many=many, few_s=few_s, many_s=many_s, ratio=many_s / few_s)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """The same plan asked for twice: worked out, then from the cache."""

    made_s: float
    found_s: float
    first_call_s: float


def cached(model: nn.Module, inputs: Inputs, memory: int) -> Cached:
    """Ask twice with an empty cache, then run once: that call traces the blocks."""
    with one_thread(), _empty_cache(), torch.no_grad():
        hp.plan(model, inputs, memory=10 * memory)  # measures the speeds
        made_s = _timed(lambda: hp.plan(model, inputs, memory=memory))[1]
        plan, found_s = _timed(lambda: hp.plan(model, inputs, memory=memory))
        hp.parallelize(model, plan)
        try:
            first_call_s = _timed(lambda: model(*inputs[0], **inputs[1]))[1]
        finally:
            hp.detach(model)
    return Cached(made_s=made_s, found_s=found_s, first_call_s=first_call_s)


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start_s = time.process_time()
    return work(), time.process_time() - start_s
