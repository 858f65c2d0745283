"""The shortest path is the shortest, and as short as arithmetic says for axial models."""

import itertools
from math import prod

import numpy as np
import pytest
import torch

import hairpin as hp
from hairpin.layout import shard_size
from hairpin.models import axial3d
from hairpin.planning.split.cost import Costs
from hairpin.planning.split.shard import cheapest_path
from planning.toys import Axial, axial_attends

FAR = 10**9
SECOND = 1000  # the first cost counts this much more than the second


def random_chain(rng):
    """States of each layer, and the edge costs between layers; FAR where there is no edge."""
    layers = [list(range(rng.integers(1, 6))) for _ in range(rng.integers(1, 9))]
    edges = []
    for before, after in itertools.pairwise(layers):
        first = rng.integers(0, 6, (len(before), len(after)))
        second = rng.integers(0, 3, first.shape)
        forbidden = rng.random(first.shape) < rng.choice([0.0, 0.2, 0.5])
        edges.append(np.where(forbidden, FAR, first * SECOND + second))
    return layers, edges


def costs_of_all_paths(layers, edges):
    """Costs of every path there is, as an array with one dim per layer."""
    total = np.zeros([len(layer) for layer in layers], dtype=np.int64)
    for place, edge in enumerate(edges):
        shape = [1] * len(layers)
        shape[place : place + 2] = edge.shape
        total = total + edge.reshape(shape)
    return total


def test_500_random_chains_against_brute_force():
    rng = np.random.default_rng(0)
    blocked = 0
    for _ in range(500):
        layers, edges = random_chain(rng)

        def edge_cost(layer, start, end, edges=edges):
            cost = int(edges[layer][start, end])
            return None if cost == FAR else divmod(cost, SECOND)

        path = cheapest_path(layers, edge_cost)
        costs = costs_of_all_paths(layers, edges)
        if path is None:
            blocked += 1
            assert costs.min() >= FAR
        else:
            assert costs[tuple(path)] == costs.min()
    assert 0 < blocked < 400


def switches_needed(dims, cycles, allowed=lambda stage, state: True):
    """Fewest changes of the split over ``cycles`` of one stage along each of ``dims`` dims."""
    stages = [dim for _ in range(cycles) for dim in range(dims)]
    layers = [
        [state for state in range(dims) if state != along and allowed(along, state)]
        for along in stages
    ]
    path = cheapest_path(layers, lambda layer, start, end: (int(start != end), 0))
    return sum(a != b for a, b in itertools.pairwise(path))


@pytest.mark.parametrize(("dims", "fewest", "every_boundary"), [(3, 17, 35), (4, 15, 47)])
def test_twelve_cycles(dims, fewest, every_boundary):
    assert switches_needed(dims, 12) == fewest
    # The published rule: each stage runs with the split along the dim of the stage before it ...
    follow = switches_needed(dims, 12, lambda stage, state: state == (stage - 1) % dims)
    assert follow == every_boundary
    # ... or one dim stays split, and the stage along it is a branch that is switched into and out.
    branch = switches_needed(dims, 12, lambda stage, state: state == (0 if stage == 1 else 1))
    assert branch == 24


@pytest.mark.parametrize(("dims", "cycles"), [(2, 3), (3, 4), (3, 12), (4, 3), (4, 12)])
def test_plans_of_axial_models_switch_as_seldom_as_can_be(dims, cycles):
    plan = hp.plan(
        Axial(dims, cycles),
        torch.zeros(1, *[4] * dims, 4),
        hp.Mesh(sp=2),
        attends=axial_attends(dims),
    )
    segments = -(-dims * cycles // (dims - 1))
    assert plan.switches == segments - 1 + 1  # and the gather of the thin output
    assert plan.stages[-1].moves[-1].dst == " ".join(["b", *"pqru"[:dims], "v"])
    if (dims, cycles) in {(3, 12), (4, 12)}:
        assert plan.switches - 1 == {3: 17, 4: 15}[dims]


def test_the_three_dim_model_of_the_house():
    model = axial3d.Axial3D(axial3d.Axial3DConfig(grid=(4, 4, 4), channels=8, depth=4, heads=2))
    plan = hp.plan(model, torch.zeros(1, 4, 4, 4, 5), hp.Mesh(sp=2), attends=axial3d.ATTENDS)
    assert len(plan.stages) == 13
    assert plan.switches == 6  # twelve stages, two to a segment: five switches, and the gather


def sent(lengths, channels, src, dst, ranks):
    """Bytes that the busiest rank sends to turn the split of a float32 tensor; dst None: gather."""
    rest = 4 * channels * prod(n for place, n in enumerate(lengths) if place not in (src, dst))
    mine = [shard_size(lengths[src], ranks, rank) for rank in range(ranks)]
    if dst is None:
        return max(rest * length * (ranks - 1) for length in mine)
    n = lengths[dst]
    return max(rest * length * (n - shard_size(n, ranks, rank)) for rank, length in enumerate(mine))


@pytest.mark.parametrize("lengths", [(5, 7, 6), (4, 4, 64), (16, 5, 9), (4, 6)])
def test_no_other_plan_sends_fewer_bytes(lengths):
    ranks, dims = 4, len(lengths)
    plan = hp.plan(
        Axial(dims, 2),
        torch.zeros(1, *lengths, 4),
        hp.Mesh(sp=ranks),
        attends=axial_attends(dims),
        costs=Costs(link_bytes_per_s=1e6, latency_s=0.0, flops_per_s=1e30),
    )
    free = [[dim for dim in range(dims) if dim != along] for along in range(dims)] * 2
    every_plan = (
        sum(
            sent(lengths, 4, src, dst, ranks) for src, dst in itertools.pairwise(held) if src != dst
        )
        + sent(lengths, 1, held[-1], None, ranks)
        for held in itertools.product(*free, range(dims))
    )
    assert sum(move.bytes for move in plan.moves) == min(every_plan)
