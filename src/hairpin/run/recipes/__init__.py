"""Recipes: functions that return a frozen dataclass with every setting of a training run."""

from hairpin.run.recipes.fold import FoldRecipe, fold_tiny
from hairpin.run.recipes.linear_llm import LinearLLMRecipe, linear_llm_source, linear_llm_tiny
from hairpin.run.recipes.llm import LLMRecipe, llm_source, llm_tiny
from hairpin.run.recipes.sequence import SequenceRecipe
from hairpin.run.recipes.video import VideoRecipe, tiny, video_digits
from hairpin.run.recipes.vit import ViTRecipe, vit_digits, vit_photos, vit_tiny

__all__ = [
    "FoldRecipe",
    "LLMRecipe",
    "LinearLLMRecipe",
    "SequenceRecipe",
    "ViTRecipe",
    "VideoRecipe",
    "fold_tiny",
    "linear_llm_source",
    "linear_llm_tiny",
    "llm_source",
    "llm_tiny",
    "tiny",
    "video_digits",
    "vit_digits",
    "vit_photos",
    "vit_tiny",
]
