"""One rank given something else: every rank says so, within seconds."""

import time
from dataclasses import replace

import pytest
import torch

import hairpin as hp
from hairpin.errors import DisagreementError
from hairpin.run.launch import launch
from planning.toys import ATTENDS, Video
from planning.truth import randomised, seeded

RANKS = 4
ODD = 2


def longer(model, x):
    model(seeded((2, 9, 5, 2)))


def another_type(model, x):
    model.float()(x.float())


def without_grad(model, x):
    with torch.no_grad():
        model(x)


def in_eval(model, x):
    model.eval()(x)


def another_plan(model, x):
    plan = hp.detach(model)
    other = replace(plan, output_grad="partial")
    hp.parallelize(model, other, another_plan.mesh)
    model(x)


def odd_one_out(mistake) -> tuple[str, float]:
    mesh = hp.init_mesh(sp=RANKS, timeout_s=20)
    x = seeded((2, 6, 5, 2))
    model = randomised(Video())
    hp.parallelize(model, hp.plan(model, x, mesh, attends=ATTENDS), mesh)
    model(x)
    another_plan.mesh = mesh
    begun = time.monotonic()
    call = mistake if mesh.global_rank == ODD else torch.nn.Module.__call__
    with pytest.raises(DisagreementError) as caught:
        call(model, x)
    return str(caught.value), time.monotonic() - begun


@pytest.mark.parametrize(
    ("mistake", "lines"),
    [
        (longer, ("(2, 6, 5, 2) float64", "(2, 9, 5, 2) float64")),
        (another_type, ("(2, 6, 5, 2) float64", "(2, 6, 5, 2) float32")),
        (without_grad, ("; training, grad;", "; training, no grad;")),
        (in_eval, ("; training, grad;", "; eval, grad;")),
        (another_plan, ("plan ", "plan ")),
    ],
)
def test_every_rank_says_what_every_rank_was_given(mistake, lines):
    answers = launch(odd_one_out, RANKS, mistake, timeout_s=60)
    assert len({message for message, _ in answers}) == 1
    message = answers[0][0]
    assert "the ranks of mesh axis 'sp' were given different work" in message
    assert "Give every rank of this axis the same inputs, plan and mode" in message
    statements = [line.strip() for line in message.splitlines() if line.startswith("  rank ")]
    for rank, statement in enumerate(statements):
        assert statement.startswith(f"rank {rank}: ")
        assert lines[rank == ODD] in statement
    assert len({s.partition(": ")[2] for s in statements}) == 2
    assert max(seconds for _, seconds in answers) < 10


def _number(count) -> str:
    """A model whose work depends on a plain number, not on a tensor."""

    class Repeats(Video):
        def forward(self, x, repeats=1):
            self.repeats = repeats
            return super().forward(x)

    mesh = hp.init_mesh(sp=2, timeout_s=8)
    x = seeded((2, 6, 5, 2))
    model = randomised(Repeats())
    hp.parallelize(model, hp.plan(model, (x, 2), mesh, attends=ATTENDS), mesh)
    try:
        model(x, count[mesh.rank("sp")])
    except hp.HairpinError as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def test_plain_numbers_count_too():
    assert launch(_number, 2, (2, 2), timeout_s=60) == ["ran", "ran"]
    begun = time.monotonic()
    for answer in launch(_number, 2, (2, 3), timeout_s=60):
        assert answer.startswith("DisagreementError")
    assert time.monotonic() - begun < 10


def _different_work() -> None:
    """Ranks of different dp places may be given different shapes."""
    mesh = hp.init_mesh(dp=2, sp=2, timeout_s=20)
    x = seeded((2, 6, 5, 2))
    model = randomised(Video())
    frames = 7 + mesh.rank("dp")
    others = [seeded((1, 7, 3, 2)), seeded((1, 8, 3, 2))]
    plan = hp.plan(model, x, mesh, attends=ATTENDS, more_examples=others)
    hp.parallelize(model, plan, mesh)
    assert model(seeded((1, frames, 3, 2))).shape == (1, frames, 3, 2)


def test_data_parallel_places_may_differ():
    launch(_different_work, 4, timeout_s=60)
