"""A folding model on a grid of ranks: values and all gradients against one process."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hairpin as hp
from hairpin.errors import DisagreementError, MeshError, PlanError
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.models.alphafold.primitives import Attention
from hairpin.planning.axial.attention import attend, crossing
from hairpin.planning.axial.grid import Grid
from hairpin.planning.axial.grid_products import grid_incoming, grid_outgoing
from hairpin.run.launch import launch
from planning import truth
from planning.test_axial import KINDS, SIZES, built, split_run, stack_case, whole_model

AXES = "rows", "columns"
FAST = [*((kind, (2, 2)) for kind in KINDS), ("monomer", (3, 1)), ("template", (1, 3))]
SHAPES = [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (1, 4)]


def named(shape):
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else shape


def grid_mesh(shape, **others):
    return hp.init_mesh(**others, **dict(zip(AXES, shape, strict=True)), timeout_s=60)


def check_stack(case, shape, passings=("ring",), others=None):
    mesh = grid_mesh(shape, **(others or {}))
    wanted = truth.truth_of(case)
    for passing in passings:
        got = split_run(case, mesh, axis=AXES, passing=passing)
        truth.require_equal(got, wanted, f"{case.name}, {shape}, {passing}")
        assert mesh.world == 1 or not mesh._live.in_flight, "a transfer outlives its step"


@pytest.mark.parametrize(("kind", "shape"), FAST, ids=named)
def test_a_stack_is_that_of_one_process(kind, shape):
    launch(check_stack, math.prod(shape), stack_case(kind), shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_that_of_one_process_on_every_grid(kind, size, shape):
    launch(check_stack, math.prod(shape), stack_case(kind, size), shape, ("gather", "ring"))


@pytest.mark.parametrize(("kind", "shape"), [("monomer", (1, 4))], ids=named)
def test_ranks_may_hold_nothing(kind, shape):
    launch(check_stack, 4, stack_case(kind, "tiny"), shape)


@pytest.mark.parametrize(
    ("kind", "mode"), [("monomer", "reentrant"), ("multimer", "not reentrant")]
)
def test_checkpointed_blocks_run_again_alike(kind, mode):
    launch(check_stack, 2, stack_case(kind, checkpointed=mode), (1, 2), ("gather", "ring"))


def test_beside_another_axis():
    launch(check_stack, 4, stack_case("monomer", "tiny"), (2, 1), ("ring",), {"dp": 2})


# -------------------------------------------------------------------------------- the whole model


def check_model(multimer, train, shape, words):
    mesh = grid_mesh(shape)
    model, features = built(multimer=multimer)
    wanted = whole_model(model, features, train=train)
    model, features = built(multimer=multimer)
    hp.parallelize(model, hp.plan_axial(mesh, axis=AXES, **words), mesh)
    got = whole_model(model, features, train=train)
    hp.sync_grads(model, mesh)
    got.parameters = {name: p.grad for name, p in model.named_parameters()}
    truth.require_equal(got, wanted, f"{multimer=}, {shape}, {words}")


@pytest.mark.parametrize("multimer", [False, True])
def test_the_whole_model_is_that_of_one_process(multimer):
    launch(check_model, 4, multimer, not multimer, (2, 2), {"passing": "ring"})


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 3)], ids=named)
@pytest.mark.parametrize("multimer", [False, True])
def test_the_whole_model_is_that_of_one_process_on_other_grids(multimer, shape):
    launch(check_model, math.prod(shape), multimer, True, shape, {})


# ------------------------------------------------------------------------------- bytes and memory


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().size() // 8 for x in tree_leaves(out) if torch.is_tensor(x)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def products_and_their_cost(shape, r=24, c=2):
    mesh = grid_mesh(shape)
    grid = Grid(mesh=mesh, rows="rows", columns="columns", lengths={"i": r, "j": r})
    a, b = (truth.seeded((r, r, c), seed) for seed in (1, 2))
    rows, columns = shape
    hops = rows - 1 + columns - 1
    for product, equation in (
        (grid_outgoing, "ikc,jkc->ijc"),
        (grid_incoming, "kjc,kic->ijc"),
    ):
        wanted = grid.own(torch.einsum(equation, a, b))
        mine = [grid.own(x).clone().requires_grad_() for x in (a, b)]
        for part, times in (("forward", 1), ("backward", 2)):
            before = mesh.traffic.snapshot()
            with Largest() as largest:
                if part == "forward":
                    got = product(*mine, grid)
                else:
                    torch.autograd.grad(got, mine, torch.ones_like(got))
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
            sent = mesh.traffic.since(before).bytes_sent
            assert sent == times * hops * 8 * r * r * c // mesh.world, (part, sent)
            assert largest.elements <= r * r * c // mesh.world, (part, largest.elements)


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (4, 1)], ids=named)
def test_a_product_sends_panels_and_holds_no_more_than_its_part(shape):
    launch(products_and_their_cost, math.prod(shape), shape)


def attention_and_its_bias(shape, r=24, heads=4):
    mesh = grid_mesh(shape)
    lengths = {"r": r, "q": r}
    grid = Grid(mesh=mesh, rows="rows", columns="columns", lengths=lengths, passing="ring")
    attention = truth.randomised(Attention(8, heads), 0.5)
    x, bias = truth.seeded((1, r, 8)), truth.seeded((heads, r, r), 4).requires_grad_()
    mask = (truth.seeded((1, r), 5) > -1).double()
    wanted = attention(x, mask, bias)
    (gradient,) = torch.autograd.grad(wanted.sin().sum(), bias)
    mine = bias.detach()[:, grid.cell("q")].clone().requires_grad_()
    saved = {}
    with Largest() as largest:
        with saved_tensors_hooks(lambda t: note(saved, t), lambda t: t):
            got = attend(attention, x, mask, crossing(mine, "q", grid), grid)
        (ours,) = torch.autograd.grad(got.sin().sum(), mine)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    theirs = mesh.world * gradient[:, grid.cell("q")]  # every rank had these rows
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    part = heads * r * r // mesh.world
    assert largest.elements <= part, largest.elements
    assert sum(size for size in saved.values() if size >= part) == part, saved


def note(saved, x):
    saved[x.untyped_storage().data_ptr()] = x.numel()
    return x


@pytest.mark.parametrize("shape", [(2, 2), (1, 3)], ids=named)
def test_no_rank_holds_a_whole_bias_in_training_either(shape):
    launch(attention_and_its_bias, math.prod(shape), shape)


def bytes_of_a_stack(shape, r=12, s=12, blocks=2):
    """What docs/fold.md says a block sends."""
    mesh = grid_mesh(shape)
    c = presets.tiny().evoformer
    model = EvoformerStack(c, blocks).double().eval()
    hp.parallelize(model, hp.plan_axial(mesh, axis=AXES, passing="ring"), mesh)
    ones = torch.ones(s, r).double(), torch.ones(r, r).double()
    before = mesh.traffic.snapshot()
    with torch.no_grad():
        model(truth.seeded((s, r, c.c_m)), truth.seeded((r, r, c.c_z)), *ones)
    sent = mesh.traffic.since(before).bytes_sent
    (a, b), p = shape, mesh.world
    m, z, there = s * r * c.c_m, r * r * c.c_z, (a - 1) / a + (b - 1) / b
    per_block = 2 * there * z / p  # turns of pairs
    per_block += there * r * r * c.msa_heads / p  # of the row attention's bias
    per_block += 2 * (a + b - 2) * r * r * c.c_triangle / p
    per_block += (p - 1) / p * (r * r * (c.msa_heads + 2 * c.pair_heads) + s * r * c.c_outer)
    turns_of_m = (2 * blocks - 1) * there * m / p
    at_the_end = (p - 1) / p * (m + z)
    assert sent == pytest.approx(8 * (blocks * per_block + turns_of_m + at_the_end), abs=1e-3)


@pytest.mark.parametrize("shape", [(2, 2), (1, 3)], ids=named)
def test_a_block_sends_the_bytes_that_it_should(shape):
    launch(bytes_of_a_stack, math.prod(shape), shape)


# -------------------------------------------------------------------------------------- lifecycle


def lifecycle():
    mesh = grid_mesh((2, 1))
    model = stack_case("monomer").build()
    plan = hp.plan_axial(mesh, axis=AXES)
    assert (plan.axis, plan.degree, plan.product) == (AXES, (2, 1), "grid")
    hp.parallelize(model, plan, mesh)
    assert hp.plan_of(model) == plan
    assert hp.detach(model) == plan
    assert hp.plan_of(model) is None
    with pytest.raises(PlanError, match=r"splits over 3 ranks of axis 'columns', the mesh has 1"):
        hp.parallelize(model, replace(plan, degree=(2, 3)), mesh)


def test_a_plan_can_be_taken_off():
    launch(lifecycle, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"axis": AXES, "product": "ring"}, "product='ring' on the grid"),
        ({"axis": "rows", "product": "grid"}, "product='grid' on axis 'rows' alone"),
        ({"axis": ("rows", "rows")}, "two different ones for a grid"),
        ({"axis": ("rows", "columns", "dp")}, "two different ones for a grid"),
        ({"axis": ("rows", "diagonals")}, "has no axis 'diagonals'"),
        ({"axis": AXES, "passing": "rings"}, "passing='rings': write one of gather, ring"),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(words, message):
    with pytest.raises((PlanError, MeshError), match=message):
        hp.plan_axial(hp.Mesh(dp=1, rows=2, columns=2), **words)


def test_a_degree_for_each_axis():
    with pytest.raises(PlanError, match="give one for each axis"):
        hp.AxialPlan(axis=AXES, degree=4, product="grid")


def other_inputs():
    mesh = grid_mesh((2, 2))
    case = stack_case("monomer")
    model = case.build()
    hp.parallelize(model, hp.plan_axial(mesh, axis=AXES), mesh)
    (m, z, *masks), _ = case.arguments()
    if mesh.global_rank == 3:
        m = m + 1e-9
    with pytest.raises(DisagreementError, match="different work"):
        model(m, z, *masks)


def test_all_ranks_are_told_of_one_with_other_inputs():
    launch(other_inputs, 4)
