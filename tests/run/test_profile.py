"""``profile``: exact peaks, and a model left as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hairpin.comm.mesh import init_mesh
from hairpin.comm.verbs import switch
from hairpin.errors import PlanError
from hairpin.layout import Layout
from hairpin.run.launch import launch
from hairpin.run.profile import ProfileError, profile

ROWS, COLUMNS = 1000, 100
PIECE_BYTES = ROWS * COLUMNS * 4
SLACK_BYTES = 4096  # scalars that torch allocates on the way


class Chain(nn.Module):
    """Holds one, then two, then one piece, then two with the product: the peak is two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(COLUMNS, COLUMNS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        del a
        return self.linear(b)


class Wide(Chain):
    """Two pieces more than :class:`Chain` at its widest, gone before it returns."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [x + i for i in range(4)]
        total = sum(part.sum() for part in parts)
        del parts
        return self.linear(x) + total


class Boxed(nn.Module):
    """Takes keywords, returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *, x: Tensor, times: int) -> dict[str, Any]:
        return {"first": x * self.scale * times, "rest": [None, (x.detach(),)]}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, COLUMNS)


@pytest.mark.parametrize(("model", "pieces"), [(Chain(), 2), (Wide(), 4)])
def test_peak_of_a_forward_is_exact(model, pieces, x):
    report = profile(model, x)
    assert 0 <= report.peak_bytes - pieces * PIECE_BYTES < SLACK_BYTES
    assert report.parameter_bytes == COLUMNS * COLUMNS * 4
    assert report.time_s > 0
    assert not report.backward


def test_a_backward_counts_its_gradients_too(x):
    """When the weight's gradient is made, its factor and the output are still there."""
    report = profile(Chain(), x, backward=True)
    assert report.backward
    assert report.peak_bytes >= 2 * PIECE_BYTES + COLUMNS * COLUMNS * 4


def test_the_model_is_left_as_it_was(x):
    model = nn.Sequential(nn.Linear(COLUMNS, 8), nn.Dropout(0.5))
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    profile(model, x, backward=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7))
    assert model[0].bias.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_arguments_and_outputs_of_all_kinds(x):
    for inputs in ({"x": x, "times": 3}, ((), {"x": x, "times": 3})):
        report = profile(Boxed(), inputs, backward=True, repeats=1)
        assert report.peak_bytes >= PIECE_BYTES
    with pytest.raises(PlanError, match="give a tensor"):
        profile(Boxed(), "x")


def test_a_loss_of_ones_own(x):
    seen: list[int] = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output.numel())
        return output.square().mean()

    profile(Chain(), x, backward=True, loss=loss, repeats=2)
    assert seen == [ROWS * COLUMNS] * 4  # to warm up, twice timed, once for memory


def test_nothing_to_go_back_from(x):
    with pytest.raises(ProfileError, match="carries a gradient"):
        profile(nn.Identity(), x, backward=True)


def test_bytes_sent_are_those_of_one_step():
    before = Layout("t/sp s c", t=6, s=4, c=5)

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return switch(x, before, before.split("s", "sp"), mesh_of_rank[0])

    mesh_of_rank: list[Any] = []

    def rank() -> tuple[int, int]:
        mesh_of_rank.append(init_mesh(sp=2))
        x = torch.randn(before.local_shape(mesh_of_rank[0]), requires_grad=True)
        reports = [profile(Turn(), x, mesh=mesh_of_rank[0], backward=b) for b in (False, True)]
        return tuple(report.bytes_sent for report in reports)

    one_way = 3 * 2 * 5 * 4
    assert launch(rank, 2, timeout_s=60) == [(one_way, 2 * one_way)] * 2


def test_as_text(x):
    text = str(profile(Chain(), x))
    assert "781.26 KiB beyond parameters and inputs" in text
    assert "0 B in 0 messages" in text


@pytest.mark.gpu
def test_peak_on_cuda(x):
    report = profile(Chain().cuda(), x.cuda())
    assert report.device == "cuda"
    assert 2 * PIECE_BYTES <= report.peak_bytes < 3 * PIECE_BYTES
