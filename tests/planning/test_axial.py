"""Dynamic axial parallelism of a folding model: values and all gradients against one process."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.comm.rehearsal import RehearsalMesh
from hairpin.errors import DisagreementError, PlanError
from hairpin.models.alphafold import AlphaFold, presets
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.models.alphafold.sampling import FirstRows, SampleMSA
from hairpin.models.alphafold.templates import TemplatePairStack
from hairpin.run.launch import launch
from marks import slow
from planning import truth
from trunk_oracle import random_features, randomize

MANY_CHUNKS = ("gather", "gather", 1, 50)  # takes longest
WAYS = [
    *itertools.product(["gather", "ring", "channels"], ["gather", "ring"], [1]),
    ("gather", "gather", 2),
    ("channels", "gather", 3),
    ("channels", "ring", 20),
    ("channels", "gather", 2, 3),
    ("ring", "ring", 1, 2),
    MANY_CHUNKS,
]
WORDS = ("product", "passing", "pieces", "chunks")

SIZES = {"uneven": (7, 13), "tiny": (2, 3), "one": (1, 1), "large": (7, 41)}


def stack_case(kind, size="uneven", *, checkpointed=None):
    """A stack of two blocks in training, with dropout, and its arguments."""
    sequences, residues = SIZES[size]
    config = presets.tiny(multimer="multimer" in kind)

    def build():
        if "template" in kind:
            template = replace(config.template, blocks=2)
            model = TemplatePairStack(template, multimer=config.multimer)
        elif "extra" in kind:
            model = EvoformerStack(config.extra_msa, 2)
        else:
            model = EvoformerStack(config.evoformer, 2)
        return truth.randomised(model, 0.3).train()

    def arguments():
        width = config.template.c_t if "template" in kind else config.c_z
        z = truth.seeded((residues, residues, width))
        pair_mask = (truth.seeded((residues, residues), 5) > -1.5).double()
        if "template" in kind:
            return (z, pair_mask), {}
        m = truth.seeded((sequences, residues, config.c_e if "extra" in kind else config.c_m))
        msa_mask = (truth.seeded((sequences, residues), 4) > -1).double()
        return (m, z, msa_mask, pair_mask), {}

    def prepare(model):
        if checkpointed is None:
            return
        for block in (model.stack if "extra" in kind else model).blocks:
            block.__class__ = checkpointing(type(block), reentrant=checkpointed == "reentrant")

    return truth.Case(f"{kind} {size}", build, arguments, {}, prepare=prepare)


def checkpointing(kind, *, reentrant):
    def call(self, *args):
        return checkpoint(kind.__call__, self, *args, use_reentrant=reentrant)

    return type(kind.__name__, (kind,), {"__call__": call})


def split_run(case, mesh, **words):
    torch.manual_seed(11)
    model = case.build()
    case.prepare(model)
    hp.parallelize(model, hp.plan_axial(mesh, **words), mesh)
    torch.manual_seed(12)
    result = truth.run(model, case)
    hp.sync_grads(model, mesh)
    result.parameters = {name: p.grad for name, p in model.named_parameters()}
    result.inputs = [truth.mean_over_ranks(grad, mesh) for grad in result.inputs]
    return result


def words_of(way):
    return dict(zip(WORDS, way, strict=False))


def check_stack(case, ways):
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=30)
    wanted = truth.truth_of(case)
    for way in ways:
        got = split_run(case, mesh, **words_of(way))
        truth.require_equal(got, wanted, f"{case.name}, {way}")


KINDS = ["monomer", "multimer", "extra", "extra multimer", "template", "template multimer"]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_that_of_one_process(kind, world):
    ways = WAYS[world % 4 :: 4]
    if kind not in {"monomer", "extra"}:
        ways = [way for way in ways if way != MANY_CHUNKS]
    launch(check_stack, world, stack_case(kind), ways)


@pytest.mark.parametrize("kind", ["monomer", "multimer"])
def test_one_rank_computes_in_chunks(kind):
    ways = [("gather", "gather", 1, 3), ("ring", "ring", 1, 2)]
    launch(check_stack, 1, stack_case(kind), ways)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_that_of_one_process_in_every_way(kind, size, world):
    launch(check_stack, world, stack_case(kind, size), WAYS)


@pytest.mark.parametrize("size", ["tiny", "one"])
@pytest.mark.parametrize("kind", ["monomer", "multimer"])
def test_ranks_may_hold_nothing(kind, size):
    launch(check_stack, 4, stack_case(kind, size), WAYS[1::4])


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["monomer", slow("multimer")])
def test_checkpointed_blocks_run_again_alike(kind, mode):
    launch(check_stack, 2, stack_case(kind, checkpointed=mode), WAYS[-1:])


# -------------------------------------------------------------------------------- the whole model


def built(*, multimer, residues=11):
    config = presets.tiny(multimer=multimer)
    config = replace(config, data=replace(config.data, max_msa_clusters=6))
    torch.manual_seed(0)
    model = randomize(AlphaFold(config)).double()
    if multimer:
        model.sampling = FirstRows(config.data)
    return model, random_features(config, residues=residues)


def whole_model(model, features, *, train):
    """Every output and all gradients of one recycle and one more."""
    model.train(train)
    torch.manual_seed(3)
    out = model(features, recycles=1)
    outputs = truth.floats(out)
    truth.loss_of([o for o in outputs if o.requires_grad]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return truth.Result([o.detach().clone() for o in outputs], [], grads)


def check_model(multimer, train, words, residues=11):
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=60)
    model, features = built(multimer=multimer, residues=residues)
    wanted = whole_model(model, features, train=train)
    model, features = built(multimer=multimer, residues=residues)
    hp.parallelize(model, hp.plan_axial(mesh, **words), mesh)
    got = whole_model(model, features, train=train)
    hp.sync_grads(model, mesh)
    got.parameters = {name: p.grad for name, p in model.named_parameters()}
    truth.require_equal(got, wanted, f"{multimer=}, {words}")


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("multimer", [False, True])
def test_the_whole_model_is_that_of_one_process(multimer, world):
    words = {"product": "ring", "passing": "ring"} if world == 3 else {"product": "channels"}
    launch(check_model, world, multimer, world == 2, words)


def held_while_it_runs(multimer, degrees):
    """Shapes that a rank of a rehearsal makes of the extra MSA and of each template."""
    mesh, axes = RehearsalMesh(0, **degrees), tuple(degrees)
    model, features = built(multimer=multimer)
    plan = hp.plan_axial(mesh, axis=axes if len(axes) > 1 else axes[0])
    hp.parallelize(model, plan, mesh)
    stack = model.template_embedder.template_pair_stack
    shapes = {}

    def watch(name, module):
        def note(module, args, out):
            shapes.setdefault(name, tuple(out.shape))

        module.register_forward_hook(note)

    watch("extra", model.extra_msa_embedder)
    watch("template", stack)
    model(features, recycles=0)
    return shapes, features


@pytest.mark.parametrize("degrees", [{"sp": 4}, {"rows": 2, "columns": 2}])
def test_what_one_stack_alone_reads_is_whole_on_no_rank(degrees):
    """11 residues on 4 ranks: 3 on the first, which holds the most."""
    shapes, features = held_while_it_runs(False, degrees)
    extra = len(features["extra_msa"])
    assert shapes["extra"][:2] == (-(-extra // 4), 11)
    assert shapes["template"][:2] == (3, 11)
    complexes, features = held_while_it_runs(True, degrees)
    assert complexes["extra"][1] == 3  # along r, for the outer product, which comes first
    assert complexes["template"][:2] == (11, 11)  # added to all pairs


def test_the_whole_model_of_fewer_residues_than_ranks():
    launch(check_model, 4, False, False, {"chunks": 2}, 3)


# -------------------------------------------------------------------------------------- lifecycle


def lifecycle():
    mesh = hp.init_mesh(sp=2, timeout_s=10)
    case = stack_case("monomer")
    model = case.build()
    keys = list(model.state_dict())
    plan = hp.plan_axial(mesh)
    hp.parallelize(model, plan, mesh)
    assert hp.plan_of(model) == plan
    assert list(model.state_dict()) == keys
    with pytest.raises(PlanError, match="already carries a plan"):
        hp.parallelize(model, plan, mesh)
    assert hp.detach(model) == plan
    assert hp.detach(model) is None
    assert "forward" not in model.__dict__
    with pytest.raises(PlanError, match=r"splits over 4 ranks .* has 2"):
        hp.parallelize(model, replace(plan, degree=4), mesh)
    with pytest.raises(PlanError, match="has no stack of Evoformer blocks"):
        hp.parallelize(nn.Linear(2, 2), plan, mesh)
    assert hp.plan_of(model) is None


def test_a_plan_can_be_taken_off():
    launch(lifecycle, 2)


def test_a_way_that_does_not_exist_is_refused():
    with pytest.raises(PlanError, match="product='rings': write one of gather, ring, channels"):
        hp.plan_axial(hp.Mesh(sp=2), product="rings")
    with pytest.raises(PlanError, match="passing='across'"):
        hp.plan_axial(hp.Mesh(sp=2), nn.Linear(1, 1), passing="across")
    with pytest.raises(PlanError, match="product='': write one of"):
        hp.plan_axial(hp.Mesh(sp=2), product="")
    for name, number in (("pieces", 0), ("chunks", 2.5), ("chunks", "4")):
        message = f"{name}={number!r}; give a whole number of at least 1"
        with pytest.raises(PlanError, match=message):
            hp.plan_axial(hp.Mesh(sp=2), **{name: number})
    grid = hp.Mesh(rows=2, columns=2)
    assert hp.plan_axial(grid, axis=["rows", "columns"]).product == "grid"
    with pytest.raises(PlanError, match="pieces=4 on the grid"):
        hp.plan_axial(grid, axis=("rows", "columns"), pieces=4)


# ------------------------------------------------------------------------------------- agreement


def other_inputs(what):
    mesh = hp.init_mesh(sp=2, timeout_s=10)
    case = stack_case("monomer")
    model = case.build()
    hp.parallelize(model, hp.plan_axial(mesh), mesh)
    (m, z, msa_mask, pair_mask), _ = case.arguments()
    if mesh.rank("sp") == 1:
        if what == "length":
            m, msa_mask = m[1:], msa_mask[1:]
        elif what == "random state":
            torch.manual_seed(99)
        elif what == "order":
            m = m.flip(0)
        elif what == "masks":
            msa_mask = 1 - msa_mask
        else:
            m = m + 1e-9
    with pytest.raises(DisagreementError, match="different work"):
        model(m, z, msa_mask, pair_mask)


@pytest.mark.parametrize("what", ["length", "random state", "numbers", "order", "masks"])
def test_ranks_with_other_inputs_are_told(what):
    launch(other_inputs, 2, what)


def other_draws(*, by_generator):
    mesh = hp.init_mesh(sp=2, timeout_s=10)
    model, features = built(multimer=True)
    model.sampling = SampleMSA(model.config.data)
    hp.parallelize(model.eval(), hp.plan_axial(mesh), mesh)
    torch.manual_seed(mesh.rank("sp"))
    generator = torch.Generator().manual_seed(mesh.rank("sp")) if by_generator else None
    with pytest.raises(DisagreementError, match="generator" if by_generator else "random state"):
        model(features, recycles=0, generator=generator)


@pytest.mark.parametrize("by_generator", [False, True])
def test_ranks_that_would_draw_other_rows_are_told(by_generator):
    launch(other_draws, 2, by_generator=by_generator)


def by_bfloat16():
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    case = stack_case("monomer")
    arguments = [x.float() for x in case.arguments()[0]]
    found = []
    for words in (None, *({"product": p} for p in ("gather", "ring", "channels"))):
        model = case.build().float().eval()
        if words is not None:
            hp.parallelize(model, hp.plan_axial(mesh, passing="ring", **words), mesh)
        with torch.autocast("cpu", torch.bfloat16):
            m, z = model(*arguments)
        (m.float().square().mean() + z.float().square().mean()).backward()
        if words is not None:
            hp.sync_grads(model, mesh)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append([m.detach().float(), z.detach().float(), grads])
    wanted, *others = found
    for other in others:
        for one, two in zip(wanted, other, strict=True):
            assert float((one - two).norm()) <= 0.02 * float(one.norm())


def test_autocast_reaches_every_product():
    """The sums of many roundings differ: this is no float64 truth."""
    launch(by_bfloat16, 2)


def parts_of_a_model():
    mesh = hp.init_mesh(sp=2, timeout_s=10)
    model, features = built(multimer=False)
    plan = hp.plan_axial(mesh)
    hp.parallelize(model, plan, mesh)
    stack = model.extra_msa_stack
    with pytest.raises(PlanError, match="was split as a part of a larger model"):
        hp.detach(stack)
    sequences, residues = features["extra_msa_mask"].shape
    m = torch.zeros(sequences, residues, model.config.c_e, dtype=torch.float64)
    pairs = torch.zeros(residues, residues, model.config.c_z, dtype=torch.float64)
    mask = torch.ones(residues, residues, dtype=torch.float64)
    with pytest.raises(PlanError, match="call the whole model, or split the stack alone"):
        stack(m, pairs, features["extra_msa_mask"], mask)
    assert hp.detach(model) == plan
    hp.parallelize(stack, plan, mesh)
    assert hp.detach(model) == plan  # of a part of it
    assert not stack._forward_pre_hooks


def test_a_part_of_a_split_model_is_not_taken_for_the_whole():
    launch(parts_of_a_model, 2)
