"""Rotations, rigid frames and quaternions in three dimensions, on tensors of any leading dims.

Jumper et al. 2021, Suppl. Sec. 1.1 and 1.8.1. Nothing here gives a gradient that is not finite: a
length is the root of a square that is kept above zero.

Dims: ... any. Points are rows (x, y, z); quaternions are (w, x, y, z).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Rigid:
    """Frames: a rotation, then a translation, for each element of the leading dims.

    ``rotation[..., 3, 3]`` has the frame's axes as columns; ``translation[..., 3]`` is its origin.
    As a map it takes a point from the frame's own coordinates to those outside.
    """

    rotation: Tensor
    translation: Tensor

    def __getitem__(self, index: Any) -> "Rigid":
        """Frames picked by an index over the leading dims; an index with ``...`` will not do."""
        return Rigid(self.rotation[index], self.translation[index])

    def apply(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
        """Points from each frame's coordinates to those outside; leading dims broadcast."""
        return rotate(self.rotation, points) + self.translation

    def apply_inverse(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
        """Points from outside to each frame's coordinates; leading dims broadcast."""
        return rotate(self.rotation.transpose(-1, -2), points - self.translation)

    def compose(self, inner: "Rigid") -> "Rigid":
        """The frames ``inner``, which are given in the coordinates of these frames, outside."""
        return Rigid(self.rotation @ inner.rotation, self.apply(inner.translation))

    def inverse(self) -> "Rigid":
        """The maps back."""
        turned = self.rotation.transpose(-1, -2)
        return Rigid(turned, -rotate(turned, self.translation))

    def to_flat12(self) -> Float[Tensor, "... 12"]:
        """Nine numbers of the rotation, row by row, then the translation."""
        return torch.cat([self.rotation.flatten(-2), self.translation], dim=-1)

    @staticmethod
    def from_flat12(flat: Float[Tensor, "... 12"]) -> "Rigid":
        """The inverse of `to_flat12`."""
        return Rigid(flat[..., :9].unflatten(-1, (3, 3)), flat[..., 9:])

    @staticmethod
    def from_tensor7(flat: Float[Tensor, "... 7"]) -> "Rigid":
        """From a unit quaternion and a translation."""
        return Rigid(quaternion_to_rotation(flat[..., :4]), flat[..., 4:])


def own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast is off: positions need the precision that tensors were given in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, as float32 if it has less precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(
    rotation: Float[Tensor, "... 3 3"], points: Float[Tensor, "... 3"]
) -> Float[Tensor, "... 3"]:
    """Turn points; leading dims broadcast. Written out, which stays exact where matmul may not."""
    return (rotation * points[..., None, :]).sum(-1)


def norm(vectors: Float[Tensor, "... 3"], *, epsilon: float) -> Float[Tensor, "..."]:
    """Lengths, the root of the squared length plus ``epsilon``."""
    return (vectors.square().sum(-1) + epsilon).sqrt()


def distances(
    a: Float[Tensor, "... 3"], b: Float[Tensor, "... 3"], *, epsilon: float
) -> Float[Tensor, "..."]:
    """Distances of points whose leading dims broadcast, each the root of a square + ``epsilon``."""
    return norm(a - b, epsilon=epsilon)


def rigid_from_three_points(
    on_negative_x: Float[Tensor, "... 3"],
    origin: Float[Tensor, "... 3"],
    in_xy_plane: Float[Tensor, "... 3"],
    *,
    epsilon: float = 1e-8,
) -> Rigid:
    """Frames by Gram and Schmidt: Jumper et al. 2021, Suppl. Alg. 21 "rigidFrom3Points".

    The x axis points from the first point to the origin; the third has a positive y. Points that
    coincide or lie on a line give a finite matrix that is no rotation, and must be masked.
    """
    x = origin - on_negative_x
    x = x / norm(x, epsilon=epsilon)[..., None]
    y = in_xy_plane - origin
    y = y - (x * y).sum(-1, keepdim=True) * x
    y = y / norm(y, epsilon=epsilon)[..., None]
    z = torch.linalg.cross(x, y)
    return Rigid(torch.stack([x, y, z], dim=-1), origin)


def backbone_frames(
    n: Float[Tensor, "... 3"], ca: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"]
) -> Rigid:
    """The frames of residues: CA at the origin, C on the positive x axis, N in the xy plane."""
    frame = rigid_from_three_points(c, ca, n)
    return Rigid(frame.rotation * frame.rotation.new_tensor([-1.0, 1.0, -1.0]), ca)


def quaternion_to_rotation(q: Float[Tensor, "... 4"]) -> Float[Tensor, "... 3 3"]:
    """The rotations of unit quaternions: Suppl. Sec. 1.8.2."""
    w, x, y, z = q.unbind(-1)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_to_quaternion(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 4"]:
    """Unit quaternions, w >= 0, of rotations; for labels, since the gradient has singular points.

    Each of the four ways to begin, by w, x, y or z, divides by that component; the greatest is
    taken.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    candidates = torch.stack(
        [
            torch.stack([1 + xx + yy + zz, zy - yz, xz - zx, yx - xy], dim=-1),
            torch.stack([zy - yz, 1 + xx - yy - zz, yx + xy, xz + zx], dim=-1),
            torch.stack([xz - zx, yx + xy, 1 - xx + yy - zz, zy + yz], dim=-1),
            torch.stack([yx - xy, xz + zx, zy + yz, 1 - xx - yy + zz], dim=-1),
        ],
        dim=-2,
    )
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    q = candidates.gather(-2, index).squeeze(-2)
    q = q / q.square().sum(-1, keepdim=True).sqrt()
    return torch.where(q[..., :1] < 0, -q, q)


def turn_quaternion(
    q: Float[Tensor, "... 4"], vector: Float[Tensor, "... 3"]
) -> Float[Tensor, "... 4"]:
    """``q`` times the quaternion (1, vector), of unit length: Suppl. Alg. 23, lines 1 to 3."""
    w, x, y, z = q.unbind(-1)
    b, c, d = vector.unbind(-1)
    product = [
        w - x * b - y * c - z * d,
        x + w * b + y * d - z * c,
        y + w * c - x * d + z * b,
        z + w * d + x * c - y * b,
    ]
    turned = torch.stack(product, dim=-1)
    return turned / turned.square().sum(-1, keepdim=True).sqrt()


def superposition(
    moving: Float[Tensor, "n 3"], target: Float[Tensor, "n 3"], mask: Float[Tensor, " n"]
) -> Rigid:
    """The proper rigid motion of ``moving`` with the least squared distance to ``target``.

    Kabsch 1976. Points with mask 0 do not count. For labels and scores: no gradient flows.
    """
    with torch.no_grad():
        weight = mask[:, None].double() / mask.sum().clamp(min=1).double()
        a, b = moving.double(), target.double()
        a_centre, b_centre = (weight * a).sum(0), (weight * b).sum(0)
        u, _, vt = torch.linalg.svd((weight * (b - b_centre)).T @ (a - a_centre))
        sign = torch.sign(torch.linalg.det(u @ vt))
        rotation = u @ torch.diag(torch.stack([sign.new_ones(()), sign.new_ones(()), sign])) @ vt
        translation = b_centre - rotation @ a_centre
    return Rigid(rotation.to(moving.dtype), translation.to(moving.dtype))
