"""The cheapest sequence of splits: a shortest path through a layered graph.

Each layer is a point of the model, each node of a layer a state the tensor may be in there (split
along a dim, or whole), each edge the cost of getting from one state to the next. The published
rule, to switch at every boundary or around every branch, is one path among these; K axial stages a
cycle need only K/(K-1) switches a cycle on the cheapest one.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

S = TypeVar("S", bound=Hashable)
Cost = tuple[int, int]


def cheapest_path(
    layers: Sequence[Sequence[S]], edge_cost: Callable[[int, S, S], Cost | None]
) -> list[S] | None:
    """One state per layer such that the sum of edge costs is least; None if there is no way.

    Costs are pairs compared in order: the second decides between paths of equal first cost.

    Args:
        layers: the states allowed at each layer.
        edge_cost: cost of going from a state of layer ``i`` to one of layer ``i + 1``; None if
            that is not allowed.
    """
    best: dict[S, tuple[Cost, list[S]]] = {s: ((0, 0), [s]) for s in layers[0]}
    for index, layer in enumerate(layers[1:]):
        reached: dict[S, tuple[Cost, list[S]]] = {}
        for state in layer:
            for previous, (cost, path) in best.items():
                step = edge_cost(index, previous, state)
                if step is None:
                    continue
                total = (cost[0] + step[0], cost[1] + step[1])
                if state not in reached or total < reached[state][0]:
                    reached[state] = (total, [*path, state])
        best = reached
    return min(best.values(), key=lambda item: item[0])[1] if best else None
