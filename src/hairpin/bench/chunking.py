"""A budget of memory on the models of the zoo: what it costs, and against what people use today.

A budget at ratio r is ``O + r (P - O)`` for an eager run that peaks at P and puts out O.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import hairpin as hp
from hairpin.bench.measure import machine
from hairpin.bench.peers import expert, own_options, training
from hairpin.bench.planning_time import replans
from hairpin.bench.steps import (
    Eager,
    Say,
    budgeted,
    errors,
    fake_inputs,
    fake_peak_bytes,
    interleave,
    one_thread,
    peak_bytes,
    run,
    time_ratio,
)
from hairpin.bench.zoo import Case, select
from hairpin.errors import HairpinError, MemoryBudgetError, PlanError

RATIOS = (0.5, 0.3, 0.2)
PARTS = ("table", "longest", "expert", "training", "estimates", "options", "planning")
_TWO_GIB = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        parts: of ``PARTS``.
        titles: of the cases; none: all.
        ratios: budgets of the table.
        rounds: timed turns; the median counts.
        longest_budget_bytes: budget that the longest length is looked for in.
    """

    parts: Sequence[str] = PARTS
    titles: Sequence[str] = ()
    ratios: Sequence[float] = RATIOS
    rounds: int = 5
    longest_budget_bytes: int = _TWO_GIB


def measure(settings: Settings, *, say: Say) -> dict[str, Any]:
    """Run the parts that are asked for. Gives plain data; ``say`` is told what goes on.

    Raises:
        MissingExtraError: a library that a case comes from is absent.
        ProfileError: there is no case of that title.
    """
    chosen = select(*settings.titles)
    rounds, described = settings.rounds, machine()
    result: dict[str, Any] = {
        "benchmark": "chunk",
        "machine": described,
        "settings": asdict(settings),
    }
    if "table" in settings.parts:
        rows = table(chosen, settings.ratios, rounds=rounds, say=say)
        result["table"] = [asdict(row) for row in rows]
        result["summary"] = [asdict(line) for line in summary(rows)]
    if "longest" in settings.parts:
        budget = settings.longest_budget_bytes
        result["longest"] = [asdict(found) for found in _longest_of(chosen, budget, say=say)]
    if "expert" in settings.parts:
        result["expert"] = asdict(expert(rounds=rounds, say=say))
    if "training" in settings.parts:
        result["training"] = [asdict(row) for row in training(rounds=rounds, say=say)]
    if "estimates" in settings.parts:
        result["estimates"] = [asdict(row) for row in estimates(chosen, say=say)]
    if "options" in settings.parts:
        result["options"] = [asdict(row) for row in own_options(chosen, rounds=rounds, say=say)]
    if "planning" in settings.parts:
        result["planning"] = [asdict(row) for row in replans(chosen, say=say)]
    return result


