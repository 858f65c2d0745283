"""Recipes: functions that return a frozen dataclass with every setting of a training run."""

from hairpin.run.recipes.fold import FoldRecipe, fold_tiny
from hairpin.run.recipes.video import VideoRecipe, tiny, video_digits

__all__ = ["FoldRecipe", "VideoRecipe", "fold_tiny", "tiny", "video_digits"]
