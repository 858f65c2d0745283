"""Atoms against the arithmetic of shapes, and the flow of dims against known small modules."""

import pytest
import torch
from torch import nn

from hairpin.graph.flow import Atoms, Flow, recording, segments


def bind(module, args, kwargs):
    return {**{str(place): value for place, value in enumerate(args)}, **kwargs}


def flow_of(module: nn.Module, *args: torch.Tensor):
    with torch.no_grad(), recording(module, bind) as trace:
        module(*args)
    return trace, Flow(trace).follow(trace.nodes)


def along(module: nn.Module, *args: torch.Tensor) -> set[int]:
    """Dims of the first argument that the module computes along."""
    trace, flow = flow_of(module, *args)
    atoms = frozenset[int]().union(*(flow.along(node) for node in trace.nodes))
    groups = flow.groups(trace.root.args["0"])
    return {dim for dim, group in enumerate(groups) if atoms.intersection(group)}


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize(
    ("one", "other", "parts"),
    [
        ([6], [6], [6]),
        ([6], [2, 3], [2, 3]),
        ([4, 6], [8, 3], [4, 2, 3]),
        ([2, 3, 4], [6, 4], [2, 3, 4]),
        ([12, 2], [2, 12], [2, 6, 2]),
        ([1, 5], [5], [5]),
    ],
)
def test_tied_groups_are_one(one, other, parts):
    atoms = Atoms()
    left, right = ([a for size in sizes for a in atoms.new(size)] for sizes in (one, other))
    assert atoms.tie(tuple(left), tuple(right))
    assert atoms.leaves(left) == atoms.leaves(right)
    assert [atoms.sizes[atom] for atom in atoms.leaves(left)] == parts


def test_lengths_without_a_common_part_are_not_tied():
    atoms = Atoms()
    one, other = (atoms.new(4) + atoms.new(9)), (atoms.new(6) + atoms.new(6))
    assert not atoms.tie(one, other)


@pytest.mark.parametrize(
    ("size", "parts"), [(2, [2]), (4, [4]), (8, [4, 2]), (3, None), (24, [4, 6])]
)
def test_the_outer_part_of_a_group(size, parts):
    atoms = Atoms()
    head = atoms.head(atoms.new(4) + atoms.new(6), size)
    assert (None if head is None else [atoms.sizes[atom] for atom in head]) == parts


@pytest.mark.parametrize("seed", range(20))
def test_segments_hold_the_same_elements(seed):
    """Cut a random number line at random places twice: runs must agree in length, and not split."""
    generator = torch.Generator().manual_seed(seed)
    primes = [2, 3, 2, 5, 2, 3]

    def merged() -> tuple[int, ...]:
        shape = [primes[0]]
        for prime in primes[1:]:
            if torch.rand((), generator=generator) < 0.5:
                shape.append(prime)
            else:
                shape[-1] *= prime
        return tuple(shape)

    before, after = merged(), merged()
    found = segments(before, after)
    assert [d for ours, _ in found for d in ours] == list(range(len(before)))
    assert [d for _, theirs in found for d in theirs] == list(range(len(after)))
    product = lambda shape, dims: torch.tensor([shape[d] for d in dims]).prod()  # noqa: E731
    assert all(product(before, ours) == product(after, theirs) for ours, theirs in found)


x = torch.randn(2, 3, 4, 5)
RULES = [
    (lambda x: x.relu() + 1, set()),
    (lambda x: x.softmax(1), {1}),
    (lambda x: x.mean((0, 2)), {0, 2}),
    (lambda x: x.cumsum(-1), {3}),
    (lambda x: x.flatten(0, 1).softmax(-1).view(2, 3, 4, 5), {3}),
    (lambda x: x.flatten(1, 2).softmax(1), {1, 2}),
    (lambda x: x.view(6, 4, 5).transpose(0, 1).reshape(4, 2, 3, 5).sum(2), {1}),
    (lambda x: x.view(3, 2, 4, 5), {0, 1}),  # regroups: a part of neither dim would do
    (lambda x: x + x.transpose(0, 1)[:1, :1], {0, 1}),
    (lambda x: x @ x.transpose(-1, -2), {2, 3}),  # both sides of the scores are the same dim
    (lambda x: torch.einsum("bsnd,btnd->bst", x, x), {1, 2, 3}),
    (lambda x: x * torch.arange(3.0)[:, None, None], {1}),
    (lambda x: x * torch.rand_like(x), {0, 1, 2, 3}),
    (lambda x: x.clone().mul_(2).add_(x), set()),
    (lambda x: x[:, :2], {1}),
    (lambda x: torch.cat([x, x], 2), {2}),
    (lambda x: torch.stack(x.unbind(0)), {0}),
    (lambda x: x.amax(1, keepdim=True) * x, {1}),
]


@pytest.mark.parametrize(("function", "dims"), RULES)
def test_what_a_function_computes_along(function, dims):
    assert along(Call(function), x) == dims


def test_parts_compute_what_the_whole_does_along_free_dims():
    """The independent truth: run on two halves and put together."""
    wide = torch.randn(4, 4, 4, 4)
    for function, _ in RULES:
        if function(x).shape != x.shape or "rand" in function.__code__.co_names:
            continue
        try:
            whole = function(wide)
        except RuntimeError:
            continue  # written for the lengths of ``x``
        for dim in set(range(4)) - along(Call(function), wide):
            parts = torch.cat([function(part) for part in wide.chunk(2, dim)], dim)
            torch.testing.assert_close(parts, whole)


def test_channels_are_the_dims_that_parameters_carry():
    module = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.GELU())
    trace, flow = flow_of(module, x)
    (result,) = trace.results
    given = flow.groups(trace.root.args["0"])
    assert set(given[3]) <= flow.channels
    assert set(flow.groups(result)[3]) <= flow.channels
    assert not flow.channels.intersection(a for group in given[:3] for a in group)
    assert [flow.groups(result)[dim] == given[dim] for dim in range(3)] == [True] * 3


def test_positions_added_are_no_channels():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            return x + self.table

    trace, flow = flow_of(Positions(), x)
    assert not flow.channels
    (table,) = trace.names
    assert flow.groups(table) == flow.groups(trace.root.args["0"])[2:]


def test_a_dropout_works_position_by_position():
    assert along(nn.Dropout(0.5).train(), x) == set()


def test_calls_lie_inside_one_another():
    module = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 2))
    trace, _ = flow_of(module, x)
    assert [call.path for call in trace.root.walk()] == ["", "0", "0.0", "0.1", "1"]
    inner, outer = trace.root.children
    assert inner.begin == 0
    assert inner.end == outer.begin
    assert outer.end == trace.root.end == len(trace.nodes)
    assert inner.outputs == (outer.args["0"],)
