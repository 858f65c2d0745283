"""Sampling clips from a checkpoint, and drawing them for people: a GIF and a contact sheet.

Dims: b batch, t frames, h height, w width, k labels of a clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.verbs import gather
from hairpin.errors import MissingExtraError, RecipeError
from hairpin.layout import Layout
from hairpin.models.video_dit import VideoDiT, sample
from hairpin.run import checkpoint, settings
from hairpin.run.data import MovingDigits, rank_indices
from hairpin.run.device import device_of
from hairpin.run.recipes import VideoRecipe
from hairpin.run.train import build_model, split

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_PAPER = (17, 20, 28)
_INK = (205, 210, 222)
_GIVEN = (245, 176, 65)
_GENERATED = (72, 190, 170)
_EMPTY = (58, 63, 77)
_FRAME_MS = 140
_LAST_FRAME_MS = 900
_LEFT, _TOP = 84, 26  # room for the words beside and above the pictures
_GAP, _BORDER = 4, 3


@dataclass(frozen=True)
class Samples:
    """Clips of the validation digits and what the model made of their first frames.

    Attributes:
        real: the clips, in [-1, 1].
        generated: the same first `given_frames`, then the model's.
        labels: classes of their digits.
        given_frames: how many first frames the model was given.
    """

    real: Float[Tensor, "b t h w"]
    generated: Float[Tensor, "b t h w"]
    labels: Int[Tensor, "b k"]
    given_frames: int

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio of the generated frames; 20 to 30 looks alike."""
        return self._psnr_db(self.generated)

    @property
    def still_psnr_db(self) -> float:
        """The same for a film that stops at the last given frame: what there is to beat."""
        last = max(0, self.given_frames - 1)
        return self._psnr_db(self.real[:, last : last + 1].expand_as(self.real))

    def _psnr_db(self, video: Tensor) -> float:
        error = (video.clamp(-1, 1) - self.real)[:, self.given_frames :].square().mean()
        return float(10 * torch.log10(4 / error.clamp(min=1e-10)))  # values span 2


