"""Every verb's backward is its exact adjoint, at every order, under every way of running it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from comm.cases import line, near, part_of, places, uniform
from hairpin.comm.maps import map_between
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.layout import Layout
from hairpin.run.launch import launch

PAIRS = [
    ({"t": 5, "s": 7}, "t/sp s", "t s/sp"),
    ({"t": 1, "s": 4}, "t/sp s", "t s/sp"),
    ({"b": 2, "t": 3, "s": 2}, "(b t/sp) s", "(b t) s/sp"),
]


@dataclass(frozen=True)
class Case:
    """A verb, and the same map on the list of all ranks' tensors in one process."""

    name: str
    shape: Callable[[int], tuple[int, ...]]
    verb: Callable[[Tensor], Tensor]
    truth: Callable[[list[Tensor]], list[Tensor]]
    replicated: bool = False


def cases(mesh: Mesh, sizes: dict[str, int], before: str, after: str) -> list[Case]:
    """All verbs, both conventions, awaited at once and later."""
    ranks = range(mesh.world)
    src, dst = Layout.of(before, sizes), Layout.of(after, sizes)

    def at(rank: int) -> dict[str, tuple[int, int]]:
        return {"sp": (rank, mesh.world)}

    def joined(parts: list[Tensor]) -> Tensor:
        dim = src.split_dim("sp")
        expanded = [
            part.reshape(tuple(src.local_sizes(at(rank)).values()))
            for rank, part in enumerate(parts)
        ]
        return torch.cat(expanded, src.position(dim)).reshape(src.global_shape)

    def split(x: Tensor, layout: Layout) -> list[Tensor]:
        return [part_of(x, layout, at(rank)) for rank in ranks]

    def whole(_: int) -> tuple[int, ...]:
        return src.global_shape

    def part(rank: int) -> tuple[int, ...]:
        return src.local_shape_at(at(rank))

    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack(xs).sum(0)

    found = [
        Case(
            "scatter",
            whole,
            lambda x: hp.scatter(x, src, mesh),
            lambda xs: [part_of(x, src, at(rank)) for rank, x in enumerate(xs)],
        )
    ]
    for later in (False, True):

        def await_(result: Tensor | hp.Pending, later: bool = later) -> Tensor:
            assert isinstance(result, hp.Pending) == later
            return result.wait() if later else result

        word, how = (", started early", {"wait": False}) if later else ("", {})
        found += [
            Case(
                f"switch{word}",
                part,
                lambda x, a=await_, how=how: a(hp.switch(x, src, dst, mesh, **how)),
                lambda xs: split(joined(xs), dst),
            ),
            Case(
                f"reduce_scatter{word}",
                whole,
                lambda x, a=await_, how=how: a(hp.reduce_scatter(x, src, mesh, **how)),
                lambda xs: split(total(xs), src),
            ),
        ]
        for grad in ("partial", "replicated"):
            found += [
                Case(
                    f"gather {grad}{word}",
                    part,
                    lambda x, a=await_, g=grad, how=how: a(hp.gather(x, src, mesh, grad=g, **how)),
                    lambda xs: [joined(xs)] * mesh.world,
                    replicated=grad == "replicated",
                ),
                Case(
                    f"all_reduce {grad}{word}",
                    whole,
                    lambda x, a=await_, g=grad, how=how: a(
                        hp.all_reduce(x, mesh, axis="sp", grad=g, **how)
                    ),
                    lambda xs: [total(xs)] * mesh.world,
                    replicated=grad == "replicated",
                ),
            ]
    return found


# The adjoint test: <A x, y> = <x, A^T y>, summed over all ranks


def inner_products() -> list[tuple[str, float, float]]:
    mesh, found = line(), []
    rank = mesh.global_rank
    for pair in PAIRS:
        for case in cases(mesh, *pair):
            x = uniform(*case.shape(rank), seed=10 + rank).requires_grad_()
            z = case.verb(x)
            y = uniform(*z.shape, seed=0 if case.replicated else 50 + rank)
            (transposed,) = torch.autograd.grad(z, x, y)
            left, right = (z.detach() * y).sum(), (x.detach() * transposed).sum()
            found.append((f"{case.name} {pair}", left.item(), right.item()))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_the_backward_is_the_adjoint(world):
    for by_rank in zip(*launch(inner_products, world, timeout_s=60), strict=True):
        name = by_rank[0][0]
        left, right = (sum(rank[i] for rank in by_rank) for i in (1, 2))
        assert left == pytest.approx(right, rel=1e-12, abs=1e-12), name


