"""One plan on one model: how its tensors move, and the sizes of the forward under way."""

from collections.abc import Callable, Mapping
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

    def agree(self, statement: Callable[[], str]) -> None:
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

    def agree(self, statement: Callable[[], str]) -> None:
        """Raise on every rank unless all make the same statement."""
        if self.mesh.size(self.axis) > 1:
            require_agreement(statement(), self.mesh, self.axis)


Sizes = Mapping[str, int]
_MOST_DRAWS = 2**16  # dropout calls remembered for a recompute


@dataclass(eq=False)
class Attachment:
    """One plan on one model: what its hooks share."""

    plan: Plan
    mover: Mover
    other_lengths: bool = False
    running: bool = False
    left: str | None = None
    current: Sizes = field(default_factory=dict)
    remembered: "WeakKeyDictionary[Any, dict[Any, Sizes]]" = field(
        default_factory=WeakKeyDictionary
    )
    drawn: dict[int, Sizes] = field(default_factory=dict)

    def __reduce__(self) -> tuple[object, tuple[Plan, Mover, bool]]:
        return Attachment, (
            self.plan,
            self.mover,
            self.other_lengths,
        )  # what belongs to one forward stays behind

    def layout(self, pattern: str, sizes: Sizes, dim: str | None) -> Layout:
        """Layout of ``pattern`` with ``dim`` split, where it has that dim."""
        layout = Layout.of(pattern, sizes)
        return layout.split(dim if dim in layout.dims else None, self.plan.axis)

    def require_arrival(self, stage: Stage) -> None:
        """Raise where a forward reaches a stage in another state than the plan foresaw.

        Raises:
            PlanError: the forward left out a stage, or took them in another order.
        """
        if self.running and stage.arrive != self.left:
            states = (self.left, stage.arrive)
            have, want = (f"split along '{d}'" if d else "whole" for d in states)
            raise PlanError(
                f"module '{stage.module}' was to be reached {want}, but this forward reaches it "
                f"{have}: it went another way through the stages than the one planned; plan with "
                "an example that goes the same way"
            )

    def sizes_at(self, stage: Stage, x: Tensor, others: Mapping[str, Tensor]) -> Sizes:
        """Global sizes of the forward that stream ``x`` belongs to, as it arrives at ``stage``.

        Inside a forward of the model those are the current ones; when checkpointing runs a module
        again later, those remembered with the tensor that it kept.
        """
        known = self.current
        if not self.running:
            known = self.recall(x)
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
        local = self.local(known, dim, what=f"module '{stage.module}'")
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

    def local(self, sizes: Sizes, dim: str | None, *, what: str) -> dict[str, int]:
        """Global ``sizes`` with this rank's length of ``dim``.

        Raises:
            PlanError: the global length is unknown; ``what`` names who asks.
        """
        if dim is None:
            return dict(sizes)
        if dim not in sizes:
            raise PlanError(
                f"{what} ran outside a forward of the model that carries the plan, so the global "
                f"length of dim '{dim}' is unknown; call the whole model"
            )
        layout = Layout(f"{dim}/{self.plan.axis}", **{dim: sizes[dim]})
        (length,) = layout.local_shape_at(self.mover.coordinates((self.plan.axis,)))
        return {**sizes, dim: length}

    def remember(self, x: Tensor, sizes: Sizes) -> None:
        """Keep ``sizes`` for this view of a storage, for as long as the storage lives."""
        self.remembered.setdefault(x.untyped_storage(), {})[_view(x)] = sizes

    def recall(self, x: Tensor) -> Sizes:
        """The sizes remembered with ``x``; the current ones where there are none."""
        return self.remembered.get(x.untyped_storage(), {}).get(_view(x), self.current)

    def sizes_of_draw(self, seed: int) -> Sizes:
        """Global sizes for a dropout that drew ``seed``, the same when checkpointing repeats it."""
        if not self.running:
            return self.drawn.get(seed, self.current)
        self.drawn[seed] = self.current
        if len(self.drawn) > _MOST_DRAWS:
            del self.drawn[next(iter(self.drawn))]
        return self.current


def _view(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return int(x.storage_offset()), tuple(x.shape)