# ------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one budget; None where there is no figure.

    Attributes:
        ratio: of the budget to the eager peak, both above the outputs.
        certified_bytes: peak that the plan promises.
        honoured: the measured peak is within the budget.
        exact: the measured peak is the certified one, to the byte.
        floor_bytes: where the budget cannot be met, the least that could be.
        note: why there are no figures.
    """

    model: str
    variant: str
    length: int
    ratio: float
    eager_peak_bytes: int
    output_bytes: int
    budget_bytes: int
    peak_bytes: int | None = None
    certified_bytes: int | None = None
    honoured: bool | None = None
    exact: bool | None = None
    time_ratio: float | None = None
    time_s: float | None = None
    eager_time_s: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    search_s: float | None = None
    floor_bytes: int | None = None
    note: str = ""


def table(
    chosen: Sequence[Case],
    ratios: Sequence[float] = RATIOS,
    *,
    rounds: int = 5,
    say: Say = lambda _: None,
) -> list[Row]:
    """Every case at every ratio. A budget that cannot be met gives a row with its floor."""
    rows: list[Row] = []
    with one_thread():
        for case in chosen:
            eager = Eager.of(case)
            for ratio in ratios:
                rows.append(_row(eager, ratio, rounds=rounds))
                say(_line(rows[-1]))
    return rows


def _row(eager: Eager, ratio: float, *, rounds: int) -> Row:
    blank = Row(
        model=eager.case.name,
        variant=eager.case.variant,
        length=eager.case.length,
        ratio=ratio,
        eager_peak_bytes=eager.peak_bytes,
        output_bytes=eager.output_bytes,
        budget_bytes=eager.budget_bytes(ratio),
    )
    try:
        ours = budgeted(eager.case, eager.inputs, blank.budget_bytes)
    except MemoryBudgetError as error:
        return replace(blank, floor_bytes=getattr(error, "floor_bytes", None), note=str(error))
    except HairpinError as error:
        return replace(blank, note=f"{type(error).__name__}: {error}")
    step = partial(run, ours.model, eager.inputs)
    absolute, relative = errors(step(), eager.output)
    peak = peak_bytes(step)
    times_s = interleave({"eager": eager.step, "ours": step}, rounds=rounds)
    return replace(
        blank,
        peak_bytes=peak,
        certified_bytes=ours.plan.peak_bytes,
        honoured=peak <= blank.budget_bytes,
        exact=peak == ours.plan.peak_bytes,
        time_ratio=time_ratio(times_s["ours"], times_s["eager"]),
        time_s=median(times_s["ours"]),
        eager_time_s=median(times_s["eager"]),
        max_error=absolute,
        relative_error=relative,
        search_s=ours.search_s,
    )


def _line(row: Row) -> str:
    title = f"{row.model} {row.variant}".strip()
    if row.peak_bytes is None:
        return f"{title} at {row.ratio}: {row.note.splitlines()[0] if row.note else 'no figures'}"
    return (
        f"{title} at {row.ratio}: peak {row.peak_bytes / row.eager_peak_bytes:.3f}, "
        f"time {row.time_ratio:.2f}, error {row.relative_error:.1e}, search {row.search_s:.1f} s"
        f"{'' if row.honoured else ', BUDGET BROKEN'}{'' if row.exact else ', not as certified'}"
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows at one ratio.

    Attributes:
        feasible: rows with a plan; ``infeasible``: rows with a floor; the others have a note only.
        median_time_ratio: over the feasible rows; None where there is none.
    """

    ratio: float
    rows: int
    feasible: int
    infeasible: int
    honoured: int
    exact: int
    median_time_ratio: float | None
    worst_time_ratio: float | None
    worst_relative_error: float | None


def summary(rows: Sequence[Row]) -> list[Summary]:
    """One line for each ratio, in the order they come."""
    lines = []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        here = [row for row in rows if row.ratio == ratio]
        times = [row.time_ratio for row in here if row.time_ratio is not None]
        wrong = [row.relative_error for row in here if row.relative_error is not None]
        lines.append(
            Summary(
                ratio=ratio,
                rows=len(here),
                feasible=len(times),
                infeasible=sum(row.floor_bytes is not None for row in here),
                honoured=sum(row.honoured is True for row in here),
                exact=sum(row.exact is True for row in here),
                median_time_ratio=median(times) if times else None,
                worst_time_ratio=max(times, default=None),
                worst_relative_error=max(wrong, default=None),
            )
        )
    return lines


# ------------------------------------------------------------------------------ the longest length


@dataclass(frozen=True, kw_only=True)
class Longest:
    """Longest inputs whose activations fit a budget.

    Attributes:
        gain: ours over eager's.
        note: how eager's bytes were found where the model cannot run on fake tensors.
    """

    model: str
    variant: str
    kind: str
    unit: str
    budget_bytes: int
    eager_length: int
    length: int
    gain: float
    note: str = ""


def _longest_of(cases: Sequence[Case], budget: int, *, say: Say) -> Iterator["Longest"]:
    """Of every case that can be planned on shapes; of the others it is said why not."""
    for case in cases:
        try:
            yield longest(case, budget, say=say)
        except PlanError as error:
            say(f"{case.title}: none, {error}")


