"""Rectified flow: the training loss and the sampler of the video transformer.

Liu et al. (2023), "Flow Straight and Fast"; Lipman et al. (2023), "Flow Matching for Generative
Modeling": a noisy video is a straight line from the clean one to noise,
`noisy = (1 - level) * clean + level * noise`, and sampling follows its velocity
`noise - clean` from level 1 to level 0. Esser et al. (2024), "Scaling Rectified Flow
Transformers": levels are drawn logit-normal. Li & He (2025), "Back to Basics": the network
predicts the clean video, and the loss is on the velocity which that implies. Ho & Salimans (2022),
"Classifier-Free Diffusion Guidance".

Every number drawn here is keyed by (seed, index of the clip), so that a clip meets the same noise
on any number of ranks and in any dtype.

Dims: b batch, t frames, h height, w width, f given frames, k labels of a clip.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VideoModel = Callable[
    [
        Float[Tensor, "b t h w"],
        Float[Tensor, " b"],
        Int[Tensor, "b k"],
        Bool[Tensor, "b t"],
    ],
    Float[Tensor, "b t h w"],
]

LEVEL_LOGIT_MEAN = 0.8  # of the logit-normal levels: more noise than clean, as in Li & He
MIN_LEVEL = 0.1  # a velocity is (noisy - clean) / level: below this level, divide by this instead


class FlowLoss(NamedTuple):
    """A sum of squared errors and the number of pixels in it; the loss is total / count."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The mean over the pixels of this batch alone."""
        return self.total / self.count


class Draws(NamedTuple):
    """What chance decides about a batch of training clips."""

    noise: Float[Tensor, "b t h w"]
    level: Float[Tensor, " b"]
    keep_label: Bool[Tensor, " b"]


def flow_loss(
    model: VideoModel,
    video: Float[Tensor, "b t h w"],
    labels: Int[Tensor, "b k"],
    *,
    index: Sequence[int],
    seed: int,
    given_frames: int,
    null_label: int,
    label_dropout: float = 0.1,
) -> FlowLoss:
    """Squared error of the velocity, over the frames that are not given.

    Args:
        model: maps (noisy video, noise level, labels, given) to the clean video.
        video: clean clips in [-1, 1].
        labels: their classes.
        index: the global index of each clip, which with `seed` keys its noise.
        given_frames: the first frames, which the model sees clean.
        null_label: replaces the labels of a share `label_dropout` of the clips.

    Returns:
        total and count over this batch: sum both over ranks before dividing.
    """
    draws = draw(
        tuple(video.shape), index=index, seed=seed, label_dropout=label_dropout, like=video
    )
    labels = torch.where(draws.keep_label[:, None], labels, null_label)
    given = first_frames(video, given_frames)

    level = draws.level[:, None, None, None]
    noisy = torch.where(given[:, :, None, None], video, (1 - level) * video + level * draws.noise)
    clean = model(noisy, draws.level, labels, given)

    error = (clean - video)[:, given_frames:] / level.clamp(min=MIN_LEVEL)
    return FlowLoss(total=error.square().sum(), count=error.new_tensor(error.numel()))


def draw(
    shape: tuple[int, ...],
    *,
    index: Sequence[int],
    seed: int,
    label_dropout: float,
    like: Tensor,
) -> Draws:
    """Noise, noise levels and dropped labels for the clips `index`, of `like`'s dtype and device.

    Drawn in float32 whatever the dtype, by a counter-based generator per clip.
    """
    generators = [generator(seed, i) for i in index]
    normal = torch.tensor([g.standard_normal(dtype=np.float32) for g in generators])
    uniform = torch.tensor([g.random(dtype=np.float32) for g in generators])
    return Draws(
        noise=_normal(generators, shape[1:], like=like),
        level=(normal + LEVEL_LOGIT_MEAN).sigmoid().to(like),
        keep_label=(uniform >= label_dropout).to(like.device),
    )


def generator(seed: int, index: int) -> np.random.Generator:
    """Random numbers of one clip: Philox (Salmon et al., 2011) keyed by seed and index."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def _normal(
    generators: Sequence[np.random.Generator], shape: tuple[int, ...], *, like: Tensor
) -> Float[Tensor, "b ..."]:
    noise = np.empty((len(generators), *shape), dtype=np.float32)
    for row, clip in zip(noise, generators, strict=True):
        clip.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise).to(like)


def first_frames(video: Float[Tensor, "b t h w"], given_frames: int) -> Bool[Tensor, "b t"]:
    """True for the first `given_frames` frames of every clip."""
    frame = torch.arange(video.shape[1], device=video.device)
    return (frame < given_frames).expand(video.shape[0], -1)


@torch.no_grad()
def sample(
    model: VideoModel,
    given_video: Float[Tensor, "b f h w"],
    labels: Int[Tensor, "b k"],
    *,
    frames: int,
    index: Sequence[int],
    seed: int,
    null_label: int,
    steps: int = 16,
    method: Literal["euler", "heun"] = "heun",
    guidance: float = 1.0,
) -> Float[Tensor, "b t h w"]:
    """Draws clips of `frames` frames that go on from the given first ones.

    Args:
        model: maps (noisy video, noise level, labels, given) to the clean video.
        given_video: the first `f` frames of every clip, clean; `f` may be 0.
        index: the index of each clip, which with `seed` keys its noise.
        null_label: the label that stands for "not told", used by guidance.
        steps: from level 1 to 0; "heun" calls the model twice in each but the last.
        guidance: 1 is the model as it is; more leans on the labels, at twice the calls.
    """
    b, f, h, w = given_video.shape
    noise = _normal([generator(seed, i) for i in index], (frames, h, w), like=given_video)
    given = first_frames(noise, f)
    levels = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)

    def clean_at(x: Tensor, level: Tensor) -> Tensor:
        clean = model(x, level.expand(b), labels, given)
        if guidance != 1.0:
            unlabelled = model(x, level.expand(b), torch.full_like(labels, null_label), given)
            clean = unlabelled + guidance * (clean - unlabelled)
        return torch.cat([given_video, clean[:, f:]], dim=1)

    x = torch.cat([given_video, noise[:, f:]], dim=1)
    for level, next_level in zip(levels[:-1], levels[1:], strict=True):
        velocity = (x - clean_at(x, level)) / level
        ahead = x + (next_level - level) * velocity
        if method == "heun" and next_level > 0:
            velocity_ahead = (ahead - clean_at(ahead, next_level)) / next_level
            ahead = x + (next_level - level) * (velocity + velocity_ahead) / 2
        x = ahead
    return x
