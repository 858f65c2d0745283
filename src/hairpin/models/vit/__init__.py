"""A vision transformer for images and films of any size: model and seams."""

from hairpin.models.vit.model import ViT, ViTConfig, digits, photos, tiny
from hairpin.models.vit.seams import ATTENDS, BLOCKS, ROUTED

__all__ = ["ATTENDS", "BLOCKS", "ROUTED", "ViT", "ViTConfig", "digits", "photos", "tiny"]
