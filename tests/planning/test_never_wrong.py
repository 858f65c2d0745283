"""Whatever a model's own code does between its stages, a plan is right or refused, never wrong."""

import copy

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.errors import HairpinError
from hairpin.run.launch import launch
from planning.mistaken import ALONG_T
from planning.toys import Along, fixed
from planning.truth import Case, check, randomised, seeded

STAGES = {"first": "b t [s] c", "second": "b t [s] c", "third": "b [t] s c"}


class Between(nn.Module):
    """Two stages that could hold t split, with code between them that may need t whole."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = Along(2)
        self.between = between
        self.second = Along(2)
        self.third = Along(1)

    def forward(self, x):
        return self.third(self.second(self.between(self.first(x))))


def between(name: str, b: int = 2, s: int = 4) -> Case:
    return Case(
        f"{name} between stages",
        lambda: randomised(Between(fixed(ALONG_T[name])()), 0.3),
        lambda: ((seeded((b, 8, s, 4)),), {}),
        STAGES,
    )


BETWEEN = tuple(between(name) for name in ALONG_T)


@pytest.mark.parametrize(
    "ranks", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_code_between_stages(ranks):
    plans = check(BETWEEN, ranks)
    for case, plan in zip(BETWEEN, plans, strict=True):
        assert plan.stages[0].leave != "t", f"{case.name}: t is split there"


class FewFrames(nn.Module):
    """The trap of Latte's forward: a rank with one frame leaves out the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Along(2)
        self.positions = nn.Parameter(torch.zeros(7, 1, 4))
        self.second = Along(2)
        self.third = Along(1)

    def forward(self, x):
        x = self.first(x)
        if x.shape[1] > 1:
            x = x + self.positions
        return self.third(self.second(x))


TRAP = Case(
    "a branch on one frame",
    lambda: randomised(FewFrames(), 0.3),
    lambda: ((seeded((2, 7, 5, 4)),), {}),
    {**STAGES, "positions": "t 1 c"},
)
TRAPS = (TRAP, TRAP.but("not listed", attends=STAGES))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_trap_of_one_frame(ranks):
    plans = check(TRAPS, ranks)
    split = {2: "t", 3: "t", 4: None}[ranks]  # with 4 ranks the last would be left with one frame
    assert plans[0].stages[0].leave == split
    assert plans[1].stages[0].leave is None


LENGTHS = {
    "a branch on one frame": lambda self, x: x + self.table[0] if x.shape[1] > 1 else x * 1,
    "a branch on many frames": lambda self, x: x + self.table[0] if x.shape[1] > 9 else x * 1,
    "the first eight frames": lambda self, x: x[:, :8] * 2,
}


def _run_lengths(more: tuple[int, ...]) -> dict[tuple[str, int], str]:
    mesh = hp.init_mesh(sp=4, timeout_s=20)
    outcomes = {}
    for name, function in LENGTHS.items():
        model = randomised(Between(fixed(function)()), 0.3)
        truth = copy.deepcopy(model)
        examples = [seeded((2, frames, 5, 4)) for frames in (8, *more)]
        plan = hp.plan(model, examples[0], mesh, attends=STAGES, more_examples=examples[1:])
        hp.parallelize(model, plan, mesh)
        for frames in (8, 5, 7, 4, 16, 41):
            outcomes[name, frames] = _outcome(model, truth, seeded((1, frames, 5, 4)))
    return outcomes


def _outcome(model, truth, *arguments) -> str:
    try:
        got = model(*arguments)
    except HairpinError as error:
        return str(error)
    wanted = truth(*arguments)
    same = got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-12)
    return "right" if same else f"wrong, of shape {tuple(got.shape)}"


@pytest.mark.parametrize("more", [(), pytest.param((5, 7), marks=pytest.mark.slow)])
def test_other_lengths_than_planned_are_right_or_refused(more):
    for outcomes in launch(_run_lengths, 4, more, timeout_s=60):
        assert not [o for o in outcomes.values() if o.startswith("wrong")], outcomes
        for (name, frames), outcome in outcomes.items():
            if frames in {8, *more}:
                assert outcome == "right", f"{name}, {frames} frames"
            else:
                assert "this plan was rehearsed at lengths" in outcome


