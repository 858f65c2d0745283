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
from hairpin.models.alphafold.sampling import FirstRows
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


class PairsOnly(nn.Module):
    """An extra MSA stack gives back pairs: nobody uses its MSA."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, *args):
        return self.stack(*args)[1]


def stack_case(kind, size="uneven", *, checkpointed=None):
    """A stack of two blocks in training, with dropout, and its arguments."""
    sequences, residues = SIZES[size]
    config = presets.tiny(multimer="multimer" in kind)

    def build():
        if "template" in kind:
            template = replace(config.template, blocks=2)
            model = TemplatePairStack(template, multimer=config.multimer)
        elif "extra" in kind:
            model = PairsOnly(EvoformerStack(config.extra_msa, 2))
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
    with pytest.raises(PlanError, match="pieces=0; there is at least one"):
        hp.plan_axial(hp.Mesh(sp=2), pieces=0)


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
        else:
            m = m + 1e-9
    with pytest.raises(DisagreementError, match="different work"):
        model(m, z, msa_mask, pair_mask)


@pytest.mark.parametrize("what", ["length", "random state", "numbers"])
def test_ranks_with_other_inputs_are_told(what):
    launch(other_inputs, 2, what)
