"""Recipes of `hairpin train linear-llm`: gated linear attention on Python's own source text."""

from dataclasses import dataclass

from hairpin.models import linear_llm
from hairpin.models.linear_llm import LinearLLMConfig
from hairpin.run.recipes.sequence import SequenceRecipe


@dataclass(frozen=True, kw_only=True)
class LinearLLMRecipe(SequenceRecipe):
    """Every setting of a run; `length` is the tokens (bytes) of a row."""

    model: LinearLLMConfig
    length: int

    def __post_init__(self) -> None:
        self.require_sound()
        self.require_positive("length")


def linear_llm_source() -> LinearLLMRecipe:
    """0.9 million parameters on rows of 256 bytes."""
    return LinearLLMRecipe(
        name="linear-llm-source", model=linear_llm.small(), length=256, steps=400, batch_size=8
    )


def linear_llm_tiny() -> LinearLLMRecipe:
    """A few steps of the smallest model, for tests."""
    return LinearLLMRecipe(
        name="linear-llm-tiny",
        model=linear_llm.tiny(),
        length=32,
        steps=20,
        batch_size=4,
        warmup_steps=5,
        checkpoint_every=5,
        validate_every=10,
        validation_examples=6,
    )
