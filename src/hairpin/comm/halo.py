"""Halo: a part of a split dim with some items of the parts on either side.

For windows, convolutions and token shift, which look a fixed way along a dim. Every region comes
from the rank that holds it, so it may span several ranks where parts are short. The adjoint sends
the halo's cotangents back to where its items came from and adds them up, in rank order.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, overload

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.eager import eager
from hairpin.comm.maps import Identity, Land, LinearMap
from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link
from hairpin.comm.verbs import apply, check_shape
from hairpin.errors import LayoutError
from hairpin.layout import Layout, shard_offset, shard_size


@overload
def halo(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    dim: str,
    *,
    before: int,
    after: int,
    axis: str | None = ...,
) -> Tensor: ...
@overload
def halo(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    dim: str,
    *,
    before: int,
    after: int,
    axis: str | None = ...,
    wait: Literal[False],
) -> Pending: ...
@eager
def halo(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    dim: str,
    *,
    before: int,
    after: int,
    axis: str | None = None,
    wait: bool = True,
) -> Tensor | Pending:
    """This rank's part of ``dim`` with items of its neighbours: ``before`` left, ``after`` right.

    At an end of the dim there are fewer, or none: :func:`halo_sizes` says how many. An empty part
    stays empty. Sends exactly the items that other ranks ask for; differentiable at every order.

    Args:
        x: this rank's part, in ``layout``.
        layout: ``dim`` is split over ``axis``; other dims may be split over other axes.
        dim: the split dim.
        before: items wanted from the left.
        after: items wanted from the right.
        axis: the axis that ``dim`` is split over; needs no saying, and is checked if it is said.
        wait: False to return a ``Pending``.

    Returns:
        The part, longer along ``dim`` by what :func:`halo_sizes` gives.

    Raises:
        LayoutError: ``x`` has another shape, ``dim`` is not split, or a number is below 0.
    """
    mesh = as_mesh(mesh)
    axis = _axis_of(layout, dim, axis, before, after)
    check_shape(x, layout, mesh)
    linear: LinearMap = Identity()
    if mesh.size(axis) > 1 and before + after:
        mesh.group(axis)
        linear = Halo(layout, Link(mesh, axis), dim, before, after)
    return apply(x, linear, wait=wait)


def halo_sizes(
    layout: Layout, mesh: Mesh | DeviceMesh, dim: str, *, before: int, after: int
) -> tuple[int, int]:
    """How many items :func:`halo` puts on the left and on the right of this rank's part.

    Raises:
        LayoutError: ``dim`` is not split, or a number is below 0.
    """
    mesh = as_mesh(mesh)
    link = Link(mesh, _axis_of(layout, dim, None, before, after))
    spans = Halo(layout, link, dim, before, after)
    (first, last), (start, stop) = spans.held(link.rank), spans.wanted(link.rank)
    return first - start, stop - last


@dataclass(frozen=True)
class Halo:
    """split -> split with overlaps. Its transpose is :class:`HaloSum`."""

    layout: Layout
    link: Link
    dim: str
    before: int
    after: int

    def start(self, x: Tensor) -> Land:
        """Begin; the function returned waits and gives the part with its halo."""
        rank, ranks = self.link.rank, range(self.link.size)
        (first, _), (start, stop) = self.held(rank), self.wanted(rank)
        part = x.resolve_conj().resolve_neg().reshape(self.shape(self.held(rank)))
        out = x.new_empty(self.shape((start, stop)))
        sends = [self._region(part, first, self.held(rank), self.wanted(p)) for p in ranks]
        receives = [self._region(out, start, self.held(p), (start, stop)) for p in ranks]
        wait = self.link.exchange(sends, receives, what=self.words)
        receives[rank].copy_(sends[rank])

        def land() -> Tensor:
            wait()
            return out.view(self.merged((start, stop)))

        return land

    def transpose(self) -> LinearMap:
        """The exact adjoint."""
        return HaloSum(self)

    @property
    def words(self) -> str:
        """For error messages."""
        return f"halo of {self.before} and {self.after} around {self.dim!r} of {self.layout}"

    def held(self, place: int) -> tuple[int, int]:
        """First and one past the last item of the part of ``place``."""
        length, parts = self.layout.sizes[self.dim], self.link.size
        first = shard_offset(length, parts, place)
        return first, first + shard_size(length, parts, place)

    def wanted(self, place: int) -> tuple[int, int]:
        """The same of the part with its halo; an empty part stays empty."""
        first, last = self.held(place)
        if first == last:
            return first, last
        return max(0, first - self.before), min(self.layout.sizes[self.dim], last + self.after)

    def shape(self, span: tuple[int, int]) -> tuple[int, ...]:
        """Local shape with these items of ``dim``, composite dims taken apart."""
        return tuple(self._sizes(span).values())

    def merged(self, span: tuple[int, int]) -> tuple[int, ...]:
        """The same, composite dims merged."""
        sizes = self._sizes(span)
        return tuple(prod(sizes[d] for d in group) for group in self.layout.pattern.groups)

    def _sizes(self, span: tuple[int, int]) -> dict[str, int]:
        local = self.layout.local_sizes(self.link.mesh.coordinates(self.layout.axes))
        return local | {self.dim: span[1] - span[0]}

    def _region(
        self, x: Tensor, offset: int, one: tuple[int, int], other: tuple[int, int]
    ) -> Tensor:
        """What two spans share, of a tensor whose first item is ``offset``."""
        start, stop = max(one[0], other[0]), min(one[1], other[1])
        at = self.layout.position(self.dim)
        return x.narrow(at, start - offset, stop - start) if start < stop else x.narrow(at, 0, 0)


@dataclass(frozen=True)
class HaloSum:
    """split with overlaps -> split: every item is the sum of its copies, in rank order."""

    of: Halo

    def start(self, x: Tensor) -> Land:
        """Begin; the function returned waits and gives the sums."""
        of, rank, ranks = self.of, self.of.link.rank, range(self.of.link.size)
        first, start = of.held(rank)[0], of.wanted(rank)[0]
        whole = x.resolve_conj().resolve_neg().reshape(of.shape(of.wanted(rank)))
        out = x.new_zeros(of.shape(of.held(rank)))
        sends = [of._region(whole, start, of.held(p), of.wanted(rank)) for p in ranks]
        targets = [of._region(out, first, of.held(rank), of.wanted(p)) for p in ranks]
        terms = [t.new_empty(t.shape) for t in targets]
        wait = of.link.exchange(sends, terms, what=f"sum over {of.words}")
        terms[rank].copy_(sends[rank])

        def land() -> Tensor:
            wait()
            for target, term in zip(targets, terms, strict=True):
                target.add_(term)
            return out.view(of.merged(of.held(rank)))

        return land

    def transpose(self) -> LinearMap:
        """The exact adjoint."""
        return self.of


def _axis_of(layout: Layout, dim: str, axis: str | None, before: int, after: int) -> str:
    layout.position(dim)
    split = layout.pattern.splits.get(dim)
    if split is None or axis not in (None, split):
        raise LayoutError(
            f"halo along {dim!r} of layout {layout}: the dim is "
            + ("not split" if split is None else f"split over {split!r}, not over {axis!r}")
            + f"; write the split as '{dim}/{axis or 'sp'}'"
        )
    if before < 0 or after < 0:
        raise LayoutError(f"halo with before={before}, after={after}: both are 0 or more")
    return split
