"""Plans as data: TOML and back, what explain shows, what stays the same."""

import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.layout import Layout
from hairpin.models import axial3d, video_dit
from hairpin.models.video_dit.model import VideoDiT, tiny
from hairpin.planning.split.cost import Costs, sent_bytes_by_rank
from planning.toys import ATTENDS, Axial, Video, axial_attends
from planning.truth import seeded

X = torch.zeros(2, 6, 5, 2)


@pytest.fixture(scope="module")
def plan():
    return hp.plan(Video(), X, hp.Mesh(sp=4), attends=ATTENDS)


def test_a_plan_is_frozen(plan):
    with pytest.raises(FrozenInstanceError):
        plan.degree = 2


def test_files_keep_all_of_it(plan, tmp_path):
    path = tmp_path / "plan.toml"
    plan.save(path)
    loaded = hp.Plan.load(str(path))
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert loaded.explain() == plan.explain()
    assert loaded.to_toml() == path.read_text() == plan.to_toml()


def test_every_kind_of_seam_survives(tmp_path):
    class Stage(nn.Module):
        def forward(self, x, mask=None, *, scale=None):
            return x * mask * scale, x.sum(2), x * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = Stage()
            self.drop = nn.Dropout(0.1)
            self.positions = nn.Parameter(torch.zeros(1, 6, 1, 4))

        def forward(self, x, mask, scale):
            return self.stage(self.drop(x + self.positions), mask, scale=scale)[0]

    table = {
        "": {"x": "b t s c"},
        "stage": {
            "stream": "b t [s] c",
            "args": {"mask": "b t 1 1", "scale": "t 1 1"},
            "out": ["b t s c", "", "b t s c"],
            "stream_arg": "x",
        },
        "positions": "1 t 1 c",
    }
    as_seam = {
        **table,
        "stage": hp.Seam(
            "b t [s] c",
            args={"mask": "b t 1 1", "scale": "t 1 1"},
            out=("b t s c", None, "b t s c"),
            stream_arg="x",
        ),
    }
    example = (torch.zeros(2, 6, 5, 4), torch.zeros(2, 6, 1, 1), torch.zeros(6, 1, 1))
    made = hp.plan(
        Model(), example, hp.Mesh(sp=2), attends=as_seam, free_dims=("t",), output_grad="partial"
    )
    assert hp.Plan.from_toml(made.to_toml()) == made
    assert made.stages[0].held == "t"
    assert made.output_grad == "partial"
    made.save(tmp_path / "plan.toml")
    assert hp.Plan.load(tmp_path / "plan.toml") == made


def test_explain_shows_every_move(plan):
    text = plan.explain()
    assert text.splitlines()[0] == (
        "Video over 4 ranks of mesh axis 'sp' (b=2, t=6, s=5, c=4, v=2)"
    )
    assert re.search(
        r"blocks\.\*\.spatial +1 +t +before +b t \[s\] c +b t/sp \[s\] c +0 B +-", text
    )
    assert re.search(r"after +b t/sp s c +b t s/sp c +256 B +20\.0 us", text)
    assert re.search(r"head +1 +s +after +b t s/sp v +b t s v +576 B", text)
    assert f"{plan.switches} transfers" in text
    assert re.search(r"sent per rank, .* predicted", text)
    assert re.search(r"peak activations: .* per rank, .* on one process", text)


def test_explain_of_one_rank_says_that_nothing_moves():
    one = hp.plan(Video(), X, hp.Mesh(sp=1), attends=ATTENDS)
    assert one.moves == ()
    assert one.sent_bytes == one.switches == 0
    assert "0 transfers, 0 B sent per rank" in one.explain()


def test_moves_add_up(plan):
    for rank in range(4):
        sent = sum(move.bytes_by_rank[rank] for move in plan.moves)
        assert sent == plan.sent_bytes_by_rank[rank]
    for move in plan.moves:
        src, dst = (Layout.of(pattern, plan.sizes) for pattern in (move.src, move.dst))
        assert src.global_shape == dst.global_shape
        from_to = src.split_dim("sp"), dst.split_dim("sp")
        assert move.bytes_by_rank == sent_bytes_by_rank(src.split(None, "sp"), 4, *from_to, 4)
        expected = Costs().transfer_s(move.bytes)
        assert move.time_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ranks", "t", "s", "c"),
    [(4, 17, 65, 3), (4, 1, 64, 2), (4, 5, 1, 8), (3, 2, 7, 1), (8, 3, 5, 2)],
)
def test_bytes_of_a_switch(ranks, t, s, c):
    """Sum over j != i of len_src(i) * len_dst(j) * rest, for every rank i."""
    layout = Layout("t s c", t=t, s=s, c=c)

    def length(n, rank):
        return len(torch.arange(n).tensor_split(ranks)[rank])

    expected = tuple(
        sum(length(t, i) * length(s, j) * c * 8 for j in range(ranks) if j != i)
        for i in range(ranks)
    )
    assert sent_bytes_by_rank(layout, 8, "t", "s", ranks) == expected
    gathered = tuple(length(t, i) * s * c * 8 * (ranks - 1) for i in range(ranks))
    assert sent_bytes_by_rank(layout, 8, "t", None, ranks) == gathered
    assert sent_bytes_by_rank(layout, 8, None, "t", ranks) == (0,) * ranks
    assert sent_bytes_by_rank(layout, 8, "t", "t", ranks) == (0,) * ranks


def test_a_plan_splits_memory():
    """Peak bytes per rank fall as ranks are added, and are those of the widest live set."""
    x = torch.zeros(1, 16, 16, 2)
    peaks = [
        hp.plan(Video(), x, hp.Mesh(sp=ranks), attends=ATTENDS).peak_bytes for ranks in (1, 2, 4, 8)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]


def test_equal_models_have_equal_plans_and_others_do_not(plan):
    again = hp.plan(Video(), X, hp.Mesh(sp=4), attends=ATTENDS)
    assert again == plan
    assert again.digest == plan.digest
    assert replace(plan, output_grad="partial").digest != plan.digest
    assert hp.plan(Video(3), X, hp.Mesh(sp=4), attends=ATTENDS).fingerprint != plan.fingerprint


def test_the_scatter_is_free_and_the_gather_comes_after_the_thin_projection(plan):
    first, last = plan.moves[0], plan.moves[-1]
    assert first.bytes == 0
    assert last.dst == "b t s v"
    assert not last.before
    assert plan.stages[-1].held == plan.stages[-2].held


@pytest.mark.parametrize("name", ["video_dit", "axial3d", "axial"])
def test_bigger_plans_survive_toml(name):
    b, t = 2, 5
    builders = {
        "video_dit": lambda: (
            VideoDiT(tiny()),
            (
                seeded((b, t, 8, 8)).float(),
                torch.rand(b),
                torch.zeros(b, 1, dtype=torch.long),
                torch.ones(b, t, dtype=torch.bool),
            ),
            video_dit.ATTENDS,
        ),
        "axial3d": lambda: (
            axial3d.Axial3D(axial3d.tiny()),
            torch.zeros(1, 3, 4, 5, 2),
            axial3d.ATTENDS,
        ),
        "axial": lambda: (Axial(4, 3), torch.zeros(1, 3, 4, 5, 2, 4), axial_attends(4)),
    }
    model, example, attends = builders[name]()
    for ranks in (1, 3):
        made = hp.plan(model, example, hp.Mesh(dp=2, sp=ranks), attends=attends)
        assert hp.Plan.from_toml(made.to_toml()) == made
        assert made.explain()
