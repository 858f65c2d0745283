"""The vision transformer: patches of any size, positions, the class token, its seams."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hairpin.errors import DataError, RecipeError
from hairpin.kernels.routed import SoftmaxAttention
from hairpin.models.vit import ATTENDS, BLOCKS, ROUTED, ViT, ViTConfig, digits, photos, tiny
from hairpin.models.vit.model import resize_positions, sincos_positions, to_patches
from hairpin.planning.split.seam import match_table

FILM = replace(tiny(), patch=(2, 3, 3), size=(4, 9, 9), channels=24)


def randomised(config: ViTConfig) -> ViT:
    torch.manual_seed(0)
    model = ViT(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (tiny(), (8, 8)),
        (tiny(), (7, 9)),
        (tiny(), (1, 1)),
        (tiny(), (13, 5)),
        (FILM, (4, 9, 9)),
        (FILM, (5, 7, 8)),
        (FILM, (1, 1, 10)),
    ],
)
def test_any_size_gives_logits_that_every_pixel_counts_in(config, size, positions):
    model = randomised(replace(config, positions=positions))
    images = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert (images.grad != 0).all()


def test_patches_are_cut_in_order_and_filled_up_with_zeros():
    image = torch.arange(1.0, 16).view(1, 1, 3, 5)
    patches = to_patches(image, (2, 2))
    assert patches.shape == (1, 2, 3, 4)
    assert patches[0, 0, 0].tolist() == [1, 2, 6, 7]
    assert patches[0, 0, 2].tolist() == [5, 0, 10, 0]
    assert patches[0, 1, 2].tolist() == [15, 0, 0, 0]


def test_a_patch_holds_its_colours_one_after_another():
    image = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None]
    assert to_patches(image, (2, 2)).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_film_is_cut_along_time_too():
    film = torch.arange(16.0).view(1, 1, 4, 2, 2)
    patches = to_patches(film, (2, 2, 1))
    assert patches.shape == (1, 2, 1, 2, 4)
    assert patches[0, 1, 0, 1].tolist() == [9, 11, 13, 15]


def test_zeros_at_the_far_end_change_nothing():
    """An image that is not whole patches is the one filled up by hand."""
    model = randomised(tiny())
    image = torch.randn(1, 1, 7, 5, dtype=torch.float64)
    filled = nn.functional.pad(image, (0, 1, 0, 1))
    assert torch.equal(model(image), model(filled))


def test_positions_of_the_same_grid_are_the_learned_ones():
    positions = torch.randn(3, 4, 6)
    assert resize_positions(positions, (3, 4)) is positions
    twice = resize_positions(positions, (6, 8))
    assert twice.shape == (6, 8, 6)
    torch.testing.assert_close(twice[1, 1], positions[:2, :2].mul(
        torch.tensor([[9.0, 3.0], [3.0, 1.0]])[..., None] / 16
    ).sum((0, 1)))  # fmt: skip


def test_a_finer_grid_has_its_middle_where_the_coarse_one_has():
    like = torch.zeros(1, dtype=torch.float64)
    coarse = sincos_positions((3, 5), (3, 5), 12, like=like)
    fine = sincos_positions((9, 15), (3, 5), 12, like=like)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)
    assert len(torch.unique(coarse.flatten(0, 1).round(decimals=6), dim=0)) == 15


def test_patches_know_their_place():
    model = randomised(tiny())
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert not torch.allclose(model(image), model(image.flip(-1)))
    with torch.no_grad():
        model.positions.zero_()
    swapped = image.unflatten(-1, (4, 2)).flip(3).flatten(-2)  # columns of patches
    torch.testing.assert_close(model(image), model(swapped))


def test_no_image_is_no_logits():
    assert ViT(tiny())(torch.zeros(0, 1, 8, 8)).shape == (0, 10)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 8, 8), (2, 1, 4, 8, 8), (2, 1, 0, 8)])
def test_other_images_are_refused(shape):
    with pytest.raises(DataError, match=r"this model takes \[batch, 1 colours, height, width\]"):
        ViT(tiny())(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": (2,)}, "must have two numbers each"),
        ({"size": (8, 8, 8)}, "must have two numbers each"),
        ({"patch": (0, 2)}, "must be 1 or more each"),
        ({"positions": "none"}, "give 'learned' or 'sincos'"),
        ({"heads": 5}, "cannot be shared by heads=5"),
        ({"channels": 30, "heads": 3, "positions": "sincos"}, "must be a multiple of 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        replace(tiny(), **change)


def test_the_blocks_take_the_stream_and_attend_along_it():
    model = ViT(tiny())
    assert list(match_table(model, ATTENDS).seams) == ["blocks.0.attention", "blocks.1.attention"]
    routed = {n: m for n, m in model.named_modules() if isinstance(m, SoftmaxAttention)}
    assert list(routed) == [ROUTED[0].replace("*", str(i)) for i in range(2)]
    assert not any(module.causal for module in routed.values())
    shapes = []
    for block in model.get_submodule(BLOCKS):
        block.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model(torch.zeros(2, 1, 7, 8))
    assert shapes == [(2, 1 + 4 * 4, 32)] * 2


def test_presets_fit_their_images():
    assert ViT(digits())(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert photos().grid == (10, 10)
    assert ViT(photos())(torch.zeros(1, 3, 75, 75)).shape == (1, 4)
