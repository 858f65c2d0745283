"""Recipes of `hairpin train llm`: a Llama-shaped model on Python's own source text."""

from dataclasses import dataclass

from hairpin.models import llm
from hairpin.models.llm import LLMConfig
from hairpin.run.recipes.sequence import SequenceRecipe


@dataclass(frozen=True, kw_only=True)
class LLMRecipe(SequenceRecipe):
    """Every setting of a run; `length` is the tokens (bytes) of a row."""

    model: LLMConfig
    length: int

    def __post_init__(self) -> None:
        self.require_sound()
        self.require_positive("length")


def llm_source() -> LLMRecipe:
    """0.8 million parameters on rows of 256 bytes: about 4 minutes on one core."""
    return LLMRecipe(name="llm-source", model=llm.small(), length=256, steps=400, batch_size=8)


def llm_tiny() -> LLMRecipe:
    """A few steps of the smallest model, for tests."""
    return LLMRecipe(
        name="llm-tiny",
        model=llm.tiny(),
        length=32,
        steps=20,
        batch_size=4,
        warmup_steps=5,
        checkpoint_every=5,
        validate_every=10,
        validation_examples=6,
    )
