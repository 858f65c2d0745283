"""Rectified flow: the training loss and the sampler of the video transformer.

Liu et al. (2023), "Flow Straight and Fast"; Lipman et al. (2023), "Flow Matching for Generative
Modeling": a noisy video is a straight line from the clean one to noise,
`noisy = (1 - level) * clean + level * noise`, and sampling follows its velocity
`noise - clean` from level 1 to level 0. Esser et al. (2024), "Scaling Rectified Flow
Transformers": levels are drawn logit-normal. Li & He (2025), "Back to Basics": the network
predicts the clean video, which tells the velocity; the loss here is on the clean video itself, so
it weighs high levels more. Ho & Salimans (2022), "Classifier-Free Diffusion Guidance".

Every number drawn here is keyed by (seed, index of the clip), so that a clip meets the same noise
on any number of ranks and in any dtype.

Dims: b batch, t frames, h height, w width, f given frames, k labels of a clip.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
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

LEVEL_LOGIT_MEAN = 1.5  # of the logit-normal levels: mostly noise, where motion is decided


class FlowLoss(NamedTuple):
    """A sum over clips of their mean squared errors, and the clips; the loss is total / count."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, on purpose

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The mean over the clips of this batch alone."""
        return self.total / self.count


class Draws(NamedTuple):
    """What chance decides about a batch of training clips."""

    noise: Float[Tensor, "b t h w"]
    level: Float[Tensor, " b"]
    keep_label: Bool[Tensor, " b"]
    given: Bool[Tensor, "b t"]


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
    """Squared error of the clean video, over the frames that are not given.

    Args:
        model: maps (noisy video, noise level, labels, given) to the clean video.
        video: clean clips in [-1, 1].
        labels: their classes.
        index: the global index of each clip, which with `seed` keys its noise.
        given_frames: the fewest first frames that the model sees clean; every clip draws its
            number from this to all but one, so that a sampler may go on from any of them.
        null_label: replaces the labels of a share `label_dropout` of the clips.

    Returns:
        total and count over this batch: sum both over ranks before dividing.
    """
    draws = draw(
        index, seed=seed, given_frames=given_frames, label_dropout=label_dropout, like=video
    )
    labels = torch.where(draws.keep_label[:, None], labels, null_label)
    hidden = ~draws.given[:, :, None, None]  # [b, t, 1, 1]

    level = draws.level[:, None, None, None]
    noisy = torch.where(hidden, (1 - level) * video + level * draws.noise, video)
    clean = model(noisy, draws.level, labels, draws.given)

    error = hidden * (clean - video)
    pixels = hidden.sum(dim=(1, 2, 3)) * video.shape[2] * video.shape[3]  # [b]
    of_clip = error.square().sum(dim=(1, 2, 3)) / pixels
    return FlowLoss(total=of_clip.sum(), count=of_clip.new_tensor(len(of_clip)))


def draw(
    index: Sequence[int],
    *,
    seed: int,
    given_frames: int,
    label_dropout: float,
    like: Float[Tensor, "b t h w"],
) -> Draws:
    """What chance decides about the clips `index`, in `like`'s shape, dtype and device.

    Drawn in float32 whatever the dtype, by a counter-based generator per clip.
    """
    generators = [generator(seed, i) for i in index]
    normal = torch.tensor([g.standard_normal(dtype=np.float32) for g in generators])
    uniform = torch.tensor([g.random(dtype=np.float32) for g in generators])
    frames = torch.tensor([int(g.integers(given_frames, like.shape[1])) for g in generators])
    return Draws(
        noise=_normal(generators, tuple(like.shape[1:]), like=like),
        level=(normal + LEVEL_LOGIT_MEAN).sigmoid().to(like),
        keep_label=(uniform >= label_dropout).to(like.device),
        given=first_frames(frames.to(like.device), like.shape[1]),
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


def first_frames(given_frames: Int[Tensor, " b"], frames: int) -> Bool[Tensor, "b t"]:
    """True for the first `given_frames` frames of each clip."""
    return torch.arange(frames, device=given_frames.device) < given_frames[:, None]


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
    steps: int = 8,
    method: Literal["euler", "heun"] = "heun",
    frames_per_pass: int | None = None,
    guidance: float = 1.0,
) -> Float[Tensor, "b t h w"]:
    """Draws clips of `frames` frames that go on from the given first ones.

    Args:
        model: maps (noisy video, noise level, labels, given) to the clean video.
        given_video: the first `f` frames of every clip, clean; `f` may be 0.
        index: the index of each clip, which with `seed` keys its noise.
        null_label: the label that stands for "not told", used by guidance.
        steps: from level 1 to 0; "heun" calls the model twice in each but the last.
        frames_per_pass: keep this many new frames, give them, and go on: a roll-out, each pass of
            which looks less far ahead. None draws all frames in one pass.
        guidance: 1 is the model as it is; more leans on the labels, at twice the calls.
    """
    _, f, h, w = given_video.shape
    noise = _normal([generator(seed, i) for i in index], (frames, h, w), like=given_video)

    def clean_at(x: Tensor, level: Tensor, given: Tensor) -> Tensor:
        levels = level.expand(len(x))
        clean = model(x, levels, labels, given)
        if guidance == 1.0:
            return clean
        unlabelled = model(x, levels, torch.full_like(labels, null_label), given)
        return unlabelled + guidance * (clean - unlabelled)

    video = torch.cat([given_video, noise[:, f:]], dim=1)
    for start in range(f, frames, frames_per_pass or frames):
        stop = min(frames, start + (frames_per_pass or frames))
        drawn = _follow_flow(clean_at, video, given_frames=start, steps=steps, method=method)
        video = torch.cat([drawn[:, :stop], noise[:, stop:]], dim=1)
    return video


def _follow_flow(
    clean_at: Callable[[Tensor, Tensor, Tensor], Tensor],
    video: Float[Tensor, "b t h w"],
    *,
    given_frames: int,
    steps: int,
    method: Literal["euler", "heun"],
) -> Float[Tensor, "b t h w"]:
    """Takes the frames that are not given from noise to a clean video, in equal steps."""
    given = first_frames(
        torch.full((len(video),), given_frames, device=video.device), video.shape[1]
    )
    hidden = ~given[:, :, None, None]
    levels = torch.linspace(1, 0, steps + 1, dtype=video.dtype, device=video.device)

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        return hidden * (x - clean_at(x, level, given)) / level

    for level, next_level in pairwise(levels):
        v = velocity(video, level)
        if method == "heun" and next_level > 0:
            ahead = video + (next_level - level) * v
            v = (v + velocity(ahead, next_level)) / 2
        video = video + (next_level - level) * v
    return video
