"""The linear maps between layouts that differ on one mesh axis, each with its transpose.

On one axis a tensor is *whole* on every rank, *split* along a dim, or *partial*: whole on every
rank and still to be summed over them. These are all the maps between them::

    slice            whole   -> split       local
    embed            split   -> partial     local, zeros elsewhere: transpose of slice
    gather           split   -> whole       M (N-1)/N bytes sent per rank
    reduce_scatter   partial -> split       M (N-1)/N: transpose of gather
    switch           split i -> split j     M (N-1)/N^2; its transpose is the way back

A transpose of a transpose is the map itself, which makes every verb differentiable twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.errors import LayoutError
from hairpin.layout import Layout, shard_offset, shard_size

Land = Callable[[], Tensor]


class LinearMap(Protocol):
    """A linear map of tensors that can be started, awaited and transposed."""

    def start(self, x: Tensor) -> Land:
        """Begin; the function returned waits and gives the result."""
        ...

    def transpose(self) -> "LinearMap":
        """The exact adjoint."""
        ...


@dataclass(frozen=True)
class Side:
    """A layout on one rank of one axis: local shapes and where each peer's part lies."""

    layout: Layout
    link: Link

    @property
    def expanded(self) -> tuple[int, ...]:
        """Local shape with composite dims taken apart."""
        return tuple(self._local_sizes().values())

    @property
    def merged(self) -> tuple[int, ...]:
        """Local shape with composite dims merged, as the user's tensor has it."""
        return self.layout.local_shape(self.link.mesh)

    def part(self, x: Tensor, dim: str, peer: int) -> Tensor:
        """The region of expanded ``x`` (holding ``dim`` whole) that ``peer`` holds of ``dim``."""
        length, parts = self.layout.sizes[dim], self.link.size
        return x.narrow(
            self.layout.position(dim),
            shard_offset(length, parts, peer),
            shard_size(length, parts, peer),
        )

    def _local_sizes(self) -> dict[str, int]:
        return self.layout.local_sizes(self.link.mesh.coordinates(self.layout.axes))


