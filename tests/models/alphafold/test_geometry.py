"""Rotations, frames and quaternions, against cases done by hand."""

import math

import pytest
import torch

from hairpin.models.alphafold.geometry import (
    Rigid,
    backbone_frames,
    quaternion_to_rotation,
    rigid_from_three_points,
    rotate,
    rotation_to_quaternion,
    superposition,
    turn_quaternion,
)

HALF = math.sqrt(0.5)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_frames(n: int, seed: int = 0) -> Rigid:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    q = q / q.norm(dim=-1, keepdim=True)
    shift = 10 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return Rigid(quaternion_to_rotation(q), shift)


@pytest.mark.parametrize(
    ("quaternion", "of_x", "of_y"),
    [
        ((1, 0, 0, 0), (1, 0, 0), (0, 1, 0)),
        ((HALF, 0, 0, HALF), (0, 1, 0), (-1, 0, 0)),  # a quarter turn about z
        ((HALF, HALF, 0, 0), (1, 0, 0), (0, 0, 1)),  # about x
        ((0, 0, 1, 0), (-1, 0, 0), (0, 1, 0)),  # half a turn about y
    ],
)
def test_known_rotations(quaternion, of_x, of_y):
    rotation = quaternion_to_rotation(vector(*quaternion))
    torch.testing.assert_close(rotate(rotation, vector(1, 0, 0)), vector(*of_x))
    torch.testing.assert_close(rotate(rotation, vector(0, 1, 0)), vector(*of_y))
    torch.testing.assert_close(rotation_to_quaternion(rotation).abs(), vector(*quaternion).abs())


def test_quaternions_and_rotations_are_each_others_inverse():
    frames = random_frames(200)
    q = rotation_to_quaternion(frames.rotation)
    torch.testing.assert_close(quaternion_to_rotation(q), frames.rotation)
    assert (q[:, 0] >= 0).all()
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(200).double())


def test_turning_a_quaternion_composes_rotations():
    q = rotation_to_quaternion(random_frames(5).rotation)
    turn = torch.randn(5, 3, dtype=torch.float64)
    second = torch.cat([torch.ones(5, 1), turn], dim=-1)
    second = second / second.norm(dim=-1, keepdim=True)
    wanted = quaternion_to_rotation(q) @ quaternion_to_rotation(second)
    torch.testing.assert_close(quaternion_to_rotation(turn_quaternion(q, turn)), wanted)
    assert torch.equal(turn_quaternion(q, torch.zeros_like(turn)), q / q.norm(dim=-1)[:, None])


def test_frames_compose_and_invert():
    a, b = random_frames(6, 1), random_frames(6, 2)
    points = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(a.compose(b).apply(points), a.apply(b.apply(points)))
    torch.testing.assert_close(a.apply_inverse(a.apply(points)), points)
    torch.testing.assert_close(a.inverse().apply(points), a.apply_inverse(points))
    torch.testing.assert_close(Rigid.from_flat12(a.to_flat12()).rotation, a.rotation)
    assert a[2].translation.tolist() == a.translation[2].tolist()


def test_a_frame_from_three_points_by_hand():
    frame = rigid_from_three_points(vector(-2, 0, 0), vector(0, 0, 0), vector(5, 3, 0))
    torch.testing.assert_close(frame.rotation, torch.eye(3).double(), atol=1e-8, rtol=0)
    frame = rigid_from_three_points(vector(0, 0, 1), vector(0, 0, 2), vector(1, 0, 7))
    wanted = torch.stack([vector(0, 0, 1), vector(1, 0, 0), vector(0, 1, 0)], dim=-1)
    torch.testing.assert_close(frame.rotation, wanted, atol=1e-7, rtol=0)
    assert frame.translation.tolist() == [0, 0, 2]


def test_the_backbone_frame_has_c_on_x_and_n_above():
    generator = torch.Generator().manual_seed(0)
    n, ca, c = torch.randn(3, 4, 3, dtype=torch.float64, generator=generator)
    frames = backbone_frames(n, ca, c)
    local_c, local_n = frames.apply_inverse(c), frames.apply_inverse(n)
    assert (local_c[:, 0] > 0).all()
    torch.testing.assert_close(local_c[:, 1:], torch.zeros(4, 2).double(), atol=1e-7, rtol=0)
    assert (local_n[:, 1] > 0).all()
    torch.testing.assert_close(local_n[:, 2], torch.zeros(4).double(), atol=1e-7, rtol=0)
    identity = frames.rotation @ frames.rotation.transpose(-1, -2)
    torch.testing.assert_close(identity, torch.eye(3).double().expand(4, 3, 3), atol=1e-6, rtol=0)
    assert (torch.linalg.det(frames.rotation) > 0.999).all()


def test_points_that_coincide_give_finite_gradients():
    points = torch.zeros(3, 2, 3, requires_grad=True)
    frame = rigid_from_three_points(*points)
    (frame.rotation.sum() + frame.translation.sum()).backward()
    assert points.grad.isfinite().all()


def test_superposition_finds_the_motion_and_never_a_mirror_image():
    motion = random_frames(1, 3)[0]
    x = torch.randn(12, 3, dtype=torch.float64)
    mask = torch.ones(12).double()
    found = superposition(x, motion.apply(x), mask)
    torch.testing.assert_close(found.rotation, motion.rotation)
    torch.testing.assert_close(found.translation, motion.translation)
    mirrored = superposition(x, x * vector(-1, 1, 1), mask)
    torch.testing.assert_close(torch.linalg.det(mirrored.rotation), torch.tensor(1.0).double())
    y = motion.apply(x)
    y[0] = 1e3
    mask[0] = 0
    torch.testing.assert_close(superposition(x, y, mask).rotation, motion.rotation)