def _unchecked() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=20)
    model = randomised(Between(nn.Linear(4, 4)), 0.3)
    truth = copy.deepcopy(model)
    plan = hp.plan(model, seeded((2, 8, 5, 4)), mesh, attends=STAGES)
    hp.parallelize(model, plan, mesh, other_lengths=True)
    for shape in [(2, 8, 5, 4), (1, 3, 9, 4), (5, 17, 2, 4)]:
        assert _outcome(model, truth, seeded(shape)) == "right"
    assert _outcome(copy.deepcopy(model), truth, seeded((1, 7, 7, 4))) == "right"


def test_other_lengths_unchecked_when_asked_for():
    launch(_unchecked, 2, timeout_s=60)


class Flagged(nn.Module):
    """Code between stages that a plain argument, the mode, or an attribute switches on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Along(2)
        self.second = Along(2)
        self.third = Along(1)
        self.centred = False

    def forward(self, x, centred=False):
        x = self.first(x)
        if centred or self.centred or not self.training:
            x = x - x.mean(1, keepdim=True)
        return self.third(self.second(x))


def _run_flags() -> dict[str, str]:
    mesh = hp.init_mesh(sp=2, timeout_s=20)
    x = seeded((2, 8, 5, 4))
    model = randomised(Flagged(), 0.3)
    truth = copy.deepcopy(model)
    plan = hp.plan(model, (x, False), mesh, attends=STAGES)
    hp.parallelize(model, plan, mesh)
    outcomes = {"as planned": _outcome(model, truth, x, False)}
    outcomes["another argument"] = _outcome(model, truth, x, True)
    outcomes["eval"] = _outcome(model.eval(), truth.eval(), x, False)
    return outcomes


def test_plain_arguments_and_modes_other_than_planned_are_right_or_refused():
    for outcomes in launch(_run_flags, 2, timeout_s=60):
        assert outcomes["as planned"] == "right"
        assert not [o for o in outcomes.values() if o.startswith("wrong")], outcomes


class Varying(nn.Module):
    """A forward that may leave out stages, or run them more often, than when it was planned."""

    def __init__(self) -> None:
        super().__init__()
        self.along_s = Along(2)
        self.along_t = Along(1)

    def forward(self, x, order: str = "st"):
        for letter in order:
            x = self.along_s(x) if letter == "s" else self.along_t(x)
        return x


def _run_orders() -> dict[str, str]:
    mesh = hp.init_mesh(sp=2, timeout_s=20)
    x = seeded((2, 6, 4, 4))
    outcomes = {}
    for order in ["s", "t", "ts", "stst", "ss", "", "stt"]:
        model = randomised(Varying(), 0.3)
        truth = copy.deepcopy(model)
        plan = hp.plan(model, x, mesh, attends={"along_s": "b t [s] c", "along_t": "b [t] s c"})
        hp.parallelize(model, plan, mesh)
        outcomes[order] = _outcome(model, truth, x, order)
    return outcomes


def test_another_way_through_the_model_than_planned():
    for outcomes in launch(_run_orders, 2, timeout_s=60):
        assert not [order for order, outcome in outcomes.items() if outcome.startswith("wrong")], (
            outcomes
        )


class Drops(nn.Module):
    """Draws one number for the whole batch outside any nn.Dropout, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Along(2)
        self.last = Along(1)

    def forward(self, x):
        return self.last(x + self.stage(x) * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype))


def _draw_differently() -> str:
    mesh = hp.init_mesh(sp=2, timeout_s=20)
    x = seeded((2, 6, 4, 4))
    model = randomised(Drops(), 0.3)
    table = {"stage": "b t [s] c", "last": "b [t] s c"}
    plan = hp.plan(model, x, mesh, attends=table)
    hp.parallelize(model, plan, mesh)
    torch.manual_seed(mesh.rank("sp"))
    try:
        model(x)
    except hp.HairpinError as error:
        return str(error)
    return "ran"


def test_random_numbers_outside_dropouts_need_ranks_seeded_alike():
    for outcome in launch(_draw_differently, 2, timeout_s=60):
        assert "random" in outcome
