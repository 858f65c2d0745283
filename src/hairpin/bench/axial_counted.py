"""What can be counted of axial parallelism without any rank: bytes sent and bytes held."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, get_args

from torch import nn

from hairpin.bench.axial_ways import (
    Method,
    Size,
    build_block,
    fastfold,
    ours,
    rehearsed,
    tensor_parallel,
)
from hairpin.planning.axial.choose import Manner
from hairpin.planning.axial.way import LineProduct, Passing

HEADS = 4  # of triangle attention: no more ranks share them


def manners() -> list[Manner]:
    """All of them, in one piece."""
    return [Manner(*found) for found in product(get_args(LineProduct), get_args(Passing))]


def all_methods() -> list[Method]:
    """Ours in every manner, and the peers."""
    return [*map(ours, manners()), fastfold(), tensor_parallel()]


def published_bytes(size: Size, degree: int) -> int:
    """What a rank sends in the forward of one block, by FastFold's published scheme, float32.

    Two turns of m and four of z, each M (N-1)/N^2, and six gathers, each M (N-1)/N: the row bias
    of 8 heads, the outer product's operand of 32 channels, two triangle operands of 128 and two
    biases of 4 heads. Its code pads: s and r become (int(n/N) + 1) N, more even where N divides n.
    """
    s, r = ((length // degree + 1) * degree for length in (size.sequences, size.residues))
    turned = 2 * s * r * size.c_m + 4 * r * r * size.c_z
    gathered = r * r * (8 + 2 * size.c + 2 * 4) + s * r * 32
    return round(4 * (turned / degree**2 + gathered / degree) * (degree - 1))


def memory(
    sizes: Sequence[tuple[Size, Sequence[int]]],
    methods: Sequence[Method],
    *,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Peaks of the rank with most, of each way, over an N-th of the peak of one rank.

    Args:
        sizes: each with the numbers of ranks.
        methods: tensor parallelism counts where every rank has a head.
    """
    block = build_block(device="meta")
    rows = []
    for size, degrees in sizes:
        say(f"memory of {size.sequences} sequences, {size.residues} residues on {degrees} ranks")
        alone = {b: _peak(ours(Manner()), size, 1, block, backward=b) for b in (False, True)}
        for degree in degrees:
            for way in methods:
                if way.name == tensor_parallel().name and degree > HEADS:
                    continue
                peaks = {b: _peak(way, size, degree, block, backward=b) for b in (False, True)}
                rows.append(
                    {
                        "method": way.name,
                        "sequences": size.sequences,
                        "residues": size.residues,
                        "ranks": degree,
                        "forward_bytes": peaks[False],
                        "step_bytes": peaks[True],
                        "forward_over_part": peaks[False] * degree / alone[False],
                        "step_over_part": peaks[True] * degree / alone[True],
                    }
                )
    return rows


def _peak(method: Method, size: Size, degree: int, block: nn.Module, *, backward: bool) -> int:
    """Of the first rank, which has most."""
    block.requires_grad_(backward)
    found = rehearsed(method, size, degree, backward=backward, block=block).peak_bytes
    block.requires_grad_(True)
    return found
