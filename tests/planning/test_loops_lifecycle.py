"""Loops on and off, copied, saved and loaded, and models that change after they were planned."""

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.errors import PlanError
from hairpin.planning.loops.stamp import stamp
from planning.looping import WIDE, Block, Stack, difference, looped, planned

X = torch.randn(2, 48, 8, dtype=WIDE, generator=torch.Generator().manual_seed(0))


def stack():
    torch.manual_seed(1)
    return Stack(Block(), Block()).double().eval()


@pytest.fixture(scope="module")
def plan():
    return planned(stack(), (X,), 0.7)


def eager(model, x=X):
    with torch.no_grad():
        return model(x)


def test_on_and_off_again_leaves_the_model_as_it_was(plan):
    model = stack()
    before, keys = eager(model), list(model.state_dict())
    names = {path: set(vars(module)) for path, module in model.named_modules()}
    for _ in range(2):
        hp.parallelize(model, plan)
        assert list(model.state_dict()) == keys
        assert difference([eager(model)], [before], 1e-12) is None
        hp.detach(model)
    assert torch.equal(eager(model), before)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == names


EQUALS = {
    "in train()": lambda: nn.Linear(32, 8).double(),
    "in eval()": lambda: nn.Linear(32, 8).double().eval(),
}
OTHERS = {
    "no bias": lambda: nn.Linear(32, 8, bias=False).double(),
    "dtype": lambda: nn.Linear(32, 8),
    "class": lambda: nn.Sequential(nn.Linear(32, 8).double().eval()).eval(),
    "shape": lambda: nn.Linear(32, 9).double(),
}


@pytest.mark.parametrize("name", EQUALS)
def test_a_layer_may_be_replaced_by_an_equal_one(plan, name):
    model = stack()
    hp.parallelize(model, plan)
    eager(model)
    model.blocks[1].down = EQUALS[name]()
    got = eager(model)
    hp.detach(model)
    assert difference([got], [eager(model)], 1e-12) is None


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_replaced_by_another_is_refused(plan, name):
    model = stack()
    hp.parallelize(model, plan)
    model.blocks[1].down = OTHERS[name]()
    with pytest.raises(PlanError, match="has changed since it was planned"):
        eager(model)


def test_a_planned_block_replaced_by_a_fresh_one_is_refused(plan):
    model = stack()
    hp.parallelize(model, plan)
    model.blocks[1] = Block().double().eval()
    with pytest.raises(PlanError, match=r"'blocks\.1' has been replaced since it was planned"):
        eager(model)
    hp.detach(model)
    assert eager(model).shape == X.shape


def test_a_layer_that_acts_otherwise_in_training_is_refused_in_training():
    assert stamp(nn.Sequential(nn.Dropout(0.1))) != stamp(nn.Sequential(nn.Dropout(0.1).eval()))
    assert stamp(nn.Sequential(nn.Linear(2, 2))) == stamp(nn.Sequential(nn.Linear(2, 2).eval()))
    assert stamp(nn.Sequential(nn.BatchNorm1d(2))) != stamp(nn.Sequential(nn.BatchNorm1d(2).eval()))


def test_weights_are_read_when_the_model_runs(plan):
    model = stack()
    hp.parallelize(model, plan)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2)
        model.blocks[1].down = nn.Linear(32, 8).double()
        model.blocks[0].norm.weight = nn.Parameter(torch.randn(8, dtype=WIDE))
    got = eager(model)
    hp.detach(model)
    assert difference([got], [eager(model)], 1e-12) is None


@pytest.mark.slow
def test_two_models_carry_two_plans(plan):
    first, second = stack(), Block().double().eval()
    other = planned(second, (X,), 0.8)
    wanted = eager(first), eager(second)
    hp.parallelize(first, plan)
    hp.parallelize(second, other)
    got = eager(first), eager(second)
    assert difference(got, wanted, 1e-12) is None
    hp.detach(first)
    assert difference([eager(second)], [wanted[1]], 1e-12) is None


