"""Recipes: functions that return a frozen dataclass with every setting of a training run."""

from hairpin.run.recipes.video import VideoRecipe, tiny, video_digits

__all__ = ["VideoRecipe", "tiny", "video_digits"]
