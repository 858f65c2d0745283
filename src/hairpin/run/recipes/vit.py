"""Recipes of `hairpin train vit`: a vision transformer on images that come with scikit-learn."""

from dataclasses import dataclass
from typing import Literal

from hairpin.errors import RecipeError
from hairpin.models import vit
from hairpin.models.vit import ViTConfig
from hairpin.run.data.images import ImagesConfig
from hairpin.run.recipes.sequence import SequenceRecipe

_CLASSES = {"digits": 10, "photos": 4}
_COLOURS = {"digits": 1, "photos": 3}


@dataclass(frozen=True, kw_only=True)
class ViTRecipe(SequenceRecipe):
    """Every setting of a run.

    `images`, `size` and `shift` are those of an `ImagesConfig`. The images may have another size
    than the model's positions are made for.
    """

    model: ViTConfig
    images: Literal["digits", "photos"] = "digits"
    size: int = 8
    shift: int = 0

    lr: float = 3e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        self.require_sound()
        kind = self.data.kind
        if (self.model.colours, self.model.classes) != (_COLOURS[kind], _CLASSES[kind]):
            raise RecipeError(
                f"recipe {self.name!r}: images {kind!r} have {_COLOURS[kind]} colours and "
                f"{_CLASSES[kind]} classes, but the model has {self.model.colours} and "
                f"{self.model.classes}; change model.colours and model.classes"
            )
        if len(self.model.patch) != 2:
            raise RecipeError(
                f"recipe {self.name!r}: patch={self.model.patch} is for films, and these are "
                f"images; give a patch of two numbers"
            )

    @property
    def data(self) -> ImagesConfig:
        """Which images, and how large."""
        return ImagesConfig(self.images, self.size, self.shift)


def vit_digits() -> ViTRecipe:
    """0.1 million parameters on 8 x 8 handwritten digits: half a minute on one core."""
    return ViTRecipe(
        name="vit-digits",
        model=vit.digits(),
        steps=600,
        batch_size=64,
        validation_examples=180,
    )


def vit_photos() -> ViTRecipe:
    """How pieces of two photographs are turned; 75 pixels are no multiple of the patch."""
    return ViTRecipe(
        name="vit-photos",
        model=vit.photos(),
        images="photos",
        size=75,
        steps=400,
        batch_size=32,
        lr=1e-3,
    )


def vit_tiny() -> ViTRecipe:
    """A few steps of the smallest model, for tests."""
    return ViTRecipe(
        name="vit-tiny",
        model=vit.tiny(),
        steps=20,
        batch_size=6,
        warmup_steps=5,
        checkpoint_every=5,
        validate_every=10,
        validation_examples=20,
    )
