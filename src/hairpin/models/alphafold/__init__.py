"""AlphaFold 2 and AlphaFold-Multimer: plain serial modules, weights and seams."""

from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.model import AlphaFold
from hairpin.models.alphafold.seams import ATTENDS, TEMPLATE_ATTENDS

__all__ = ["ATTENDS", "TEMPLATE_ATTENDS", "AlphaFold", "AlphaFoldConfig"]
