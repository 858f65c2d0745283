"""A small axial transformer for fields on level x latitude x longitude."""

from hairpin.models.axial3d.model import Axial3D, Axial3DConfig, tiny
from hairpin.models.axial3d.seams import ATTENDS

__all__ = ["ATTENDS", "Axial3D", "Axial3DConfig", "tiny"]