def test_a_plan_of_another_model_is_refused(plan):
    with pytest.raises(PlanError):
        hp.parallelize(Stack(Block(), Block(), Block()).double().eval(), plan)
    with pytest.raises(PlanError):
        hp.parallelize(nn.Linear(8, 8), plan)


def test_a_plan_survives_its_file(plan, tmp_path):
    path = tmp_path / "plan.toml"
    plan.save(path)
    loaded = type(plan).load(path)
    assert loaded == plan
    assert loaded.to_toml() == plan.to_toml()
    model = stack()
    assert difference([looped(model, loaded, X)], [eager(model)], 1e-12) is None


SCRIPT = """
import sys, torch, hairpin as hp
from hairpin.planning.plan import Plan
from planning.test_loops_lifecycle import X, stack
model = stack()
with torch.no_grad():
    wanted = model(X)
    hp.parallelize(model, Plan.load(sys.argv[1]))
    got = model(X)
print(float((got - wanted).abs().max()))
"""


def test_a_plan_works_in_another_process(plan, tmp_path):
    path = tmp_path / "plan.toml"
    plan.save(path)
    roots = [str(Path(hp.__file__).parents[1]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(roots), "OMP_NUM_THREADS": "1"},
    )
    assert float(done.stdout.split()[-1]) < 1e-12


def test_a_plan_for_another_graph_of_the_same_structure_is_refused(plan, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml().replace(plan.loops[0].graph, "0" * 16))
    model = stack()
    loaded = type(plan).load(path)
    with pytest.raises(PlanError):
        looped(model, loaded, X)


def test_a_copy_of_a_model_with_loops_runs_on_its_own_weights(plan):
    model = stack()
    hp.parallelize(model, plan)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.5)
    got, kept = eager(twin), eager(model)
    hp.detach(twin)
    hp.detach(model)
    assert difference([got], [eager(twin)], 1e-12) is None
    assert difference([kept], [eager(model)], 1e-12) is None


def test_the_state_of_a_model_with_loops_is_saved_and_loaded(plan):
    model, other = stack(), stack()
    hp.parallelize(model, plan)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert difference([eager(model)], [eager(other)], 1e-12) is None


def heads(model):
    for block in model.blocks:
        block.heads = 4


def epsilon(model):
    model.blocks[0].norm.eps = 1.0


def inner_hook(model):
    model.blocks[0].up.register_forward_hook(lambda _, __, output: output * 2)


def inner_pre_hook(model):
    model.blocks[1].up.register_forward_pre_hook(lambda _, given: (given[0] * 2,))


def block_hook(model):
    model.blocks[0].register_forward_hook(lambda _, __, output: output * 2)


def other_forward(model):
    model.blocks[1].up.forward = lambda x: torch.cat([x] * 4, -1)


def other_layer(model):
    model.blocks[0].down = nn.Sequential(nn.Linear(32, 8), nn.ReLU()).double()


def no_layer(model):
    model.blocks[0].norm = nn.Identity()


def training(model):
    model.train()


def training_inside(model):
    model.blocks[0].norm.train()


def single(model):
    model.float()


CHANGES = [heads, epsilon, inner_hook, inner_pre_hook, block_hook, other_forward, other_layer]
CHANGES += [no_layer, training, training_inside]


