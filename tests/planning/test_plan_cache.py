"""A plan from the cache folder is the plan that would be made, or it is not taken."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.errors import PlanError
from hairpin.planning import identity as identities
from hairpin.planning.cache import Cache, cache_folder, digest_of
from hairpin.planning.identity import identity


class Mlp(nn.Module):
    """``x[b, n, c] -> [b, n, c]``."""

    def __init__(self, width=32, scale=2.0):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.scale = scale
        self.register_buffer("order", torch.arange(4))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * factor(self))


def factor(model):
    return model.scale * CONSTANT


CONSTANT = 3.0
X = torch.linspace(0, 1, 2 * 64 * 8).reshape(2, 64, 8)
BUDGET = 20_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HAIRPIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plans_in(folder):
    return sorted(folder.glob("plan-*.toml"))


def planned(model=None, example=X, memory=BUDGET, **more):
    said = []
    plan = hp.plan(model or Mlp().eval(), example, memory=memory, progress=said.append, **more)
    return plan, said


def test_the_second_time_it_comes_from_the_cache(folder):
    model = Mlp().eval()
    first, said = planned(model)
    assert "from the cache" not in said
    assert len(plans_in(folder)) == 1
    second, said = planned(model)
    assert said == ["from the cache"]
    assert second == first
    assert second.loops
    with torch.no_grad():
        want = model(X)
        hp.parallelize(model, second)
        assert torch.equal(model(X), want)
        assert hp.estimate(model, X) == first.peak_bytes


def test_its_graphs_are_worked_out_for_who_looks_at_them(folder):
    model = Mlp().eval()
    first, _ = planned(model)
    second, _ = planned(model)
    assert not second.programs
    assert second.code() == first.code()


def another_constant(model, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CONSTANT", 4.0)


def another_helper(model, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "factor", lambda model: model.scale)


def another_forward(model, monkeypatch):
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.down(self.up(x)))


def another_forward_of_this_one(model, monkeypatch):
    model.up.forward = lambda x: nn.functional.linear(x, model.up.weight, model.up.bias) + 1


def another_setting(model, monkeypatch):
    model.scale = 2.5


def another_width(model, monkeypatch):
    model.up, model.down = nn.Linear(8, 48), nn.Linear(48, 8)


def another_class_inside(model, monkeypatch):
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model.up = Other(8, 32)


def another_mode(model, monkeypatch):
    model.train()


def another_buffer(model, monkeypatch):
    model.order[0] = 1


def another_dtype(model, monkeypatch):
    model.up.weight.data = model.up.weight.data.double()


def a_hook(model, monkeypatch):
    model.up.register_forward_hook(lambda module, args, out: out + 1)


def a_frozen_weight(model, monkeypatch):
    model.up.weight.requires_grad_(False)


def another_torch(model, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")


def another_function_of_torch(model, monkeypatch):
    monkeypatch.setattr(model.up, "extra", 1, raising=False)


CHANGES = [
    another_constant,
    another_helper,
    another_forward,
    another_forward_of_this_one,
    another_setting,
    another_width,
    another_class_inside,
    another_mode,
    another_buffer,
    another_dtype,
    a_hook,
    a_frozen_weight,
    another_torch,
    another_function_of_torch,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_has_another_name(change, monkeypatch):
    model = Mlp().eval()
    before = identity(model, X)
    assert before is not None
    assert identity(Mlp().eval(), X) == before  # weights' values count for nothing
    change(model, monkeypatch)
    assert identity(model, X) != before


@pytest.mark.parametrize(
    "other",
    [
        {"memory": BUDGET + 1},
        {"example": X[:, :32]},
        {"example": X + 1},
        {"example": X.transpose(0, 1).contiguous().transpose(0, 1)},
        {"example": {"x": X}},
        {"memory": 60_000, "backward": True},
    ],
    ids=str,
)
def test_another_question_is_not_answered_from_the_cache(folder, other):
    planned()
    _, said = planned(**other)
    assert "from the cache" not in said
    assert len(plans_in(folder)) == 2


def test_what_cannot_be_described_is_not_kept(folder):
    model = Mlp().eval()
    model.generator = torch.Generator()
    assert identity(model, X) is None
    planned(model)
    _, said = planned(model)
    assert "from the cache" not in said
    assert not plans_in(folder)


def test_the_name_depends_on_all_code_that_plans(monkeypatch):
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    identities._surroundings()
    assert {"emit.py", "seam.py", "axes.py", "make.py", "layout.py"} <= set(read)
    assert "fold_count.py" not in read


@pytest.mark.parametrize("damage", ["", "# 00\n", "cut", "changed", "binary"])
def test_a_damaged_file_is_replaced(folder, damage):
    first, _ = planned()
    (file,) = plans_in(folder)
    whole = file.read_text()
    texts = {"cut": whole[: len(whole) // 2], "changed": whole.replace("chunk = ", "chunk = 1")}
    file.write_bytes(b"\xff\xfe" if damage == "binary" else texts.get(damage, damage).encode())
    again, said = planned()
    assert "from the cache" not in said
    assert again == first
    assert file.read_text() == whole


@pytest.mark.parametrize("word", ["0", "off", "OFF"])
def test_switched_off(monkeypatch, tmp_path, word):
    monkeypatch.setenv("HAIRPIN_CACHE", word)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planned()
    _, said = planned()
    assert "from the cache" not in said
    assert not list(tmp_path.iterdir())


def test_not_asked_for(folder):
    planned(cache=False)
    assert not plans_in(folder)
    planned()
    _, said = planned(cache=False)
    assert "from the cache" not in said


def test_a_folder_that_cannot_be_written_to_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAIRPIN_CACHE", str(tmp_path / "file" / "cache"))
    plan, _ = planned()
    assert plan.loops


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("HAIRPIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == Cache(tmp_path / "hairpin")
    monkeypatch.setenv("HAIRPIN_CACHE", "~/here")
    assert cache_folder().folder.name == "here"
    assert "~" not in str(cache_folder().folder)


def test_a_stale_plan_is_refused_and_dropped(folder):
    model = Mlp().eval()
    planned(model)
    (file,) = plans_in(folder)
    text = file.read_text().partition("\n")[2]
    graph = text.partition('graph = "')[2].partition('"')[0]
    stale = text.replace(graph, "0" * len(graph))
    file.write_text(f"# {digest_of(stale)}\n{stale}")
    plan, said = planned(model)
    assert said == ["from the cache"]
    hp.parallelize(model, plan)
    with torch.no_grad(), pytest.raises(PlanError, match="plan again"):
        model(X)
    hp.detach(model)
    assert not plans_in(folder)
    plan, said = planned(model)
    assert "from the cache" not in said


PROGRAM = """
import torch
from torch import nn
from hairpin.planning.identity import identity
model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
print(identity(model, (torch.ones(1, 4, 8), {"a": {1, 2, 3}, "b": {"x", "y", "z"}})))
"""


def test_the_name_is_the_same_in_another_process():
    names = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(names) == 1
    assert "None" not in names.pop()


class Pairs(nn.Module):
    """Of pairs ``z[i, j, c]`` a result ``[c, j, i]``: may one be written where the other was?"""

    def __init__(self, channels=8):
        super().__init__()
        self.up, self.down = nn.Linear(channels, 32), nn.Linear(32, channels)

    def forward(self, z):
        z = torch.tanh(z) * 2.0
        return self.down(torch.relu(self.up(z))).permute(2, 1, 0).exp()


def test_a_length_that_equals_a_width_stays_open(folder):
    """Nothing in a search may take a length for the number that it is in the example."""
    z = torch.randn(8, 8, 8)
    model = Pairs().eval()
    plan, _ = planned(model, z, memory=14_000)
    assert plan.loops
    for program in plan.programs.values():
        given = [n.meta["val"] for n in program.traced.placeholders if n.meta["val"].dim() == 3]
        assert all(str(x.shape[0]) != "8" and str(x.shape[2]) == "8" for x in given)
    again, said = planned(model, z, memory=14_000)
    assert said == ["from the cache"]
    others = [torch.randn(n, n, 8) for n in (8, 13)]
    with torch.no_grad():
        want = [model(x) for x in others]
        hp.parallelize(model, again)
        for x, y in zip(others, want, strict=True):
            torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)
