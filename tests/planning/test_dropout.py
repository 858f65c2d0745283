"""Dropout by global position: the same mask on any number of ranks, whatever is split where."""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.errors import DisagreementError, HairpinError
from hairpin.layout import Layout
from hairpin.planning.split.dropout import drop
from hairpin.run.launch import launch
from marks import slow
from planning.toys import ATTENDS, Along, Video, video_arguments
from planning.truth import (
    Case,
    Result,
    plan_for,
    randomised,
    require_close,
    require_equal,
    seeded,
    split,
)


class Gated(nn.Module):
    """Dropouts of tensors of other shapes than the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.weights_drop = nn.Dropout(0.4)
        self.channel_drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.norm(x)
        weights = (y @ y.mT).softmax(-1)  # [b, t, s, s]
        y = self.weights_drop(weights) @ y
        return x + y * self.channel_drop(self.scale)


class Checkpoints(nn.Module):
    """A stage that checkpoints its own inside, where the dropout sits."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.along = Along(2)
        self.drop = nn.Dropout(0.4)
        self.mode = mode

    def forward(self, x):
        return checkpoint(lambda y: self.drop(self.along(y)) * y, x, use_reentrant=self.mode)


class Pair(nn.Module):
    """A stage along s, then one along t."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = nn.Sequential(Along(1), nn.Dropout(0.2))

    def forward(self, x):
        return self.second(self.first(x))


PAIR = {"first": "b t [s] c", "second": "b [t] s c"}


def pair(name, build):
    return Case(
        name,
        lambda: randomised(Pair(build()), 0.3),
        lambda: ((seeded((2, 16, 6, 4)),), {}),
        PAIR,
        others=lambda: [((seeded((2, 15, 6, 4), 4),), {}), ((seeded((3, 5, 6, 4), 5),), {})],
        interleaved=True,
    )


def video(name, **words):
    return Case(
        name,
        lambda: randomised(Video(drop=0.3, **words), 0.3),
        video_arguments(2, 7, 5),
        ATTENDS,
        others=lambda: [video_arguments(2, 6, 5)()],
        interleaved=True,
    )


CASES = (
    video("a video model"),
    video("blocks run twice", repeats=2),
    video("checkpointed, reentrant", mode=True),
    video("checkpointed, not reentrant", mode=False),
    pair("tensors of other shapes", Gated),
    pair("checkpointed inside, reentrant", lambda: Checkpoints(mode=True)),
    pair("checkpointed inside, not reentrant", lambda: Checkpoints(mode=False)),
)


def _run(cases, plans) -> list[Result]:
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=30)
    return [split(case, plan, mesh) for case, plan in zip(cases, plans, strict=True)]


def results_on(ranks: int) -> list[list[Result]]:
    plans = [plan_for(case, hp.Mesh(sp=ranks)) for case in CASES]
    return launch(_run, ranks, CASES, plans, timeout_s=90)


@pytest.fixture(scope="module")
def one_rank():
    return results_on(1)[0]


@pytest.mark.parametrize("ranks", [slow(2), 3, slow(4)])
def test_the_same_masks_on_any_number_of_ranks(one_rank, ranks):
    for rank, results in enumerate(results_on(ranks)):
        for case, got, wanted in zip(CASES, results, one_rank, strict=True):
            require_equal(got, wanted, f"{case.name}, rank {rank} of {ranks}")


def test_checkpointing_changes_nothing(one_rank):
    plain = one_rank[0]
    for result in (one_rank[2], one_rank[3]):
        require_equal(result, plain, "checkpointed")


def test_another_seed_is_another_mask():
    def outputs(seed):
        model = randomised(Video(drop=0.3), 0.3)
        x = seeded((2, 7, 5, 2))
        hp.parallelize(model, hp.plan(model, x, hp.Mesh(sp=1), attends=ATTENDS))
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(x), model(x)

    first, second = outputs(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, outputs(1)[0])
    assert torch.equal(first, outputs(0)[0])


def test_eval_drops_nothing():
    model = randomised(Video(drop=0.3), 0.3).eval()
    x = seeded((2, 7, 5, 2))
    wanted = model(x)
    hp.parallelize(model, hp.plan(model.train(), x, hp.Mesh(sp=1), attends=ATTENDS))
    require_close(model.eval()(x), wanted, "eval")


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_it_drops_about_p(probability):
    layout = Layout("b t s c", b=4, t=32, s=16, c=32)
    out = drop(torch.ones(4, 32, 16, 32, dtype=torch.float64), probability, 77, layout, {})
    n = out.numel()
    dropped = float((out == 0).sum()) / n
    five_sigma = 5 * (probability * (1 - probability) / n) ** 0.5
    assert abs(dropped - probability) < five_sigma
    assert set(out.unique().tolist()) == {0.0, 1 / (1 - probability)}
    for dim in range(4):  # no dim has a pattern: the share dropped is the same along each
        share = (out == 0).double().movedim(dim, 0).flatten(1).mean(1)
        sigma = (probability * (1 - probability) / (n / len(share))) ** 0.5
        assert (share - probability).abs().max() < 6 * sigma
    kept = (out != 0).double() - (1 - probability)
    for dim in range(4):  # nor do neighbours go together
        pairs = kept.narrow(dim, 0, kept.shape[dim] - 1) * kept.narrow(dim, 1, kept.shape[dim] - 1)
        bound = 6 * probability * (1 - probability) / pairs.numel() ** 0.5
        assert abs(float(pairs.mean())) < bound


def test_masks_of_two_seeds_are_independent():
    layout = Layout("n", n=100_000)
    ones = torch.ones(100_000)
    for other in (78, 77 + 2**40, 76):
        both = [drop(ones, 0.5, seed, layout, {}) != 0 for seed in (77, other)]
        assert abs(float((both[0] == both[1]).double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize(
    "pattern", ["b t/sp s", "b t s/sp", "(b t/sp) s", "(b s/sp) t", "b/sp t s"]
)
@pytest.mark.parametrize("degree", [2, 3, 5])
def test_parts_of_a_mask_are_a_mask_of_parts(pattern, degree):
    layout = Layout(pattern, b=2, t=7, s=4)
    whole_layout = layout.split(None, "sp")
    x = seeded(layout.global_shape)
    whole = drop(x, 0.5, 5, whole_layout, {})
    dims = [layout.sizes[dim] for dim in layout.dims]
    place = layout.position(layout.split_dim("sp"))
    parts = []
    for rank in range(degree):
        places = {"sp": (rank, degree)}
        part = x.view(dims).tensor_split(degree, place)[rank]
        part = part.reshape(layout.local_shape_at(places))
        dropped = drop(part, 0.5, 5, layout, places)
        parts.append(
            dropped.view([*dims[:place], -1, *dims[place + 1 :]]) if part.numel() else None
        )
    parts = [part for part in parts if part is not None]
    assert torch.equal(torch.cat(parts, place), whole.view(dims))


class Rows(nn.Module):
    """A dropout of rows that merge the batch and the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.along = Along(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.along(x).flatten(0, 1)).view(x.shape)


