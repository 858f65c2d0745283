"""One plan on one model: how its tensors move, and the sizes of the forward under way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from hairpin.comm.agree import require_agreement
from hairpin.comm.mesh import Mesh
from hairpin.comm.verbs import Grad, move
from hairpin.errors import LayoutError, PlanError
from hairpin.layout import Layout, Pattern, solve_sizes
from hairpin.planning.plan import Plan, Stage


class Mover(Protocol):
    """How tensors change layout: between live ranks, or in a rehearsal on shapes."""

    def coordinates(self, axes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
        """(rank, degree) on each of ``axes``."""
        ...

    def move(self, x: Tensor, src: Layout, dst: Layout, grad: Grad) -> Tensor:
        """``x`` from layout ``src`` to ``dst``."""
        ...

    def agree(self, statement: str) -> None:
        """Raise on every rank unless all make the same statement."""
        ...


@dataclass(frozen=True)
class LiveMover:
    """Moves between the ranks of a mesh axis."""

    mesh: Mesh
    axis: str

    def coordinates(self, axes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
        """(rank, degree) on each of ``axes``."""
        return self.mesh.coordinates(axes)

    def move(self, x: Tensor, src: Layout, dst: Layout, grad: Grad) -> Tensor:
        """``x`` from layout ``src`` to ``dst``."""
        return move(x, src, dst, self.mesh, grad=grad)

    def agree(self, statement: str) -> None:
        """Raise on every rank unless all make the same statement."""
        require_agreement(statement, self.mesh, self.axis)


Sizes = Mapping[str, int]


@dataclass(eq=False)
class Attachment:
    """One plan on one model: what its hooks share."""

    plan: Plan
    mover: Mover
    running: bool = False
    current: Sizes = field(default_factory=dict)
    remembered: "WeakKeyDictionary[Any, Sizes]" = field(default_factory=WeakKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "mover": self.mover}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, running=False, current={}, remembered=WeakKeyDictionary())

    def layout(self, pattern: str, sizes: Sizes, dim: str | None) -> Layout:
        """Layout of ``pattern`` with ``dim`` split, where it has that dim."""
        layout = Layout.of(pattern, sizes)
        return layout.split(dim if dim in layout.dims else None, self.plan.axis)

    def sizes_at(self, stage: Stage, x: Tensor, others: Mapping[str, Tensor]) -> Sizes:
        """Global sizes of the forward that stream ``x`` belongs to, as it arrives at ``stage``.

        Inside a forward of the model those are the current ones; when checkpointing runs a module
        again later, those remembered with the tensor that it kept.
        """
        known = self.current
        if not self.running:
            known = self.remembered.get(x.untyped_storage(), self.current)
        return self.solved(stage, stage.arrive, known, {stage.seam.stream: x}, others)

    def solved(
        self,
        stage: Stage,
        dim: str | None,
        known: Sizes,
        streams: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
    ) -> Sizes:
        """Known sizes completed by, and checked against, the shapes of a stage's tensors."""
        local = dict(known)
        if dim is not None:
            if dim not in known:
                raise PlanError(
                    f"module '{stage.module}' ran outside a forward of the model that carries the "
                    f"plan, so the global length of dim '{dim}' is unknown; call the whole model"
                )
            layout = Layout(f"{dim}/{self.plan.axis}", **{dim: known[dim]})
            coordinates = self.mover.coordinates((self.plan.axis,))
            local[dim] = layout.local_shape_at(coordinates)[0]
        shapes = {
            f"the tensor of module '{stage.module}'": (Pattern.parse(pattern), tuple(x.shape))
            for pattern, x in streams.items()
        }
        try:
            solved = solve_sizes(shapes, local)
            if dim is None:
                whole = {
                    f"argument '{name}' of module '{stage.module}'": (
                        Pattern.parse(stage.seam.args[name]),
                        tuple(x.shape),
                    )
                    for name, x in others.items()
                }
                solved = solve_sizes(whole, solved)
        except LayoutError as error:
            state = "whole" if dim is None else f"split along '{dim}'"
            raise PlanError(
                f"{error}. The stream was to arrive {state}. If the table's pattern is right, "
                "look for a hard-coded or cached global length in the code before this module; if "
                "a merged dim is not determined, name the model's own arguments in the table: "
                "{'': {'x': 'b t s c'}}"
            ) from error
        return {**solved, **({} if dim is None else {dim: known[dim]})}

    def remember(self, x: Tensor, sizes: Sizes) -> None:
        """Keep ``sizes`` for as long as the storage of ``x`` lives."""
        self.remembered[x.untyped_storage()] = sizes
