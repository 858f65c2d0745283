"""Frame aligned point error, of backbones and of side chains.

Jumper et al. 2021, Suppl. Sec. 1.9.2 and Alg. 28; Evans et al. 2021, Sec. 2.4 for chains.

Dims: ... any, l layers, f frames, p points, r residues. Distances are in Angstrom.
"""

from jaxtyping import Float, Int
from torch import Tensor

from hairpin.models.alphafold.config import LossConfig
from hairpin.models.alphafold.geometry import Rigid

_EPSILON = 1e-4


def frame_aligned_point_error(
    predicted: tuple[Rigid, Float[Tensor, "... p 3"]],
    target: tuple[Rigid, Float[Tensor, "... p 3"]],
    frames_mask: Float[Tensor, " f"],
    points_mask: Float[Tensor, " p"],
    *,
    unit: float,
    clamp: float,
    clamped: Tensor | float = 1.0,
    pair_mask: Float[Tensor, "f p"] | None = None,
) -> Float[Tensor, "..."]:
    """The mean distance of points as seen from each frame: Suppl. Alg. 28 "computeFAPE".

    Args:
        predicted: frames ``[..., f]`` and points ``[..., p, 3]``.
        target: the same of the known structure; leading dims broadcast.
        frames_mask: 1 for the frames that count.
        points_mask: 1 for the points that count.
        unit: Angstrom that count as an error of 1.
        clamp: distances beyond it count as it, and give no gradient.
        clamped: share of the clamped error; the rest is of the error without a clamp.
        pair_mask: 1 for the pairs of a frame and a point that count; all if left out.
    """
    apart = _seen_from(*predicted) - _seen_from(*target)
    error = (apart.square().sum(-1) + _EPSILON).sqrt()
    error = clamped * error.clamp(max=clamp) + (1 - clamped) * error
    mask = frames_mask[:, None] * points_mask[None, :]
    if pair_mask is not None:
        mask = mask * pair_mask
    return (error * mask).sum((-1, -2)) / unit / (_EPSILON + mask.sum())


def _seen_from(frames: Rigid, points: Tensor) -> Tensor:
    """Points in the coordinates of each frame, ``[..., f, p, 3]``."""
    return (points[..., None, :, :] - frames.translation[..., :, None, :]) @ frames.rotation


def backbone_fape(
    config: LossConfig,
    traj: Float[Tensor, "l r 7"],
    target: Float[Tensor, "r 7"],
    mask: Float[Tensor, " r"],
    *,
    clamped: Tensor | float = 1.0,
    asym_id: Int[Tensor, " r"] | None = None,
) -> Float[Tensor, " l"]:
    """The error of backbone frames and CA atoms after each layer: Suppl. Alg. 20, line 17.

    With ``asym_id``, pairs within a chain and pairs of two chains are two means, which are added,
    each with its own clamp and unit (Evans et al. 2021).
    """
    frames, truth = Rigid.from_tensor7(traj), Rigid.from_tensor7(target)
    pairs = ((frames, frames.translation), (truth, truth.translation), mask, mask)
    unit, clamp = config.fape_unit, config.fape_clamp
    if asym_id is None:
        return frame_aligned_point_error(*pairs, unit=unit, clamp=clamp, clamped=clamped)
    within = (asym_id[:, None] == asym_id[None, :]).to(traj.dtype)
    inside = frame_aligned_point_error(
        *pairs, unit=unit, clamp=clamp, clamped=clamped, pair_mask=within
    )
    unit, clamp = config.interface_unit, config.interface_clamp
    return inside + frame_aligned_point_error(
        *pairs, unit=unit, clamp=clamp, clamped=clamped, pair_mask=1 - within
    )


def sidechain_fape(
    config: LossConfig,
    predicted: tuple[Float[Tensor, "r 8 12"], Float[Tensor, "r 14 3"]],
    target: tuple[Float[Tensor, "r 8 12"], Float[Tensor, "r 14 3"]],
    frames_mask: Float[Tensor, "r 8"],
    points_mask: Float[Tensor, "r 14"],
) -> Float[Tensor, ""]:
    """The error of all rigid groups and atoms, always clamped: Suppl. Alg. 20, line 28."""
    some_frames, some_points = frames_mask > 0, points_mask > 0  # the others cost time and memory
    ours, truth = (
        (Rigid.from_flat12(frames[some_frames]), points[some_points])
        for frames, points in (predicted, target)
    )
    return frame_aligned_point_error(
        ours,
        truth,
        frames_mask[some_frames],
        points_mask[some_points],
        unit=config.sidechain_unit,
        clamp=config.sidechain_clamp,
    )
