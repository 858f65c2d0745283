"""Loops inside the turns of another loop.

Where one unit of a dim still holds too much, such as one head of an attention over all rows, a
turn of one unit is searched for regions as a block is.
"""

from dataclasses import replace

from hairpin.graph.memory import Flow
from hairpin.planning.loops.choose import bottleneck
from hairpin.planning.loops.emit import EmissionError, Region, body_of
from hairpin.planning.loops.regions import Candidate, Inside, boundaries, candidates


def nested(flow: Flow, candidate: Candidate) -> Candidate | None:
    """The same region with loops in its turns; None where there are none that hold less."""
    try:
        body = body_of(flow, Region(candidate.start, candidate.end, candidate.seed))
    except EmissionError:
        return None
    marks = boundaries(body)
    inside = Inside(body, tuple(marks), tuple(candidates(body, marks)))
    least = bottleneck(body, inside.marks, inside.found).nbytes
    if least >= candidate.turn(1):
        return None
    return replace(candidate, moments=((least, 0.0),), inside=inside)
