"""How a folding model is split: data, made by hand or chosen."""

from dataclasses import dataclass
from typing import get_args

from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.errors import PlanError
from hairpin.planning.axial.way import Passing, Product


@dataclass(frozen=True, kw_only=True)
class AxialPlan:
    """Dynamic axial parallelism of a folding model over one mesh axis.

    Attributes:
        axis: of the mesh.
        degree: its ranks.
        product: how triangle products cross the ranks: ``"gather"`` the right operand (Cheng et al.
            2022), ``"ring"``: its parts pass by, or ``"channels"``: each rank computes some
            channels of all pairs.
        passing: how pair biases and the outer product's operand do: ``"gather"`` or ``"ring"``.
    """

    axis: str = "sp"
    degree: int = 1
    product: Product = "gather"
    passing: Passing = "gather"

    def __post_init__(self) -> None:
        for name, kinds in (("product", get_args(Product)), ("passing", get_args(Passing))):
            if getattr(self, name) not in kinds:
                raise PlanError(f"{name}={getattr(self, name)!r}: write one of {', '.join(kinds)}")
        if self.degree < 1:
            raise PlanError(f"degree={self.degree}; an axis has at least one rank")


def plan_axial(
    mesh: Mesh | DeviceMesh,
    *,
    axis: str = "sp",
    product: Product = "gather",
    passing: Passing = "gather",
) -> AxialPlan:
    """Plan the split of a folding model over the ranks of a mesh axis.

    Args:
        mesh: live, or a description.
        axis: of the mesh.
        product: how triangle products cross the ranks, see :class:`AxialPlan`.
        passing: how pair biases do.

    Raises:
        PlanError: a way that does not exist.
        MeshError: no such axis.
    """
    degree = as_mesh(mesh).size(axis)
    return AxialPlan(axis=axis, degree=degree, product=product, passing=passing)
