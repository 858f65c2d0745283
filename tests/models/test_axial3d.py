"""The three-dim model: every stage attends along one dim and works on any slice of the others."""

import pytest
import torch
from torch import nn

from hairpin.errors import DataError, RecipeError
from hairpin.models.axial3d import ATTENDS, Axial3D, Axial3DConfig, tiny

DIMS = {"level": 1, "latitude": 2, "longitude": 3}


@pytest.fixture
def model() -> Axial3D:
    torch.manual_seed(0)
    return Axial3D(tiny()).double()


@pytest.mark.parametrize("part", DIMS)
@pytest.mark.parametrize("split", DIMS)
def test_a_stage_needs_only_its_own_dim_whole(model, part, split):
    stage = getattr(model.blocks[0], part)
    h = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    pieces = h.tensor_split([0, 1], dim=DIMS[split])
    joined = torch.cat(
        [stage(piece) for piece in pieces if split != part or len(piece)][1:], DIMS[split]
    )
    difference = (joined - stage(h)).abs().max()
    assert (difference > 1e-6) if split == part else (difference < 1e-12)


@pytest.mark.parametrize("part", DIMS)
def test_an_empty_shard_goes_through_and_back(model, part):
    shape = [2, 3, 4, 5, 8]
    shape[1 if part != "level" else 3] = 0
    h = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = getattr(model.blocks[0], part)(h)
    out.sum().backward()
    assert list(out.shape) == shape == list(h.grad.shape)


def test_every_parameter_is_trained(model):
    state = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    out = model(state)
    assert out.shape == state.shape
    out.square().sum().backward()
    key_bias = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert key_bias == set()


def test_meta_device():
    with torch.device("meta"):
        assert Axial3D(Axial3DConfig())(torch.empty(1, 13, 32, 64, 5)).shape == (1, 13, 32, 64, 5)


def test_another_grid_is_refused(model):
    with pytest.raises(DataError, match=r"grid \(3, 4, 6\) was given to a model of the grid"):
        model(torch.zeros(1, 3, 4, 6, 2, dtype=torch.float64))


def test_heads_must_divide_channels():
    with pytest.raises(RecipeError, match="channels=10"):
        Axial3DConfig(channels=10)


def test_seams_name_real_modules(model: nn.Module):
    names = {name for name, _ in model.named_modules()}
    assert all(pattern.replace("*", "0") in names for pattern in ATTENDS)
