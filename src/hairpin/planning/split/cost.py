"""What a split costs: bytes over a link and arithmetic left undone by idle ranks."""

from dataclasses import dataclass
from math import prod

from hairpin.layout import Layout, shard_sizes


@dataclass(frozen=True)
class Costs:
    """Speeds that turn bytes and operations into seconds.

    The defaults are of the order of one data-centre GPU with a fast link; the choice of splits
    depends on their ratio only.

    Attributes:
        link_bytes_per_s: bytes one rank can send per second.
        latency_s: seconds one transfer takes however small it is.
        flops_per_s: arithmetic operations per second that one rank reaches.
    """

    link_bytes_per_s: float = 50e9
    latency_s: float = 20e-6
    flops_per_s: float = 200e12

    def transfer_s(self, sent_bytes: float) -> float:
        """Seconds to send this much."""
        return self.latency_s + sent_bytes / self.link_bytes_per_s if sent_bytes else 0.0

    def compute_s(self, flops: float) -> float:
        """Seconds to compute this much."""
        return flops / self.flops_per_s


def sent_bytes_by_rank(
    layout: Layout, element_bytes: int, src: str | None, dst: str | None, ranks: int
) -> tuple[int, ...]:
    """Bytes each rank sends to move a tensor's split from dim ``src`` to ``dst`` (None: whole).

    Nothing is sent to split a whole tensor; a gather sends a rank's part to each other rank; a
    switch sends each peer its part of this rank's part.
    """
    if src == dst or src is None:
        return (0,) * ranks
    rest = element_bytes * prod(n for dim, n in layout.sizes.items() if dim not in (src, dst))
    mine = shard_sizes(layout.sizes[src], ranks)
    if dst is None:
        return tuple(rest * length * (ranks - 1) for length in mine)
    theirs = shard_sizes(layout.sizes[dst], ranks)
    others = [layout.sizes[dst] - length for length in theirs]
    return tuple(rest * length * other for length, other in zip(mine, others, strict=True))


def sent_bytes(
    layout: Layout, element_bytes: int, src: str | None, dst: str | None, ranks: int
) -> int:
    """Bytes that the busiest rank sends; see :func:`sent_bytes_by_rank`."""
    return max(sent_bytes_by_rank(layout, element_bytes, src, dst, ranks))


def share(layout: Layout, held: str | None, ranks: int) -> float:
    """Part of a stage's work that the busiest rank does when ``held`` is split (None: all)."""
    if held is None or ranks == 1:
        return 1.0
    length = layout.sizes[held]
    return shard_sizes(length, ranks)[0] / length if length else 1.0
