"""Choosing regions: the cheapest way through a graph that never holds more than the budget.

Between two boundaries a graph runs either as it is, if nothing there holds too much, or as a
region. The cheapest sequence is a shortest path; the least budget for which there is a path is the
floor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hairpin.graph.memory import Flow
from hairpin.planning.loops.regions import CACHED_BYTES, FRESH_BYTES, Candidate
from hairpin.planning.speeds import Speeds


@dataclass(frozen=True)
class Choice:
    """A region with the chunk size that fits.

    Attributes:
        inner: regions of a turn that run as loops themselves.
    """

    candidate: Candidate
    chunk: int
    cost_s: float
    inner: tuple["Choice", ...] = ()


def largest_chunk(candidate: Candidate, budget_bytes: int) -> int:
    """Most units a turn may take under the budget; 0 where even one is too many."""
    if candidate.ahead_bytes > budget_bytes or candidate.fixed_bytes > budget_bytes:
        return 0
    room = budget_bytes - candidate.fixed_bytes
    chunk = candidate.units if candidate.inside is None else 1
    for own, unit in candidate.moments:
        if own > room:
            return 0
        if unit > 0:
            chunk = min(chunk, int((room - own) / unit))
    return chunk


def best_chunk(candidate: Candidate, budget_bytes: int, speeds: Speeds) -> int:
    """The fastest chunk under the budget that makes equal turns; 0 where even one unit is too many.

    The largest is not always the fastest: a smaller turn's results may stay in the cache.
    """
    most = largest_chunk(candidate, budget_bytes)
    if not most:
        return 0
    units = candidate.units
    moments = [(own, unit) for own, unit in candidate.moments if unit > 0]
    cached = min((int((CACHED_BYTES - own) / unit) for own, unit in moments), default=0)
    kept = -(-FRESH_BYTES * units // max(candidate.largest_bytes, 1)) - 1
    limits = [most, *(limit for limit in (cached, kept) if 0 < limit < most)]
    chunks = dict.fromkeys(-(-units // -(-units // limit)) for limit in limits)
    return min(chunks, key=lambda chunk: cost_s(candidate, chunk, speeds))


def cost_s(candidate: Candidate, chunk: int, speeds: Speeds) -> float:
    """Seconds that the loop takes beyond what its steps take without it; less than 0 if it gains.

    Turns cost their operations' starts and the parts cut and put together; products get thinner;
    what every turn reads whole is read again; results become small enough to stay in the cache.
    """
    found = candidate
    turns = -(-found.units // chunk)
    starts = (turns - 1) * found.steps * speeds.step_s + turns * speeds.turn_s
    thinner = found.thin_flops / chunk * speeds.rows / speeds.flops_per_s
    shared = turns * found.overlap_flops / speeds.flops_per_s
    again = (turns - 1) * found.reread_bytes / speeds.cached_bytes_per_s
    moved = (found.copied_bytes + found.repeated_bytes) / speeds.bytes_per_s
    return starts + thinner + shared + again + moved - gain_s(found, chunk, speeds)


def gain_s(candidate: Candidate, chunk: int, speeds: Speeds) -> float:
    """Seconds saved since the results of a turn are smaller than the whole ones.

    Of what staying in the cache saves only half counts: much of a step's time is not writing.
    """
    if chunk >= candidate.units:
        return 0.0
    plain, fresh = candidate.made_bytes
    memory_s, cached_s = 1 / speeds.bytes_per_s, 1 / speeds.cached_bytes_per_s
    gain = 0.0
    if candidate.largest_bytes * chunk < FRESH_BYTES * candidate.units:
        gain += fresh * (1 / speeds.fresh_bytes_per_s - memory_s)
    if candidate.turn(chunk) <= CACHED_BYTES:
        gain += (plain + fresh) * (memory_s - cached_s) / 2
    return gain


def floor_bytes(candidate: Candidate) -> int:
    """Most bytes alive at chunk size 1."""
    return max(candidate.ahead_bytes, int(candidate.fixed_bytes + candidate.turn(1)) + 1)


def chosen(candidate: Candidate, budget_bytes: int, speeds: Speeds) -> Choice | None:
    """A region with its chunk size, and the loops inside its turns; None where it does not fit."""
    chunk = best_chunk(candidate, budget_bytes, speeds)
    if not chunk:
        return None
    cost, inside = cost_s(candidate, chunk, speeds), candidate.inside
    if inside is None:
        return Choice(candidate, chunk, cost)
    room = budget_bytes - candidate.fixed_bytes
    inner = cheapest(inside.flow, inside.marks, inside.found, room, speeds)
    if inner is None:
        return None
    cost += candidate.units * sum(each.cost_s for each in inner)
    return Choice(candidate, chunk, cost, tuple(inner))


def cheapest(
    flow: Flow,
    marks: Sequence[int],
    found: Iterable[Candidate],
    budget_bytes: int,
    speeds: Speeds,
) -> list[Choice] | None:
    """The cheapest regions that keep every moment under the budget; None where there are none."""
    reached: dict[int, tuple[float, tuple[int, Choice | None]]] = {
        marks[0]: (0.0, (marks[0], None))
    }
    by_start: dict[int, list[Choice]] = {}
    for candidate in found:
        choice = chosen(candidate, budget_bytes, speeds)
        if choice is not None:
            by_start.setdefault(candidate.start, []).append(choice)
    for place, mark in enumerate(marks[:-1]):
        if mark not in reached:
            continue
        base = reached[mark][0]
        after = marks[place + 1]
        if all(flow.during(step) <= budget_bytes for step in flow.steps[mark:after]):
            _reach(reached, after, base, (mark, None))
        for choice in by_start.get(mark, ()):
            _reach(reached, choice.candidate.end, base + choice.cost_s, (mark, choice))
    if marks[-1] not in reached:
        return None
    choices: list[Choice] = []
    place = marks[-1]
    while place != marks[0]:
        place, taken = reached[place][1]
        if taken is not None:
            choices.append(taken)
    return choices[::-1]


def _reach(
    reached: dict[int, tuple[float, tuple[int, Choice | None]]],
    place: int,
    cost: float,
    step: tuple[int, Choice | None],
) -> None:
    if place not in reached or cost < reached[place][0]:
        reached[place] = (cost, step)


def least_budget(flow: Flow, marks: Sequence[int], found: Iterable[Candidate]) -> int:
    """The least budget for which there is a way, at chunk size 1."""
    return bottleneck(flow, marks, found).nbytes


@dataclass(frozen=True)
class Bottleneck:
    """The stretch between two marks that sets the least budget."""

    nbytes: int
    start: int
    end: int


def bottleneck(flow: Flow, marks: Sequence[int], found: Iterable[Candidate]) -> Bottleneck:
    """What sets the least budget for which there is a way, at chunk size 1."""
    least: dict[int, Bottleneck] = {marks[0]: Bottleneck(0, marks[0], marks[0])}
    by_start: dict[int, list[Candidate]] = {}
    for candidate in found:
        by_start.setdefault(candidate.start, []).append(candidate)

    def reach(start: int, end: int, nbytes: int) -> None:
        worst = max(least[start], Bottleneck(nbytes, start, end), key=lambda each: each.nbytes)
        if end not in least or worst.nbytes < least[end].nbytes:
            least[end] = worst

    for place, mark in enumerate(marks[:-1]):
        after = marks[place + 1]
        reach(mark, after, max((flow.during(step) for step in flow.steps[mark:after]), default=0))
        for candidate in by_start.get(mark, ()):
            reach(mark, candidate.end, floor_bytes(candidate))
    return least[marks[-1]]