# Gradients of gradients


def objective(z: Tensor, seed: int) -> Tensor:
    """Not linear, and every element of ``z`` meets every other."""
    weight = uniform(*z.shape, seed=seed)
    return (weight * z**3).sum() + (weight * z).sum() ** 2


def three_orders() -> None:
    mesh = line()
    rank, ranks = mesh.global_rank, range(mesh.world)
    for pair in PAIRS:
        for case in cases(mesh, *pair):
            inputs = [uniform(*case.shape(r), seed=20 + r).requires_grad_() for r in ranks]
            seeds = [7 if case.replicated else 70 + r for r in ranks]
            outputs = case.truth(inputs)
            x = inputs[rank].detach().clone().requires_grad_()
            z = case.verb(x)
            assert near(z, outputs[rank]), f"{case.name} {pair}"
            truth = sum(objective(o, seed) for o, seed in zip(outputs, seeds, strict=True))
            mine = objective(z, seeds[rank])
            for order in (1, 2, 3):
                wanted = torch.autograd.grad(truth, inputs, create_graph=True)
                (got,) = torch.autograd.grad(mine, x, create_graph=True)
                assert near(got, wanted[rank], 1e-11), f"order {order}: {case.name} {pair}"
                weights = [
                    uniform(*w.shape, seed=90 + r) for r, w in zip(ranks, wanted, strict=True)
                ]
                truth = sum((u * w**2).sum() for u, w in zip(weights, wanted, strict=True))
                mine = (weights[rank] * got**2).sum()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_of_every_order(world):
    launch(three_orders, world, timeout_s=60)


# Complex numbers


def complex_gradients() -> None:
    mesh = line()
    rank, ranks = mesh.global_rank, range(mesh.world)
    for case in cases(mesh, *PAIRS[0]):
        inputs = [
            torch.complex(uniform(*case.shape(r), seed=r), uniform(*case.shape(r), seed=r + 9))
            for r in ranks
        ]
        inputs = [x.requires_grad_() for x in inputs]
        x = inputs[rank].detach().clone().requires_grad_()
        outputs, z = case.truth(inputs), case.verb(x)
        sum((o * o.conj() * o).abs().sum() for o in outputs).backward()
        (z * z.conj() * z).abs().sum().backward()
        assert near(x.grad, inputs[rank].grad), case.name


def test_complex_gradients():
    launch(complex_gradients, 3, timeout_s=60)


# Transposes and chains


def double_transposes() -> None:
    mesh = init_mesh(sp=2)
    x = Layout("t s", t=3, s=5)
    for src, dst, is_partial in (
        (x, x.split("t", "sp"), False),
        (x, x.split("t", "sp"), True),
        (x.split("t", "sp"), x, False),
        (x.split("t", "sp"), x.split("s", "sp"), False),
    ):
        linear = map_between(src, dst, mesh, partial=is_partial)
        shape = src.local_shape(mesh)
        once, twice = linear, linear.transpose().transpose()
        assert torch.equal(once.start(uniform(*shape))(), twice.start(uniform(*shape))()), linear


def test_the_transpose_of_the_transpose_is_the_map():
    launch(double_transposes, 2, timeout_s=60)


def there_and_back() -> None:
    mesh = line()
    src, dst = Layout("t/sp s", t=7, s=5), Layout("t s/sp", t=7, s=5)
    for grad in ("partial", "replicated"):
        x = uniform(7, 5).requires_grad_()
        y = hp.scatter(x, src, mesh)
        y = hp.switch(hp.switch(y, src, dst, mesh), dst, src, mesh)
        y = hp.gather(y, src, mesh, grad=grad)
        y.backward(uniform(7, 5, seed=1))  # the same loss on every rank: N times, on its own part
        want = part_of(uniform(7, 5, seed=1), src, places(mesh)) * mesh.world
        assert near(part_of(x.grad, src, places(mesh)), want), grad
        total = hp.all_reduce(x.grad, mesh, axis="sp", grad="partial")
        assert near(total, uniform(7, 5, seed=1) * mesh.world), grad