def load_model(path: str | Path, mesh: Mesh, *, clips: int) -> tuple[VideoDiT, VideoRecipe]:
    """The averaged model of a checkpoint, split over the mesh, and its recipe.

    Args:
        path: folder of a run or of one checkpoint.
        clips: the most clips that a rank will be given at once.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = checkpoint.find(path)
    info = checkpoint.read_info(folder)
    recipe = settings.from_plain(VideoRecipe, info.recipe)
    model = build_model(recipe, device=device_of(mesh)).eval()
    checkpoint.load_average(folder, model)
    split(model, recipe, mesh, clips=clips)
    return model, recipe


def draw_samples(path: str | Path, mesh: Mesh, *, count: int = 6, seed: int = 0) -> Samples:
    """Go on from the first frames of `count` validation clips. Every rank of the mesh calls it.

    The clips are shared out along ``dp``, and each is split along ``sp``; the samples are the same
    on any mesh, and whole on every rank.

    Raises:
        CheckpointError: there is no checkpoint at `path`, or it is damaged.
        RecipeError: `count` is less than 1.
    """
    if count < 1:
        raise RecipeError(f"got count={count}; sample at least 1 clip")
    ranks = mesh.size("dp")
    model, recipe = load_model(path, mesh, clips=-(-count // ranks))
    device, dtype = device_of(mesh), getattr(torch, recipe.dtype)
    data = MovingDigits(recipe.data, split="validation", seed=seed)
    chosen = varied(data, count)
    whole = data.clips(chosen)
    share = rank_indices(0, batch_size=count, rank=mesh.rank("dp"), ranks=ranks)
    mine = slice(share.start, share.stop)
    video = whole.video[mine].to(device, dtype)  # [b/dp, t, h, w]
    drawn = sample(
        model,
        video[:, : recipe.given_frames],
        whole.labels[mine].to(device),
        frames=recipe.data.frames,
        index=chosen[mine],
        seed=seed,
        null_label=recipe.model.classes,
        steps=recipe.sample_steps,
        frames_per_pass=recipe.frames_per_pass,
        guidance=recipe.guidance,
    )
    sizes = dict(zip("bthw", whole.video.shape, strict=True))
    generated = gather(drawn, Layout("b/dp t h w", **sizes), mesh, grad="replicated")
    return Samples(
        real=whole.video,
        generated=generated.float().cpu(),
        labels=whole.labels,
        given_frames=recipe.given_frames,
    )


def varied(data: MovingDigits, count: int) -> list[int]:
    """Numbers of `count` clips among the first ones, digits not yet shown before repeated ones."""
    labels = data.clips(range(8 * count)).labels[:, 0].tolist()
    shown_before = [labels[:i].count(label) for i, label in enumerate(labels)]
    return sorted(range(len(labels)), key=lambda i: (shown_before[i], i))[:count]


def write_gif(samples: Samples, path: Path, *, scale: int | None = None) -> None:
    """A film of all clips side by side, above the real ones, below the model's.

    A frame's border tells whether the model was given it or made it.
    """
    scale = scale or _scale(samples, target=132)
    frames = [_film_frame(samples, t, scale) for t in range(samples.real.shape[1])]
    durations_ms = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations_ms, loop=0, optimize=True
    )


def write_contact_sheet(samples: Samples, path: Path, *, scale: int | None = None) -> None:
    """All frames of all clips: two rows a clip, the real one and the model's, a column a frame."""
    scale = scale or _scale(samples, target=64)
    clips, frames, height, width = samples.real.shape
    step_x, step_y = width * scale + 2 * _BORDER + _GAP, height * scale + 2 * _BORDER + _GAP
    sheet, font = (
        _canvas(_LEFT + frames * step_x, _TOP + clips * (2 * step_y + 2 * _GAP)),
        _font(13),
    )
    for t in range(frames):
        words = f"given {t + 1}" if t < samples.given_frames else f"{t + 1}"
        _write(sheet, (_LEFT + t * step_x + _BORDER, 6), words, font)
    for clip in range(clips):
        top = _TOP + clip * (2 * step_y + 2 * _GAP)
        for row, (words, video) in enumerate(_rows(samples, clip)):
            y = top + row * step_y
            _write(sheet, (8, y + step_y // 2 - 10), words, font)
            for t in range(frames):
                colour = _border(samples, t, generated=row == 1)
                tile = _tile(video[t], scale, colour)
                sheet.paste(tile, (_LEFT + t * step_x, y))
    sheet.save(path)


def _rows(samples: Samples, clip: int) -> Iterator[tuple[str, Float[Tensor, "t h w"]]]:
    digits = " ".join(str(label) for label in samples.labels[clip].tolist())
    yield f"real {digits}", samples.real[clip]
    yield f"model {digits}", samples.generated[clip]


def _film_frame(samples: Samples, t: int, scale: int) -> "Image":
    clips, _, height, width = samples.real.shape
    step_x, step_y = width * scale + 2 * _BORDER + _GAP, height * scale + 2 * _BORDER + _GAP
    picture, font = _canvas(_LEFT + clips * step_x, _TOP + 2 * step_y), _font(15)
    kind = "given" if t < samples.given_frames else "predicted"
    _write(picture, (_LEFT, 5), f"frame {t + 1} of {samples.real.shape[1]}, {kind}", font)
    for row, (words, videos) in enumerate((("real", samples.real), ("model", samples.generated))):
        y = _TOP + row * step_y
        _write(picture, (10, y + step_y // 2 - 10), words, font)
        for clip in range(clips):
            colour = _border(samples, t, generated=row == 1)
            picture.paste(_tile(videos[clip, t], scale, colour), (_LEFT + clip * step_x, y))
    return picture


def _border(samples: Samples, t: int, *, generated: bool) -> tuple[int, int, int]:
    if t < samples.given_frames:
        return _GIVEN
    return _GENERATED if generated else _EMPTY


def _tile(frame: Float[Tensor, "h w"], scale: int, colour: tuple[int, int, int]) -> "Image":
    """One frame with a border, each pixel a square."""
    from PIL import Image

    tile = Image.fromarray(_pixels(frame)).convert("RGB")
    tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (tile.width + 2 * _BORDER, tile.height + 2 * _BORDER), colour)
    framed.paste(tile, (_BORDER, _BORDER))
    return framed


def _pixels(frame: Float[Tensor, "h w"]) -> UInt8[np.ndarray, "h w"]:
    return ((frame.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def _scale(samples: Samples, *, target: int) -> int:
    """Screen pixels per pixel so that a frame is about `target` wide."""
    return max(1, round(target / samples.real.shape[-1]))


def _canvas(width: int, height: int) -> "Image":
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pictures need Pillow: pip install 'hairpin[video]'") from error
    return Image.new("RGB", (width, height), _PAPER)


def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _write(
    picture: "Image", place: tuple[int, int], words: str, font: "FreeTypeFont | ImageFont"
) -> None:
    from PIL import ImageDraw

    ImageDraw.Draw(picture).text(place, words, fill=_INK, font=font)