class Doubled(nn.Module):
    """One dropout, called on tensors of two shapes; the last of them is not split."""

    def __init__(self) -> None:
        super().__init__()
        self.along = Along(2)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 4))

    def forward(self, x):
        return self.drop(self.along(x)) * self.drop(self.scale)


def _one_output(stage):
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=30)
    model = randomised(Pair(stage()), 0.3)
    x = seeded((2, 6, 4, 4))
    try:
        hp.parallelize(model, hp.plan(model, x, mesh, attends=PAIR), mesh)
        torch.manual_seed(3)
        return model(x).detach()
    except HairpinError as error:
        return str(error)


@pytest.mark.parametrize("stage", [Doubled, Rows])
def test_two_shapes_and_merged_rows_are_right_or_refused_by_name(stage):
    one = launch(_one_output, 1, stage, timeout_s=30)[0]
    two = launch(_one_output, 2, stage, timeout_s=30)[0]
    if isinstance(two, str):
        assert "dropout 'first.drop'" in two
    else:
        require_close(two, one, stage.__name__)


def _seeded_by_rank() -> bool:
    mesh = hp.init_mesh(sp=2, timeout_s=20)
    model = randomised(Video(drop=0.3), 0.3)
    x = seeded((2, 7, 5, 2))
    hp.parallelize(model, hp.plan(model, x, mesh, attends=ATTENDS), mesh)
    torch.manual_seed(mesh.rank("sp"))
    with pytest.raises(DisagreementError, match="random state"):
        model(x)
    model.eval()(x)
    return True


def test_ranks_seeded_differently_are_told():
    assert all(launch(_seeded_by_rank, 2, timeout_s=30))
