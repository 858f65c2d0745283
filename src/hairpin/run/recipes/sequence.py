"""What the recipes of models with one long dim share."""

from dataclasses import dataclass

from hairpin.run.recipes.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SequenceRecipe(Schedule):
    """Settings beside those of the optimizer.

    `batch_size` counts rows of text, or images, over all data-parallel ranks. `seed` keys weights
    and the order of the data. Every `validate_every` steps, and at the end, the first
    `validation_examples` of the validation data are judged, or all where there are fewer.
    """

    lr: float = 3e-3
    min_lr: float = 1e-4
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1

    checkpoint_every: int = 100
    validate_every: int = 50
    validation_examples: int = 64

    def require_sound(self) -> None:
        """Raise a `RecipeError` unless the settings that all these recipes have can work."""
        self.require_precision()
        self.require_positive(
            "steps", "batch_size", "checkpoint_every", "validate_every", "validation_examples"
        )
