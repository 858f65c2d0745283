"""Loops under what people give a model by mistake: eager's result, or a clear refusal."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import hairpin as hp
from hairpin.errors import UnitError
from planning.looping import WIDE, Block, Calls, Stack, difference, looped, pairs, planned


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 48, 8, dtype=WIDE)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model = Block().double().eval()
    return model, planned(model, (torch.randn(2, 48, 8, dtype=WIDE),), 0.7)


@pytest.mark.parametrize("memory", ["2 apples", "", 0, -1, "-3GiB", "GiB"])
def test_an_amount_that_cannot_be_read_is_refused(memory, x):
    with pytest.raises(UnitError):
        hp.plan(Block().double(), (x,), memory=memory)


def rescale(_, x):
    x += 1
    return pairs(x)


def late(_, x):
    y = pairs(x)
    x.mul_(2)
    return y + x


def clear(_, x):
    x[:, 0] = 0
    return pairs(x)


@pytest.mark.parametrize("function", [rescale, late, clear])
def test_an_input_changed_in_place_is_changed_as_eager_does(function, x):
    model = Calls(function)
    plan = planned(model, (x.clone(),))
    assert plan.loops
    ours, eager = x.clone(), x.clone()
    with torch.no_grad():
        expected = model(eager)
    assert torch.equal(looped(model, plan, ours), expected)
    assert torch.equal(ours, eager)
    assert not torch.equal(ours, x)


def aliases(_, x):
    y = pairs(x)
    return x, x.transpose(1, 2), y, y, y.view(-1), y[:, 0], x.clone(), y.clone(), x + 0


def test_outputs_share_storages_with_inputs_and_each_other_as_eager_does(x):
    model = Calls(aliases)
    plan = planned(model, (x,))
    with torch.no_grad():
        expected = model(x)
    got = looped(model, plan, x)

    def sharing(outputs):
        places = [t.untyped_storage().data_ptr() for t in (x, *outputs)]
        return [places.index(place) for place in places]

    assert sharing(got) == sharing(expected)
    assert [t.stride() for t in got] == [t.stride() for t in expected]
    assert difference(got, expected, 0) is None


def test_an_input_that_is_changed_and_returned_is_the_same_tensor(x):
    def function(_, x):
        x += 1
        return x, pairs(x)

    model = Calls(function)
    plan = planned(model, (x.clone(),))
    given = x.clone()
    assert looped(model, plan, given)[0].data_ptr() == given.data_ptr()


def test_batch_norm_in_training_updates_its_statistics_as_eager_does(x):
    def function(self, x):
        return pairs(self.norm(x.transpose(1, 2)).transpose(1, 2))

    model = Calls(function, norm=nn.BatchNorm1d(8)).double().train()
    plan = planned(model, (x,))
    eager = copy.deepcopy(model)
    with torch.no_grad():
        expected = eager(x)
    assert torch.equal(looped(model, plan, x), expected)
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(1, 48), (2, 1), (1, 1), (3, 31), (2, 2), (4, 16), (0, 48)])
def test_lengths_that_were_not_traced_compute_the_same(block, shape):
    model, plan = block
    x = torch.randn(*shape, 8, dtype=WIDE)
    with torch.no_grad():
        expected = model(x)
    assert difference([looped(model, plan, x)], [expected], 1e-12) is None


def test_a_length_at_which_the_code_goes_another_way_computes_what_the_code_does(x):
    def function(self, x):
        y = self.block(x)
        return y * 2 if x.shape[1] > 50 else y

    model = Calls(function, block=Block()).double().eval()
    plan = planned(model, (x,), 0.9)
    for length in (49, 50, 51, 53):
        other = torch.randn(1, length, 8, dtype=WIDE)
        with torch.no_grad():
            expected = model(other)
        try:
            assert difference([looped(model, plan, other)], [expected], 1e-12) is None
        except hp.HairpinError as error:
            assert "plan with an example" in str(error)  # noqa: PT017


def test_code_that_branches_on_values_is_left_alone_and_named(x):
    class Branches(Block):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum() > 0 else 3)

    model = Stack(Branches(), Branches()).double().eval()
    with pytest.raises(hp.MemoryBudgetError, match="values of its input"):
        hp.plan(model, (x,), memory=1)
    assert not any("forward" in vars(module) for module in model.modules())


def test_arguments_by_name_or_by_place_are_one(block, x):
    model, plan = block
    with torch.no_grad():
        expected = model(x)
    assert difference([looped(model, plan, x=x)], [expected], 1e-12) is None


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((), {"y": 1})])
def test_missing_or_unknown_arguments_are_refused_as_eager_does(block, args, kwargs):
    model, plan = block
    with pytest.raises(TypeError):
        looped(model, plan, *args, **kwargs)


def test_an_optional_mask_may_come_or_not(x):
    def function(self, x, mask=None, *, scale=1.0):
        y = pairs(self.block(x)) * scale
        return y if mask is None else y.masked_fill(mask[..., None], 0.0)

    model = Calls(function, block=Block()).double().eval()
    mask = torch.rand(2, 48) > 0.5
    plan = planned(model, ((x, mask), {"scale": 2.0}), 0.6)
    assert plan.loops
    for args, kwargs in [((x, mask), {"scale": 2.0}), ((x,), {}), ((x, None), {"scale": 2.0})]:
        with torch.no_grad():
            expected = model(*args, **kwargs)
        try:
            got = looped(model, plan, *args, **kwargs)
        except hp.HairpinError as error:
            assert "plan" in str(error)  # noqa: PT017
            continue
        assert difference([got], [expected], 1e-12) is None


def test_the_same_tensor_for_two_arguments_does_not_make_them_one(x):
    model = Calls(lambda _, a, b: pairs(a) + b.tanh())
    plan = planned(model, (x, x))
    other = torch.randn_like(x)
    with torch.no_grad():
        expected = model(x, other)
    assert difference([looped(model, plan, x, other)], [expected], 1e-12) is None


@pytest.mark.parametrize("function", [pairs, lambda x: (x.reshape(-1), pairs(x))])
def test_arguments_may_lie_otherwise_in_memory(function, x):
    model = Calls(lambda _, x: function(x))
    plan = planned(model, (x,))
    other = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        expected = tree_leaves(model(other))
    try:
        got = tree_leaves(looped(model, plan, other))
    except hp.HairpinError as error:
        assert "plan" in str(error)  # noqa: PT017
    else:
        assert difference(got, expected, 1e-12) is None


def test_integer_inputs(x):
    model = Calls(lambda self, t: pairs(self.table(t)), table=nn.Embedding(9, 8)).double()
    tokens = torch.randint(0, 9, (2, 48))
    plan = planned(model, (tokens,))
    with torch.no_grad():
        assert difference([looped(model, plan, tokens)], [model(tokens)], 1e-12) is None


def test_outputs_of_all_kinds(x):
    model = Calls(
        lambda _, x: {"b": pairs(x), "a": [x.exp(), 3, None], "c": ("text", torch.ones(3))}
    )
    plan = planned(model, (x,))
    with torch.no_grad():
        expected = model(x)
    got = looped(model, plan, x)
    assert list(got) == list(expected)
    assert got["a"][1:] == [3, None]
    assert got["c"][0] == "text"
    assert difference(tree_leaves(got), tree_leaves(expected), 1e-12) is None


@pytest.mark.slow
def test_a_module_at_two_places_and_one_called_with_two_shapes(x):
    def function(self, x):
        y = self.a(x)
        return self.c(torch.cat([self.b(y), self.a(y[:, :20]), self.c(y[:, :1])], 1))

    shared = Block()
    model = Calls(function, a=shared, b=shared, c=Block()).double().eval()
    plan = planned(model, (x,), 0.6)
    with torch.no_grad():
        expected = model(x)
    assert difference([looped(model, plan, x)], [expected], 1e-12) is None


def test_planning_leaves_no_trace_in_a_module_that_stores_what_it_computes(x):
    class Stores(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            self.last = super().forward(x)
            return self.last

    model = Stores().double().eval()
    with pytest.raises(hp.MemoryBudgetError):
        hp.plan(model, (x,), memory=1)
    assert type(model.count) is torch.Tensor
    assert model.count.item() == 0
    assert not hasattr(model, "last")
