"""What the tests of this floor share: reference slices, bit patterns, and meshes for ranks."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

import hairpin.comm.grads
import hairpin.comm.verbs  # noqa: F401  # hp loads names lazily: import once here, not in each rank
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.layout import Layout

WORLDS = (1, 2, 3, 4, 6, 8)
PLAIN_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
RARE_DTYPES = (
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def line(timeout_s: float = 20) -> Mesh:
    """All ranks along one axis ``sp``."""
    return init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=timeout_s)


def places(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """Rank and degree by axis, from the global rank alone: the outermost axis comes first."""
    rank, found = mesh.global_rank, {}
    for axis in reversed(mesh.axes):
        degree = mesh.size(axis)
        found[axis] = (rank % degree, degree)
        rank //= degree
    return found


def part_of(whole: Tensor, layout: Layout, at: Mapping[str, tuple[int, int]]) -> Tensor:
    """The reference for what one rank holds: torch's own ``tensor_split``, dim by dim."""
    part = whole.reshape([layout.sizes[dim] for dim in layout.dims])
    for dim, axis in layout.pattern.splits.items():
        rank, degree = at[axis]
        part = part.tensor_split(degree, layout.dims.index(dim))[rank]
    shape, left = [], list(part.shape)
    for group in layout.pattern.groups:
        shape.append(math.prod(left[: len(group)]))
        del left[: len(group)]
    return part.reshape(shape)


def arbitrary(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of random bits, so of every NaN payload too; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, top, (count,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """float64 numbers, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> bool:
    """Whether values agree to ``tolerance``, relative to the largest."""
    if got.shape != want.shape:
        return False
    if not want.numel():
        return True
    got, want = got.detach(), want.detach()
    scale = max(float(want.abs().max()), 1e-300)
    return float((got - want).abs().max()) <= tolerance * scale
