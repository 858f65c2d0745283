"""Blocks as single steps of the graph around them: right for every block, whatever it returns."""

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.planning.loops.blocks import overview
from planning.looping import WIDE, Block, Calls, looped, pairs, planned


def around(*blocks, function):
    return Calls(function, blocks=nn.ModuleList(blocks)).double()


def require_equal(model, x, share=0.3):
    plan = planned(model, (x,), share)
    assert "" in [path for loops in plan.loops for path in loops.modules]
    with torch.no_grad():
        expected = model(x.clone())
    torch.testing.assert_close(looped(model, plan, x.clone()), expected, rtol=1e-12, atol=1e-12)


def each(self, x):
    for block in self.blocks:
        x = pairs(block(x)).tanh()
    return x


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 48, 8, dtype=WIDE)


class Numbered(Block):
    def __init__(self, number):
        super().__init__()
        self.layer_idx = number

    def forward(self, x):
        return super().forward(x) * torch.tensor(1.0 + self.layer_idx)


class WithTensor(Block):
    def __init__(self, number):
        super().__init__()
        self.factor = torch.full((8,), 1.0 + number)

    def forward(self, x):
        return super().forward(x) * self.factor


class WithFunction(Block):
    def __init__(self, number):
        super().__init__()
        self.function = lambda t, n=number: t * (n + 1)

    def forward(self, x):
        return super().forward(self.function(x))


class ReturnsInput(Block):
    def forward(self, x):
        return super().forward(x), x


class ChangesInput(Block):
    def forward(self, x):
        x += 1
        return super().forward(x)


def test_equal_blocks_share_their_loops_and_keep_their_own_weights(x):
    require_equal(around(Block(), Block(), function=each), x)


@pytest.mark.parametrize(
    "kind",
    [
        Numbered,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (WithTensor, WithFunction)),
    ],
)
def test_blocks_that_differ_in_a_value_are_told_apart(x, kind):
    require_equal(around(kind(0), kind(1), kind(2), function=each), x)


def test_a_value_is_not_taken_for_a_tensor_that_lay_where_it_lies(x):
    model = around(Numbered(0), Numbered(1), Numbered(2), function=each)
    assert [len(overview(model, ((x,), {})).groups) for _ in range(30)] == [3] * 30


def test_a_block_may_return_its_argument(x):
    def function(self, x):
        x = x.exp()
        for block in self.blocks:
            y, same = block(x)
            x = pairs(y).tanh() + same.mul(2.0) + same.sub(x * 0.5).mul(3.0)
        return x

    require_equal(around(ReturnsInput(), ReturnsInput(), function=function), x)


def test_a_block_may_change_its_argument(x):
    def function(self, x):
        x = x.exp()
        for block in self.blocks:
            before = x.exp()
            x = pairs(block(x)).tanh() + x * 2 + before
        return x

    require_equal(around(ChangesInput(), ChangesInput(), function=function), x)


def test_a_block_that_is_called_for_its_buffers_alone_still_runs(x):
    class Counts(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    def function(self, x):
        for block in self.blocks:
            block(x)
            x = pairs(x).tanh()
        return x

    model = around(Counts(), Counts(), function=function)
    looped(model, planned(model, (x,), 0.3), x)
    assert [block.calls.item() for block in model.blocks] == [1.0, 1.0]


@pytest.mark.slow
def test_a_flag_may_differ_from_call_to_call(x):
    class Flagged(Block):
        def forward(self, x, flag=True):
            y = super().forward(x)
            return y if flag else -2 * y

    def function(self, x):
        for number, block in enumerate(self.blocks):
            x = pairs(block(x, number != 1)).tanh()
        return x

    require_equal(around(Flagged(), Flagged(), Flagged(), function=function), x)


def test_the_model_is_as_it_was_after_planning(x):
    model = around(Block(), Block(), function=each)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(hp.MemoryBudgetError):
        hp.plan(model, (x,), memory=1)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