def longest(case: Case, budget: int = _TWO_GIB, *, say: Say = lambda _: None) -> Longest:
    """Bisect for the longest length within ``budget`` bytes, eager and ours, to 1 part in 64.

    Nothing of that length is computed but what comes before a language model's first block, and
    the whole eager run of a model that looks at values and so cannot run on fake tensors.
    """
    case = replace(case, build=case.build_longest or case.build)
    model, note = case.build().requires_grad_(False), ""
    if case.kind == "1d":  # tokens take no room, and masks that eager skips show on real ones only
        eager_peak = partial(_foretold_bytes, case, model)
    else:
        eager_peak = partial(fake_peak_bytes, case, model)
    try:
        eager_peak(case.tiny_length)
    except (RuntimeError, NotImplementedError) as error:
        note = f"eager measured for real: {type(error).__name__}"
        eager_peak = partial(_real_peak_bytes, case, model)
    eager_length = bisect(lambda n: eager_peak(n) <= budget, start=case.length)
    length = bisect(partial(_fits, case, budget), start=eager_length)
    found = Longest(
        model=case.name,
        variant=case.variant,
        kind=case.kind,
        unit=case.unit,
        budget_bytes=budget,
        eager_length=eager_length,
        length=length,
        gain=length / eager_length,
        note=note,
    )
    say(f"{case.title}: {eager_length} -> {length} {case.unit} ({found.gain:.1f} times)")
    return found


def bisect(fits: Callable[[int], bool], *, start: int) -> int:
    """The largest length that fits, to 1 part in 64; ``start`` need not fit, and 0 always does."""
    low, high = 0, max(start, 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _foretold_bytes(case: Case, model: nn.Module, length: int) -> int:
    with torch.no_grad():
        return hp.estimate(model, case.inputs(length))


def _real_peak_bytes(case: Case, model: nn.Module, length: int) -> int:
    return peak_bytes(partial(run, model, case.inputs(length)), warm=False)


def _fits(case: Case, budget: int, length: int) -> bool:
    model = case.build().requires_grad_(False)
    try:
        with torch.no_grad():
            hp.plan(model, fake_inputs(case, length), memory=budget)
    except MemoryBudgetError:
        return False
    return True


# --------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was foretold for a shape that no plan was made at, and what was measured there.

    Attributes:
        subject: ``"eager"``, or ``"ours"`` for the program planned at ``planned_length``.
        ratio: estimate over measured.
    """

    model: str
    variant: str
    subject: str
    planned_length: int
    length: int
    estimate_bytes: int | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    note: str = ""


def estimates(
    chosen: Sequence[Case], *, ratio: float = 0.5, say: Say = lambda _: None
) -> list[Estimate]:
    """Foretell each case at ``other_length`` and run it there, eager and under a plan.

    The plan is made at ``length``, for a budget at ``ratio``; ``hp.estimate`` foretells.
    """
    rows: list[Estimate] = []
    for case in chosen:
        for subject in ("eager", "ours"):
            rows.append(_estimate(case, subject, ratio))
            say(f"estimate: {rows[-1]}")
    return rows


def _estimate(case: Case, subject: str, ratio: float) -> Estimate:
    blank = Estimate(
        model=case.name,
        variant=case.variant,
        subject=subject,
        planned_length=case.length,
        length=case.other_length,
    )
    other = case.inputs(case.other_length)
    try:
        if subject == "eager":
            model = case.build().requires_grad_(False)
            foretold = hp.estimate(model, other)
        else:
            eager = Eager.of(case)
            ours = budgeted(case, eager.inputs, eager.budget_bytes(ratio))
            model, foretold = ours.model, hp.estimate(ours.model, other)
    except (HairpinError, RuntimeError, NotImplementedError) as error:
        return replace(blank, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    peak = peak_bytes(partial(run, model, other))
    return replace(blank, estimate_bytes=foretold, peak_bytes=peak, ratio=foretold / peak)
