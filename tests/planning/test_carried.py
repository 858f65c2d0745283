"""Parameters and buffers that carry a split dim; parameters used inside and outside the split."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.errors import PlanError
from hairpin.run.launch import launch
from marks import slow
from planning.toys import Along
from planning.truth import Case, check, randomised, run, seeded, truths

T, S = 7, 5


class Positions(nn.Module):
    """Adds learned positions between stages, at a border where t stays split."""

    def __init__(self, *, buffer: bool = False) -> None:
        super().__init__()
        self.first = Along(2)
        self.second = Along(2)
        self.last = Along(1)
        positions = torch.linspace(0, 1, T * 4, dtype=torch.float64).view(1, T, 1, 4)
        if buffer:
            self.register_buffer("positions", positions)
        else:
            self.positions = nn.Parameter(positions)

    def forward(self, x):
        x = self.first(x) + self.positions
        return self.last(self.second(x))


class Scaled(nn.Module):
    """A stage with a parameter along the frames, one along the patches, and one along neither."""

    def __init__(self) -> None:
        super().__init__()
        self.along = Along(2)
        self.by_frame = nn.Parameter(torch.ones(T, 1, 4))
        self.by_patch = nn.Parameter(torch.ones(S, 4))
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.along(x * self.by_frame) * self.by_patch + self.weight


class Stages(nn.Module):
    """`Scaled`, checkpointed or not, between the other dim's stages."""

    def __init__(self, mode: bool | None = None) -> None:
        super().__init__()
        self.first = Along(1)
        self.scaled = Scaled()
        self.second = Along(1)
        self.mode = mode

    def forward(self, x):
        x = self.first(x)
        if self.mode is None:
            x = self.scaled(x)
        else:
            x = checkpoint(self.scaled, x, use_reentrant=self.mode)
        return self.second(x)


class Shared(nn.Module):
    """One linear map before all stages, between them, inside one, and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.first = nn.Sequential(Along(2), self.linear)
        self.second = nn.Sequential(self.linear, Along(1))

    def forward(self, x):
        x = self.first(self.linear(x))
        x = x + self.linear(x)
        return self.linear(self.second(x))


def x():
    return (seeded((2, T, S, 4)),), {}


BETWEEN = {"first": "b t [s] c", "second": "b t [s] c", "last": "b [t] s c"}
STAGES = {"first": "b [t] s c", "scaled": "b t [s] c", "second": "b [t] s c"}
CARRIED = (
    Case("positions", lambda: randomised(Positions(), 0.3), x, {**BETWEEN, "positions": "1 t 1 c"}),
    Case(
        "positions in a buffer",
        lambda: randomised(Positions(buffer=True), 0.3),
        x,
        {**BETWEEN, "positions": "1 t 1 c"},
    ),
    *(
        Case(
            f"parameters of a stage, checkpointed: {mode}",
            lambda mode=mode: randomised(Stages(mode), 0.3),
            x,
            {**STAGES, "scaled.by_frame": "t 1 c", "scaled.by_patch": "s c"},
        )
        for mode in (None, True, False)
    ),
)
UNLISTED = (Case("positions, not listed", lambda: randomised(Positions(), 0.3), x, BETWEEN),)
SHARED = (
    Case(
        "a shared map",
        lambda: randomised(Shared(), 0.3),
        x,
        {"first": "b t [s] c", "second": "b [t] s c"},
    ),
)
WORLDS = pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4)])


@WORLDS
def test_each_rank_uses_its_part(ranks):
    plans = check(CARRIED, ranks)
    if ranks > 1:
        held = [{tensor.name: tensor.held for tensor in plan.tensors} for plan in plans]
        assert held[0] == held[1] == {"positions": "t"}
        assert held[2] == {"scaled.by_frame": "t", "scaled.by_patch": None}
        assert all("uses its part of t" in plan.explain() for plan in plans)


@WORLDS
def test_unlisted_positions_make_the_plan_gather(ranks):
    (plan,) = check(UNLISTED, ranks)
    assert plan.stages[0].leave is None


@WORLDS
def test_parameters_used_inside_and_outside_the_split_region(ranks):
    (plan,) = check(SHARED, ranks)
    assert ranks == 1 or [stage.held for stage in plan.stages] == ["t", "s"]


def _state_dicts() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    for case in CARRIED:
        model = case.build()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        args, _ = case.arguments()
        plan = hp.plan(model, args, mesh, attends=case.attends)
        hp.parallelize(model, plan, mesh)
        for _ in range(2):
            model(*args)
            after = model.state_dict()
            assert list(after) == list(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert {name for name, _ in model.named_parameters()} == {
                name for name in before if name != "positions" or "buffer" not in case.name
            }
        model.load_state_dict(before)
        for module in model.modules():
            assert not set(module.__dict__) & {"positions", "by_frame", "by_patch"}


def test_the_state_dict_is_unchanged():
    launch(_state_dicts, 2, timeout_s=60)


def test_a_tensor_used_at_two_splits():
    class Twice(Positions):
        def forward(self, x):
            x = self.first(x) + self.positions
            return self.last(self.second(x)) + self.positions

    table = {**BETWEEN, "positions": "1 t 1 c"}
    args, _ = x()
    with pytest.raises(PlanError, match=r"'positions' is used where .* split"):
        hp.plan(Twice(), args, hp.Mesh(sp=2), attends=table)


def _after_a_step(wanted) -> None:
    """SGD on the split model keeps every rank's parameters equal to one process's."""
    mesh = hp.init_mesh(sp=3, timeout_s=30)
    for case, truth in zip(CARRIED, wanted, strict=True):
        model = case.build()
        args, _ = case.arguments()
        hp.parallelize(model, hp.plan(model, args, mesh, attends=case.attends), mesh)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run(model, case)
        hp.sync_grads(model, mesh)
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected = start[name] - 0.1 * truth.parameters[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-13)


def test_a_step_of_sgd():
    launch(_after_a_step, 3, truths(CARRIED), timeout_s=60)
