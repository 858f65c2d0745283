"""Split models give one process's values and all its gradients, and send the bytes they print."""

import pytest
import torch

from hairpin.models import axial3d, video_dit
from hairpin.models.video_dit.model import VideoDiT, tiny
from marks import slow
from planning.toys import Video, axial_case, video_arguments, video_case
from planning.truth import Case, check, randomised, seeded

# Of each test one world that divides some lengths, or one that divides none; the rest is slow.
on_three = pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4), slow(6), slow(8)])
on_four = pytest.mark.parametrize("ranks", [1, slow(2), slow(3), 4, slow(6), slow(8)])


def video_dit_case(b: int, t: int, h: int, w: int) -> Case:
    """The video transformer on ``b`` clips of ``t`` frames of ``h`` x ``w`` pixels."""

    def arguments():
        generator = torch.Generator().manual_seed(1)
        noise_level = torch.rand(b, generator=generator, dtype=torch.float64)
        given = (torch.arange(t) < 2).expand(b, t)
        return (seeded((b, t, h, w)), noise_level, torch.arange(b)[:, None], given), {}

    def build():
        return randomised(VideoDiT(tiny()))

    return Case(f"video_dit of {b, t, h, w}", build, arguments, video_dit.ATTENDS)


def axial3d_case(b: int, *grid: int) -> Case:
    return Case(
        f"axial3d of {b, *grid}",
        lambda: randomised(axial3d.Axial3D(axial3d.tiny(grid))),
        lambda: ((seeded((b, *grid, 2)),), {}),
        axial3d.ATTENDS,
    )


# Lengths 1, fewer than ranks, one more than ranks, primes; frames and patches in turn.
VIDEO_DIT = (
    video_dit_case(2, 7, 8, 8),
    video_dit_case(1, 5, 4, 12),
    video_dit_case(1, 1, 8, 8),
    video_dit_case(1, 3, 4, 4),
    video_dit_case(1, 2, 4, 8),
)
AXIAL3D = (axial3d_case(2, 3, 4, 5), axial3d_case(1, 1, 7, 2))
AXIAL = (
    axial_case(2, 2, (5, 7)),
    axial_case(2, 2, (2, 11)),
    axial_case(3, 2, (3, 4, 5)),
    axial_case(3, 1, (1, 5, 2)),
    axial_case(4, 1, (2, 3, 5, 4)),
    axial_case(4, 2, (3, 2, 2, 3)),
)
SHAPES = tuple(
    video_case(f"video of {shape}", shape)
    for shape in [(2, 6, 5), (1, 1, 7), (1, 7, 1), (3, 2, 3), (1, 13, 2), (2, 4, 5), (1, 5, 4)]
)


@on_three
def test_the_video_transformer(ranks):
    check(VIDEO_DIT, ranks)


@on_four
def test_the_three_dim_model(ranks):
    check(AXIAL3D, ranks)


@on_three
def test_two_three_and_four_dims(ranks):
    plans = check(AXIAL, ranks)
    assert ranks == 1 or all(plan.switches for plan in plans)


@on_four
def test_awkward_lengths(ranks):
    plans = check(SHAPES, ranks)
    assert ranks == 1 or all(any(stage.held for stage in plan.stages) for plan in plans)


OTHERS = tuple(
    video_case(f"video of {shape}, planned for {planned}", shape).but(
        "other shape", example=video_arguments(*planned)
    )
    for shape, planned in [
        ((2, 9, 4), (2, 6, 5)),
        ((1, 3, 11), (2, 6, 5)),
        ((3, 6, 5), (2, 6, 5)),
        ((2, 2, 1), (2, 6, 5)),
        ((2, 1, 3), (2, 6, 5)),
    ]
)


@pytest.mark.parametrize("ranks", [1, slow(2), slow(3), 4])
def test_another_shape_than_the_planned_one(ranks):
    check(OTHERS, ranks)


REPEATED = (
    video_case("blocks run three times with the same weights", repeats=3),
    video_case("one block, twice", depth=1, repeats=2),
    Case(
        "a frozen embedding",
        lambda: _frozen(randomised(Video())),
        video_arguments(2, 5, 3),
        SHAPES[0].attends,
    ),
)


def _frozen(model):
    for parameter in model.embed.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4)])
def test_modules_that_run_more_than_once(ranks):
    check(REPEATED, ranks)


ACCUMULATED = (
    video_case("gradients of three batches").but(
        "accumulated", others=lambda: [video_arguments(1, 5, 4)(), video_arguments(2, 7, 2)()]
    ),
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_accumulated_gradients(ranks):
    check(ACCUMULATED, ranks)


BATCH = (
    video_case("the batch is free", (5, 3, 2)).but("b", free_dims=("b",)),
    axial_case(2, 1, (3, 3)).but("b", free_dims=("b",)),
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_free_dims(ranks):
    plans = check(BATCH, ranks)
    assert {stage.held for stage in plans[0].stages} == {"b"}
    assert plans[0].switches == 1  # the batch stays split to the end
