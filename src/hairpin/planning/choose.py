"""Choosing regions: the cheapest way through a graph that never holds more than the budget.

Between two boundaries a graph runs either as it is, if nothing there holds too much, or as a
region. The cheapest sequence is a shortest path; the least budget for which there is a path is the
floor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hairpin.graph.memory import Flow
from hairpin.planning.regions import Candidate


@dataclass(frozen=True)
class Speeds:
    """What a turn of a loop costs on this machine, besides the work itself.

    Attributes:
        step_s: starting one operation.
        turn_s: one turn of a loop, without its operations.
        bytes_per_s: copying.
        flops_per_s: products of large matrices.
        rows: of a product at which half of that speed is reached.
    """

    step_s: float = 5e-6
    turn_s: float = 2e-5
    bytes_per_s: float = 6e9
    flops_per_s: float = 5e10
    rows: float = 6.0


@dataclass(frozen=True)
class Choice:
    """A region with the chunk size that fits."""

    candidate: Candidate
    chunk: int
    cost_s: float


def largest_chunk(candidate: Candidate, budget_bytes: int) -> int:
    """Most units a turn may take under the budget; 0 where even one is too many."""
    if candidate.ahead_bytes > budget_bytes or candidate.fixed_bytes > budget_bytes:
        return 0
    room = budget_bytes - candidate.fixed_bytes
    chunk = candidate.units
    for own, unit in candidate.moments:
        if own > room:
            return 0
        if unit > 0:
            chunk = min(chunk, int((room - own) / unit))
    return chunk


def cost_s(candidate: Candidate, chunk: int, speeds: Speeds) -> float:
    """Seconds that the loop takes beyond what its steps take without it."""
    turns = -(-candidate.units // chunk)
    rows = candidate.rows * chunk
    products = candidate.product_flops / speeds.flops_per_s
    slower = products * speeds.rows / rows if rows != float("inf") else 0.0
    moved = candidate.copied_bytes * 2 + candidate.repeated_bytes * 2
    again = (turns - 1) * (
        speeds.turn_s + candidate.steps * speeds.step_s
    ) + turns * candidate.reread_bytes / (speeds.bytes_per_s * 4)
    return again + slower + moved / speeds.bytes_per_s + speeds.turn_s


def floor_bytes(candidate: Candidate) -> int:
    """Most bytes alive at chunk size 1."""
    return max(candidate.ahead_bytes, int(candidate.fixed_bytes + candidate.turn(1)) + 1)


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
        chunk = largest_chunk(candidate, budget_bytes)
        if chunk:
            choice = Choice(candidate, chunk, cost_s(candidate, chunk, speeds))
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
