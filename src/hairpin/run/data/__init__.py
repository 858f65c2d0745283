"""Training data, the same for any number of ranks: a clip is a function of (seed, index)."""

from hairpin.run.data.digits import Clips, DigitsConfig, MovingDigits, rank_indices

__all__ = ["Clips", "DigitsConfig", "MovingDigits", "rank_indices"]
