"""How a tensor's named dims lie in memory and over a mesh.

``Layout("b t/sp s c", b=2, t=16, s=64, c=32)`` is a tensor of global shape (2, 16, 64, 32) whose
dim ``t`` is split over the mesh axis ``sp``. Composite dims are written as einops writes them:
``"(b s/sp) t c"``. Splits are balanced: of ``n`` items over ``N`` ranks the first ``n % N`` ranks
hold one more. Nothing is padded, nothing is sent to learn a size, and empty shards are legal.

A *dim* is a tensor's; an *axis* is a mesh's.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Protocol

from hairpin.errors import LayoutError

_TOKEN = re.compile(r"[()]|[^\s()]+")
_DIM = re.compile(r"(\[?)([A-Za-z_][A-Za-z0-9_]*)(\]?)(?:/([A-Za-z_][A-Za-z0-9_]*))?")


def shard_size(length: int, parts: int, index: int) -> int:
    """Items that part ``index`` holds when ``length`` items are split over ``parts`` ranks."""
    return length // parts + (index < length % parts)


def shard_sizes(length: int, parts: int) -> list[int]:
    """Items that each of ``parts`` ranks holds; balanced, larger shards first."""
    return [shard_size(length, parts, index) for index in range(parts)]


def shard_offset(length: int, parts: int, index: int) -> int:
    """Index of the first item that part ``index`` holds."""
    return index * (length // parts) + min(index, length % parts)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: groups of named dims, mesh axes they are split on, and bracketed dims.

    ``"(b t/sp) [s] c"`` has groups ``(("b", "t"), ("s",), ("c",))``, splits ``{"t": "sp"}`` and
    bracketed dims ``("s",)``. An empty group is a dim of length 1, written ``1``.
    """

    text: str = field(compare=False)
    groups: tuple[tuple[str, ...], ...]
    splits: Mapping[str, str] = field(hash=False)
    bracketed: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read a pattern.

        Raises:
            LayoutError: a dim named twice, an axis used twice, unbalanced or nested parentheses,
                or a word that is not a dim.
        """
        groups: list[tuple[str, ...]] = []
        splits: dict[str, str] = {}
        bracketed: list[str] = []
        open_group: list[str] | None = None
        for token in _TOKEN.findall(text):
            if token == "(":
                if open_group is not None:
                    raise LayoutError(f"layout {text!r}: parentheses may not nest")
                open_group = []
            elif token == ")":
                if open_group is None:
                    raise LayoutError(f"layout {text!r}: ')' without '('")
                groups.append(tuple(open_group))
                open_group = None
            elif token == "1" and open_group is None:
                groups.append(())
            else:
                dim = _parse_dim(token, text, splits, bracketed)
                if open_group is None:
                    groups.append((dim,))
                else:
                    open_group.append(dim)
        if open_group is not None:
            raise LayoutError(f"layout {text!r}: '(' without ')'")
        _refuse_repeats(text, [dim for group in groups for dim in group], "dim")
        _refuse_repeats(text, list(splits.values()), "mesh axis")
        return cls(text, tuple(groups), MappingProxyType(splits), tuple(bracketed))

    @property
    def dims(self) -> tuple[str, ...]:
        """All dims, in memory order."""
        return tuple(dim for group in self.groups for dim in group)

    def render(self, splits: Mapping[str, str] | None = None, *, brackets: bool = True) -> str:
        """The pattern as text, with ``splits`` (dim -> axis) instead of its own."""
        splits = self.splits if splits is None else splits

        def word(dim: str) -> str:
            name = f"[{dim}]" if brackets and dim in self.bracketed else dim
            return f"{name}/{splits[dim]}" if dim in splits else name

        words = [[word(dim) for dim in group] for group in self.groups]
        return " ".join(
            "1" if not w else w[0] if len(w) == 1 else f"({' '.join(w)})" for w in words
        )

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Pattern.parse, (self.text,)


def _parse_dim(token: str, text: str, splits: dict[str, str], bracketed: list[str]) -> str:
    match = _DIM.fullmatch(token)
    if match is None or bool(match[1]) != bool(match[3]):
        raise LayoutError(
            f"layout {text!r}: {token!r} is not a dim; write names like 's', 's/sp' for a dim "
            "split over mesh axis 'sp', '[s]' for a dim computed along, '(b s)' for merged dims"
        )
    if match[1]:
        bracketed.append(match[2])
    if match[4]:
        splits[match[2]] = match[4]
    return match[2]


def _refuse_repeats(text: str, names: list[str], kind: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LayoutError(f"layout {text!r}: {kind} {repeated[0]!r} is used twice; use it once")


@dataclass(frozen=True, init=False)
class Layout:
    """A pattern with the global size of every dim. A frozen value kept beside a tensor."""

    pattern: Pattern
    sizes: Mapping[str, int] = field(hash=False)

    def __init__(self, pattern: str | Pattern, /, **sizes: int) -> None:
        parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        missing = [dim for dim in parsed.dims if dim not in sizes]
        if missing:
            raise LayoutError(
                f"layout {parsed.text!r}: no size for dim {missing[0]!r}; "
                f"give it as a keyword, {missing[0]}=..."
            )
        wrong = [d for d in parsed.dims if not isinstance(sizes[d], int) or sizes[d] < 0]
        if wrong:
            raise LayoutError(
                f"layout {parsed.text!r}: dim {wrong[0]!r} has size {sizes[wrong[0]]!r}; "
                "a size is a whole number, 0 or more"
            )
        unknown = [dim for dim in sizes if dim not in parsed.dims]
        if unknown:
            raise LayoutError(
                f"layout {parsed.text!r} has no dim {unknown[0]!r}; its dims are "
                f"{', '.join(parsed.dims) or 'none'}"
            )
        object.__setattr__(self, "pattern", parsed)
        object.__setattr__(self, "sizes", MappingProxyType({d: sizes[d] for d in parsed.dims}))

    @classmethod
    def of(cls, pattern: str, sizes: Mapping[str, int]) -> "Layout":
        """A layout with the sizes it needs out of a larger mapping."""
        parsed = Pattern.parse(pattern)
        return cls(parsed, **{dim: sizes[dim] for dim in parsed.dims if dim in sizes})

    @property
    def dims(self) -> tuple[str, ...]:
        """All dims, in memory order."""
        return self.pattern.dims

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that some dim is split over."""
        return tuple(self.pattern.splits.values())

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, composite dims merged."""
        return tuple(prod(self.sizes[d] for d in group) for group in self.pattern.groups)

    def split_dim(self, axis: str) -> str | None:
        """The dim split over mesh ``axis``, or None where the axis holds it whole."""
        return next((d for d, a in self.pattern.splits.items() if a == axis), None)

    def split(self, dim: str | None, axis: str) -> "Layout":
        """The same tensor with ``dim`` split over ``axis`` (None: whole on that axis).

        Raises:
            LayoutError: ``dim`` is not in the layout, or already split over another axis.
        """
        if dim is not None:
            self._require(dim)
            if self.pattern.splits.get(dim, axis) != axis:
                raise LayoutError(
                    f"layout {self}: dim {dim!r} is already split over axis "
                    f"{self.pattern.splits[dim]!r}; split it over one axis only"
                )
        splits = {d: a for d, a in self.pattern.splits.items() if a != axis}
        if dim is not None:
            splits[dim] = axis
        return Layout(self.pattern.render(splits), **self.sizes)

    def local_sizes(self, coordinates: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Each dim's length on one rank; ``coordinates`` gives (rank, degree) per mesh axis."""
        sizes = dict(self.sizes)
        for dim, axis in self.pattern.splits.items():
            rank, degree = coordinates[axis]
            sizes[dim] = shard_size(sizes[dim], degree, rank)
        return sizes

    def local_shape_at(self, coordinates: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
        """Shape of one rank's part, composite dims merged."""
        sizes = self.local_sizes(coordinates)
        return tuple(prod(sizes[d] for d in group) for group in self.pattern.groups)

    def local_shape(self, mesh: "HasCoordinates") -> tuple[int, ...]:
        """Shape of this rank's part on ``mesh``."""
        return self.local_shape_at(mesh.coordinates(self.axes))

    def position(self, dim: str) -> int:
        """Index of ``dim`` among all dims, composite dims expanded.

        Raises:
            LayoutError: no such dim.
        """
        self._require(dim)
        return self.dims.index(dim)

    def _require(self, dim: str) -> None:
        if dim not in self.sizes:
            raise LayoutError(
                f"layout {self} has no dim {dim!r}; its dims are {', '.join(self.dims)}"
            )

    def __str__(self) -> str:
        sizes = ", ".join(f"{d}={n}" for d, n in self.sizes.items())
        return f"'{self.pattern.render()}' ({sizes})"

    def __iter__(self) -> Iterator[str]:
        return iter(self.dims)

    def __reduce__(self) -> tuple[object, tuple[str, dict[str, int]]]:
        return _rebuild, (self.pattern.text, dict(self.sizes))


def _rebuild(text: str, sizes: dict[str, int]) -> Layout:
    return Layout(text, **sizes)


class HasCoordinates(Protocol):
    """What a layout needs of a mesh: where this rank sits on each axis."""

    def coordinates(self, axes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
        """(rank, degree) on each of ``axes``."""
        ...


def solve_sizes(
    shapes: Mapping[str, tuple[Pattern, tuple[int, ...]]], known: Mapping[str, int]
) -> dict[str, int]:
    """Sizes of all dims from whole tensors' shapes, composite dims solved by division.

    Args:
        shapes: for each name (used in messages) a pattern and the shape it must have.
        known: sizes already known.

    Raises:
        LayoutError: a tensor of another rank, sizes that contradict each other, or a composite dim
            that the shapes do not determine.
    """
    sizes = dict(known)
    for name, (pattern, shape) in shapes.items():
        if len(shape) != len(pattern.groups):
            raise LayoutError(
                f"{name} has shape {tuple(shape)}, {len(shape)} dims, but its pattern "
                f"{pattern.text!r} has {len(pattern.groups)}"
            )
    pending = [
        (name, pattern, group, length)
        for name, (pattern, shape) in shapes.items()
        for group, length in zip(pattern.groups, shape, strict=True)
    ]
    while pending:
        left = [item for item in pending if not _solve_group(*item, sizes)]
        if len(left) == len(pending):
            name, pattern, group, length = left[0]
            unknown = [d for d in group if d not in sizes]
            raise LayoutError(
                f"{name}, pattern {pattern.text!r}: the shapes do not say how {length} divides "
                f"into {' x '.join(group)}; give sizes={{{unknown[0]!r}: ...}}"
            )
        pending = left
    return sizes


def _solve_group(
    name: str, pattern: Pattern, group: tuple[str, ...], length: int, sizes: dict[str, int]
) -> bool:
    """Fix the one unknown dim of a group, or check it; False where more than one is unknown."""
    unknown = [d for d in group if d not in sizes]
    product = prod(sizes[d] for d in group if d in sizes)
    if len(unknown) > 1 or (unknown and product == 0 == length):
        return False
    if unknown and product and length % product == 0:
        sizes[unknown[0]] = length // product
        return True
    if unknown or product != length:
        got = ", ".join(f"{d}={sizes[d]}" for d in group if d in sizes)
        raise LayoutError(
            f"{name}, pattern {pattern.text!r}: a dim of length {length} cannot be "
            f"{' x '.join(group) or '1'}" + (f" with {got}" if got else "")
        )
    return True