@pytest.mark.parametrize("attached", [False, True], ids=["before attaching", "after attaching"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_refused_or_computed_as_it_is_now(change, attached, plan):
    model = stack()
    try:
        if attached:
            hp.parallelize(model, plan)
            change(model)
        else:
            change(model)
            hp.parallelize(model, plan)
        got = eager(model)
    except PlanError as error:
        assert "plan" in str(error)  # noqa: PT017
        return
    hp.detach(model)
    assert difference([got], [eager(model)], 1e-12) is None


def test_another_dtype_is_refused_or_computed_in_it(plan):
    model = stack()
    hp.parallelize(model, plan)
    model.float()
    try:
        got = eager(model, X.float())
    except PlanError:
        return
    hp.detach(model)
    assert difference([got], [eager(model, X.float())], 1e-5) is None


def test_a_call_that_keeps_gradients_is_refused(plan):
    model = stack()
    hp.parallelize(model, plan)
    with pytest.raises(PlanError, match="no_grad"):
        model(X)
    with torch.no_grad():
        model(X)


def attending():
    """Two blocks with settings of all sorts, and a head that shares its weights."""

    class Set(Block):
        def __init__(self):
            super().__init__()
            self.act, self.cfg, self.scales = torch.tanh, {"k": [1.0]}, (1.0, 2.0)
            self.style = SimpleNamespace(shift=0.5)

        def forward(self, x):
            factor = self.cfg["k"][0] * self.scales[1] + self.style.shift
            return super().forward(x) + factor * self.act(x)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Stack(Set(), Set())
            self.first, self.last = nn.Linear(8, 64), nn.Linear(8, 64)
            self.last.weight = self.first.weight

        def forward(self, x):
            x = self.blocks(x)
            return (self.first(x) * self.last(x)).exp().amax(-1)

    torch.manual_seed(1)
    return Tied().double().eval()


@pytest.fixture(scope="module")
def settings_model():
    model = attending()
    plan = hp.plan(model, X, memory=hp.estimate(model, X) // 3)
    assert "" in plan.programs
    return model, plan


def other_function(model):
    model.blocks.blocks[0].act = torch.sin


def other_item(model):
    model.blocks.blocks[0].cfg["k"][0] = 3.0


def other_tuple(model):
    model.blocks.blocks[1].scales = (1.0, 3.0)


def other_object(model):
    model.blocks.blocks[1].style.shift = 0.7


def untied(model):
    model.last.weight = nn.Parameter(model.first.weight * 2)


@pytest.mark.parametrize(
    "change",
    [other_function, other_item, other_tuple, other_object, untied],
    ids=lambda f: f.__name__,
)
def test_settings_of_all_sorts_and_tied_weights_may_not_change(change, settings_model):
    model, plan = copy.deepcopy(settings_model[0]), settings_model[1]
    wanted = eager(model)
    hp.parallelize(model, plan)
    twin = copy.deepcopy(model)
    assert difference([eager(model)], [wanted], 1e-12) is None
    change(model)
    with pytest.raises(PlanError, match="has changed since it was planned"):
        eager(model)
    assert difference([eager(twin)], [wanted], 1e-12) is None  # a copy has settings of its own


def test_an_activation_of_a_torch_layer_may_not_change():
    layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 64, 32)
    plan = hp.plan(model, x, memory=int(0.8 * hp.estimate(model, x)))
    assert plan.loops
    hp.parallelize(model, plan)
    for each in model.layers:
        each.activation = torch.tanh
    with pytest.raises(PlanError, match="has changed since it was planned"):
        eager(model, x)


def test_hooks_on_a_block_that_were_there_before_run_once():
    for paths in (("blocks.0",), ("",)):
        model = stack() if paths[0] else Block().double().eval()
        calls = []

        def double(module, given, output, calls=calls):
            calls.append(type(output))
            return 2 * output

        for path in paths:
            model.get_submodule(path).register_forward_hook(double)
        wanted = eager(model)
        plan = planned(model, (X,), 0.7)
        assert plan.loops
        calls.clear()
        hp.parallelize(model, plan)
        assert difference([eager(model)], [wanted], 1e-12) is None
        assert calls == [torch.Tensor]


def hooks(module):
    yield module.register_forward_hook
    yield module.register_forward_pre_hook
    yield module.register_full_backward_hook
    yield module.register_full_backward_pre_hook


@pytest.mark.parametrize("kind", range(4))
def test_a_block_with_a_hook_inside_is_left_and_named(kind):
    model, calls = Stack(Block(), Block(), Block()).double(), []
    budget = int(0.9 * hp.estimate(model, X, backward=True))
    list(hooks(model.blocks[1].up))[kind](lambda *_: calls.append(1))
    plan = hp.plan(model, X, memory=budget, backward=True)
    assert "'up'" in plan.left["blocks.1"]
    assert {path for loops in plan.loops for path in loops.modules} == {"blocks.0", "blocks.2"}
    hp.parallelize(model, plan)
    calls.clear()
    model(X).sum().backward()
    assert calls == [1]


def test_hooks_inside_all_blocks_leave_nothing_to_loop_over():
    model = stack()
    budget = hp.estimate(model, X) // 2
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: None)
    with pytest.raises(hp.MemoryBudgetError, match="module 'up' inside this Block carries a hook"):
        hp.plan(model, X, memory=budget)


@pytest.fixture(scope="module")
def training_plan():
    model = stack().train()
    return hp.plan(model, X, memory=int(0.6 * hp.estimate(model, X, backward=True)), backward=True)


@pytest.mark.parametrize("kind", range(4))
def test_a_hook_inside_a_planned_block_is_refused(kind, training_plan):
    model = stack().train()
    hp.parallelize(model, training_plan)
    model(X)
    list(hooks(model.blocks[1].up))[kind](lambda *_: None)
    with pytest.raises(PlanError, match="has changed since it was planned"):
        model(X)


@pytest.mark.parametrize("shape", [(1, 96, 8), (2, 1, 8), (1, 1, 8)])
def test_a_length_of_one_keeps_to_the_budget(plan, shape):
    model, x = stack(), torch.randn(shape, dtype=WIDE)
    wanted, whole = eager(model, x), hp.estimate(model, x)
    hp.parallelize(model, plan)
    assert (hp.estimate(model, x) < whole) == (whole > plan.memory_bytes)
    assert hp.profile(model, x).peak_bytes <= plan.memory_bytes
    assert difference([eager(model, x)], [wanted], 1e-12) is None


def test_a_length_of_one_keeps_to_the_budget_in_training(training_plan):
    model, x = stack().train(), torch.randn(1, 80, 8, dtype=WIDE)
    assert hp.estimate(model, x, backward=True) > training_plan.memory_bytes
    hp.parallelize(model, training_plan)
    assert hp.estimate(model, x, backward=True) <= training_plan.memory_bytes


@pytest.mark.parametrize("length", [48, pytest.param(60, marks=pytest.mark.slow), 384])
def test_a_training_plan_from_a_file_acts_as_the_fresh_one(training_plan, length):
    x, outcomes = torch.randn(2, length, 8, dtype=WIDE), []
    for plan in (training_plan, type(training_plan).from_toml(training_plan.to_toml())):
        assert plan == training_plan
        model = stack().train()
        hp.parallelize(model, plan)
        try:
            model(x).square().sum().backward()
        except hp.MemoryBudgetError as error:
            outcomes.append(str(error))
        else:
            outcomes.append((hp.estimate(model, x, backward=True), model.blocks[0].up.weight.grad))
    fresh, filed = outcomes
    if length == 384:
        assert "cannot be trained in" in fresh
        assert fresh == filed
    else:
        assert fresh[0] == filed[0]
        torch.testing.assert_close(fresh[1], filed[1])


def test_a_training_plan_without_its_laws_is_refused(training_plan):
    loops = tuple(replace(each, kept=(), loop_peaks=()) for each in training_plan.loops)
    model = stack().train()
    hp.parallelize(model, replace(training_plan, loops=loops, programs={}))
    with pytest.raises(PlanError, match="make it again"):
        model(X)


def test_a_plan_is_pickled_without_its_graphs(plan):
    copied = pickle.loads(pickle.dumps(plan))  # noqa: S301 - our own bytes
    assert copied == plan
    assert plan.programs
    assert not copied.programs
    model = stack()
    assert difference([looped(model, copied, X)], [eager(model)], 1e-12) is None


def test_a_model_with_loops_says_how_to_be_saved(plan):
    model = stack()
    hp.parallelize(model, plan)
    with pytest.raises(PlanError, match="state_dict"):
        torch.save(model, io.BytesIO())
    hp.detach(model)
    torch.save(model, io.BytesIO())
