"""The video transformer: shapes, what each block may depend on, and where it must run."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hairpin.errors import DataError, RecipeError
from hairpin.models.video_dit import ATTENDS, VideoDiT, VideoDiTConfig, digits, tiny
from hairpin.models.video_dit.model import (
    SpatialBlock,
    angles,
    from_patches,
    grid_places,
    last_given_frames,
    rotate,
    to_patches,
    to_surroundings,
)


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    return randomised(VideoDiT(tiny()).double())


def randomised(model: nn.Module) -> nn.Module:
    """Random instead of zero gates, so that every part takes part."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def run_part(block: nn.Module, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Calls a spatial or a temporal block; the patches lie in rows of three."""
    if isinstance(block, SpatialBlock):
        return block(x, cond, grid_places(x.shape[2] // 3, 3, like=x))
    return block(x, cond)


def arguments(b=2, t=5, h=8, w=8, dtype=torch.float64, device="cpu"):
    video = torch.randn(b, t, h, w, dtype=dtype, device=device)
    level = torch.rand(b, dtype=dtype, device=device)
    labels = torch.zeros(b, 1, dtype=torch.long, device=device)
    given = (torch.arange(t, device=device) < 2).expand(b, -1)
    return video, level, labels, given


@pytest.mark.parametrize(("t", "h", "w"), [(1, 8, 8), (5, 8, 8), (7, 4, 12), (3, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_in_whole_patches(t, h, w, dtype):
    model = randomised(VideoDiT(tiny()).to(dtype))
    out = model(*arguments(t=t, h=h, w=w, dtype=dtype))
    assert out.shape == (2, t, h, w)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_part_of_a_patch_is_refused(model):
    with pytest.raises(DataError, match=r"8 x 10 pixels are not whole patches of 4 x 4"):
        model(*arguments(w=10))


def test_head_channels_that_do_not_pair_are_refused():
    with pytest.raises(RecipeError, match="channels=24 over heads=4"):
        VideoDiTConfig(channels=24, heads=4)


def test_a_new_model_predicts_nothing_yet():
    out = VideoDiT(tiny())(*arguments(dtype=torch.float32))
    assert torch.equal(out, torch.zeros_like(out))


def test_patches_round_trip():
    video = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = to_patches(video, 4)
    assert patches.shape == (2, 3, 6, 16)
    assert torch.equal(patches[1, 2, 4], video[1, 2, 4:8, 4:8].flatten())
    assert torch.equal(from_patches(patches, 4, 2, 3), video)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_surroundings_are_centred_on_their_patch(size):
    frames = torch.randn(1, 1, 2 * size, 3 * size)
    margin = size // 2
    squares = to_surroundings(frames, size).view(1, 6, size + 2 * margin, size + 2 * margin)
    inner = squares[:, :, margin : margin + size, margin : margin + size]
    assert torch.equal(inner.flatten(2), to_patches(frames, size)[0])


def test_every_frame_sees_the_last_given_ones():
    video = torch.arange(5.0).expand(3, 5)[:, :, None, None]
    given = torch.arange(5) < torch.tensor([3, 1, 0])[:, None]
    assert last_given_frames(video, given).flatten(1).tolist() == [[2, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("argument", range(4))
def test_every_argument_matters(model, argument):
    args = list(arguments())
    before = model(*args)
    args[argument] = (args[argument] + 1) if argument < 3 else ~args[argument]
    assert (model(*args) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("part", "dim"), [("spatial", 1), ("temporal", 2)])
def test_a_block_works_on_any_slice_of_what_it_does_not_attend_along(model, part, dim):
    block = getattr(model.blocks[0], part)
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    cond = torch.randn(2, 16, dtype=torch.float64)
    whole = run_part(block, x, cond)
    parts = [run_part(block, piece, cond) for piece in x.tensor_split([0, 1, 4], dim=dim)]
    torch.testing.assert_close(torch.cat(parts, dim=dim), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("part", "dim"), [("spatial", 2), ("temporal", 1)])
def test_a_block_does_attend_along_its_dim(model, part, dim):
    block = getattr(model.blocks[0], part)
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    cond = torch.randn(2, 16, dtype=torch.float64)
    change = torch.randn_like(x.select(dim, 0))
    moved = x.clone().index_copy_(dim, torch.tensor([0]), change.unsqueeze(dim))
    difference = (run_part(block, moved, cond) - run_part(block, x, cond)).select(dim, -1)
    assert difference.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("part", "shape"), [("spatial", (2, 0, 6, 16)), ("temporal", (2, 5, 0, 16))]
)
def test_an_empty_shard_goes_through_and_back(model, part, shape):
    block = getattr(model.blocks[0], part)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = run_part(block, x, torch.randn(2, 16, dtype=torch.float64))
    out.sum().backward()
    assert out.shape == shape
    assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    places = grid_places(4, 5, like=q)

    def score(here, there):
        turned_q = rotate(q, angles(places[here : here + 1], 16))
        return (turned_q * rotate(k, angles(places[there : there + 1], 16))).sum()

    torch.testing.assert_close(score(0, 6), score(8, 14))  # one row down, one column on
    assert (score(0, 6) - score(0, 7)).abs() > 1e-3
    assert (score(0, 6) - score(0, 11)).abs() > 1e-3


def test_order_of_frames_matters(model):
    block = model.blocks[0].temporal
    x = torch.randn(1, 6, 3, 16, dtype=torch.float64)
    cond = torch.randn(1, 16, dtype=torch.float64)
    assert (block(x.flip(1), cond).flip(1) - block(x, cond)).abs().max() > 1e-6


def test_meta_device():
    with torch.device("meta"):
        model = VideoDiT(digits())
        out = model(*arguments(h=20, w=24, dtype=torch.float32, device="meta"))
    assert out.shape == (2, 5, 20, 24)


def test_fake_tensors():
    with FakeTensorMode():
        out = VideoDiT(tiny())(*arguments(t=3, w=16, dtype=torch.float32))
    assert out.shape == (2, 3, 8, 16)


def test_every_parameter_is_trained(model):
    model(*arguments()).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_seams_name_real_modules(model):
    names = {name for name, _ in model.named_modules()}
    for pattern in ATTENDS:
        assert pattern.replace("*", "0") in names


def test_digits_model_fits_its_checkpoint():
    """Weights and average in float32 and two moments in bfloat16 stay under 8 MB, with room."""
    count = sum(p.numel() for p in VideoDiT(digits()).parameters())
    assert (4 + 4 + 2 + 2) * count < 7.5e6