@dataclass(frozen=True)
class _Map:
    """What all maps have: the layouts before and after, and the axis on which they differ."""

    src: Layout
    dst: Layout
    link: Link

    @property
    def _before(self) -> Side:
        return Side(self.src, self.link)

    @property
    def _after(self) -> Side:
        return Side(self.dst, self.link)

    @property
    def _words(self) -> str:
        return f"{type(self).__name__.lower()} {self.src} -> '{self.dst.pattern.render()}'"

    def _expand(self, x: Tensor) -> Tensor:
        return x.resolve_conj().resolve_neg().reshape(self._before.expanded)

    def _empty(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A result to fill, and a view of it with composite dims taken apart."""
        out = x.new_empty(self._after.merged)
        return out, out.view(self._after.expanded)


@dataclass(frozen=True)
class Slice(_Map):
    """whole -> split: keep this rank's part."""

    def start(self, x: Tensor) -> Land:
        dim = _split_dim(self.dst, self.link)
        part = self._before.part(self._expand(x), dim, self.link.rank)
        result = part.reshape(self._after.merged).clone(memory_format=torch.contiguous_format)
        return lambda: result

    def transpose(self) -> LinearMap:
        return Embed(self.dst, self.src, self.link)


@dataclass(frozen=True)
class Embed(_Map):
    """split -> partial: this rank's part among zeros."""

    def start(self, x: Tensor) -> Land:
        dim = _split_dim(self.src, self.link)
        out, parts = self._empty(x)
        out.zero_()
        self._after.part(parts, dim, self.link.rank).copy_(self._expand(x))
        return lambda: out

    def transpose(self) -> LinearMap:
        return Slice(self.dst, self.src, self.link)


@dataclass(frozen=True)
class Gather(_Map):
    """split -> whole: every rank receives every part."""

    def start(self, x: Tensor) -> Land:
        dim = _split_dim(self.src, self.link)
        part = self._expand(x).contiguous()
        out, parts = self._empty(x)
        receives = [self._after.part(parts, dim, peer) for peer in range(self.link.size)]
        wait = self.link.exchange([part] * self.link.size, receives, what=self._words)
        receives[self.link.rank].copy_(part)

        def land() -> Tensor:
            wait()
            return out

        return land

    def transpose(self) -> LinearMap:
        return ReduceScatter(self.dst, self.src, self.link)


@dataclass(frozen=True)
class ReduceScatter(_Map):
    """partial -> split: every rank receives all terms of its part and adds them in rank order."""

    def start(self, x: Tensor) -> Land:
        dim = _split_dim(self.dst, self.link)
        whole = self._expand(x)
        sends = [self._before.part(whole, dim, peer) for peer in range(self.link.size)]
        outs, terms = zip(*(self._empty(x) for _ in sends), strict=True)
        wait = self.link.exchange(sends, terms, what=self._words)
        terms[self.link.rank].copy_(sends[self.link.rank])

        def land() -> Tensor:
            wait()
            total: Tensor = outs[0]
            for term in outs[1:]:
                total += term
            return total

        return land

    def transpose(self) -> LinearMap:
        return Gather(self.dst, self.src, self.link)


@dataclass(frozen=True)
class Switch(_Map):
    """split along one dim -> split along another: one all-to-all."""

    def start(self, x: Tensor) -> Land:
        src_dim, dst_dim = _split_dim(self.src, self.link), _split_dim(self.dst, self.link)
        part = self._expand(x)
        out, parts = self._empty(x)
        sends = [self._before.part(part, dst_dim, peer) for peer in range(self.link.size)]
        receives = [self._after.part(parts, src_dim, peer) for peer in range(self.link.size)]
        wait = self.link.exchange(sends, receives, what=self._words)
        receives[self.link.rank].copy_(sends[self.link.rank])

        def land() -> Tensor:
            wait()
            return out

        return land

    def transpose(self) -> LinearMap:
        return Switch(self.dst, self.src, self.link)


@dataclass(frozen=True)
class AllReduce:
    """partial -> whole: add over all ranks. Its own transpose."""

    link: Link

    def start(self, x: Tensor) -> Land:
        total = x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        wait = self.link.sum(total, what=f"all_reduce of shape {tuple(x.shape)}")

        def land() -> Tensor:
            wait()
            return total

        return land

    def transpose(self) -> LinearMap:
        return self


@dataclass(frozen=True)
class Scale:
    """Multiply by a number."""

    factor: int

    def start(self, x: Tensor) -> Land:
        result = x * self.factor
        return lambda: result

    def transpose(self) -> LinearMap:
        return self


@dataclass(frozen=True)
class Chain:
    """``first``, then ``second``."""

    first: LinearMap
    second: LinearMap

    def start(self, x: Tensor) -> Land:
        land = self.first.start(x)

        def then() -> Tensor:
            return self.second.start(land())()

        return then

    def transpose(self) -> LinearMap:
        return Chain(self.second.transpose(), self.first.transpose())


@dataclass(frozen=True)
class Replicated:
    """``forward``, from whose result every rank goes on alike, so that all cotangents are equal.

    The sum over ranks in its adjoint is then a multiplication by their number: ``stand_in`` does
    the same without a transfer.
    """

    forward: LinearMap
    stand_in: LinearMap

    def start(self, x: Tensor) -> Land:
        return self.forward.start(x)

    def transpose(self) -> LinearMap:
        return StandIn(self)


@dataclass(frozen=True)
class StandIn:
    """The adjoint of a :class:`Replicated`, whose own adjoint is that again."""

    of: Replicated

    def start(self, x: Tensor) -> Land:
        return self.of.stand_in.start(x)

    def transpose(self) -> LinearMap:
        return self.of


@dataclass(frozen=True)
class Identity:
    """The map between equal layouts."""

    def start(self, x: Tensor) -> Land:
        return lambda: x

    def transpose(self) -> LinearMap:
        return self


def map_between(src: Layout, dst: Layout, mesh: Mesh, *, partial: bool = False) -> LinearMap:
    """The map from ``src`` to ``dst``, which may differ on one mesh axis.

    Args:
        partial: ``src`` is whole and still to be summed over the ranks.

    Raises:
        LayoutError: other dims or sizes, or a difference on two axes.
    """
    axis = differing_axis(src, dst)
    if axis is None or mesh.size(axis) == 1:
        return Identity()
    link = Link(mesh, axis)
    before, after = src.split_dim(axis), dst.split_dim(axis)
    if before is None:
        return ReduceScatter(src, dst, link) if partial else Slice(src, dst, link)
    if after is None:
        return Gather(src, dst, link)
    return Switch(src, dst, link)


def differing_axis(src: Layout, dst: Layout) -> str | None:
    """The one mesh axis on which two layouts of the same tensor differ, or None.

    Raises:
        LayoutError: they are not layouts of the same tensor, or differ on two axes.
    """
    if src.pattern.groups != dst.pattern.groups or src.sizes != dst.sizes:
        raise LayoutError(
            f"cannot move from layout {src} to {dst}: a move keeps dims, order and sizes and only "
            "changes what is split"
        )
    axes = dict.fromkeys((*src.axes, *dst.axes))
    differing = [axis for axis in axes if src.split_dim(axis) != dst.split_dim(axis)]
    if len(differing) > 1:
        raise LayoutError(
            f"layouts {src} and {dst} differ on mesh axes {', '.join(differing)}; move one axis at "
            "a time"
        )
    return differing[0] if differing else None


def _split_dim(layout: Layout, link: Link) -> str:
    dim = layout.split_dim(link.axis)
    assert dim is not None
    return dim