@pytest.mark.parametrize("world", [2, 3])
def test_round_trips_give_the_gradient_of_the_mean_over_ranks(world):
    launch(there_and_back, world, timeout_s=60)


# Ways of running


def block(x: Tensor, sizes: dict[str, int], mesh: Mesh, *, wait: bool = True) -> Tensor:
    """Something of each kind: local work, a switch, local work along ``t``, the switch back."""
    src, dst = Layout.of("t/sp s", sizes), Layout.of("t s/sp", sizes)
    x = (x * 1.5).tanh()
    if wait:
        y = hp.switch(x, src, dst, mesh)
        return hp.switch(y.cumsum(0) * y, dst, src, mesh) + x
    y = hp.switch(x, src, dst, mesh, wait=False).wait()
    back = hp.switch(y.cumsum(0) * y, dst, src, mesh, wait=False)
    x = x.clone()  # independent work meanwhile
    return back.wait() + x


def truth_of_block(x: Tensor) -> Tensor:
    x = (x * 1.5).tanh()
    return x.cumsum(0) * x + x


def checkpointed() -> None:
    mesh = line()
    at = places(mesh)
    shapes = [{"t": 5, "s": 7}, {"t": 3, "s": 2}]
    for reentrant in (False, True):
        for wait in (True, False):
            mine, outputs, wants = [], [], []
            for sizes in shapes:  # two shapes, interleaved before their backwards
                layout = Layout.of("t/sp s", sizes)
                whole = uniform(*layout.global_shape).requires_grad_()
                truth = truth_of_block(truth_of_block(whole))
                (want,) = torch.autograd.grad((truth**2).sum(), whole)
                wants.append(part_of(want, layout, at))
                x = part_of(whole.detach(), layout, at).clone().requires_grad_()
                y = x
                run = partial(block, sizes=sizes, mesh=mesh, wait=wait)
                for _ in range(2):
                    y = checkpoint(run, y, use_reentrant=reentrant)
                assert near(y, part_of(truth.detach(), layout, at))
                mine.append(x)
                outputs.append(y)
            sum((y**2).sum() for y in outputs).backward()
            for x, want in zip(mine, wants, strict=True):
                assert near(x.grad, want), f"reentrant={reentrant} wait={wait}"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_both_modes_of_checkpointing(world):
    launch(checkpointed, world, timeout_s=60)


def accumulated() -> None:
    mesh = line()
    sizes = {"t": 5, "s": 7}
    layout, at = Layout.of("t/sp s", sizes), places(mesh)
    whole = uniform(5, 7).requires_grad_()
    (truth_of_block(whole) ** 2).sum().backward()
    want = part_of(whole.grad, layout, at)
    x = part_of(uniform(5, 7), layout, at).clone().requires_grad_()
    for wait in (True, False):
        x.grad = None
        for _ in range(3):
            (block(x, sizes, mesh, wait=wait) ** 2).sum().backward()
        assert near(x.grad, 3 * want)
        x.grad = None
        loss = (block(x, sizes, mesh, wait=wait) ** 2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert near(x.grad, 2 * want), f"the same graph twice, wait={wait}"


def test_accumulation_and_two_backwards_through_one_graph():
    launch(accumulated, 2, timeout_s=60)


def unused_parts() -> None:
    """Where a rank uses only some of what it got, zeros go back for the rest."""
    mesh = line()
    sizes = {"t": 6, "s": 6}
    src, dst = Layout.of("t/sp s", sizes), Layout.of("t s/sp", sizes)
    x = part_of(uniform(6, 6), src, places(mesh)).clone().requires_grad_()
    y = hp.switch(x, src, dst, mesh)
    (y[2] if mesh.global_rank == 1 else 0 * y[0]).sum().backward()
    want = torch.zeros(6, 6, dtype=torch.float64)
    want[2, 3:] = 1  # rank 1 holds columns 3, 4, 5 and used row 2 of them
    assert torch.equal(x.grad, part_of(want, src, places(mesh)))


def test_a_rank_may_use_a_part_of_what_it_got():
    launch(unused_parts, 2, timeout_s=60)
