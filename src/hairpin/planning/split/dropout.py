"""Dropout keyed by global position: the same mask whatever the number of ranks.

Each element's random number is a hash of (seed, its index in the global tensor), so a rank draws
the numbers of its own part only. The seed of each call comes from torch's CPU generator, one draw a
call on every rank: activation checkpointing, which restores that generator, repeats the mask.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hairpin.comm.eager import eager
from hairpin.kernels.random import uniform
from hairpin.layout import Layout, Pattern, shard_offset, solve_sizes
from hairpin.planning.plan import DropoutSite
from hairpin.planning.split.attachment import Attachment

Places = Mapping[str, tuple[int, int]]


class GlobalDropout:
    """Stands in for the forward of one ``nn.Dropout`` on a split tensor."""

    ours = True

    def __init__(self, module: nn.Module, site: DropoutSite, attachment: Attachment) -> None:
        self.module = module
        self.site = site
        self.attachment = attachment

    @eager
    def __call__(self, x: Tensor) -> Tensor:
        probability = float(getattr(self.module, "p", 0.0))
        if not self.module.training or probability == 0.0:
            return x
        seed = int(torch.randint(2**62, ()).item())
        layout = self._layout(x, seed)
        places = self.attachment.mover.coordinates(layout.axes)
        return drop(x, probability, seed, layout, places)

    def _layout(self, x: Tensor, seed: int) -> Layout:
        """Layout of ``x`` on this rank, its global sizes from the forward under way."""
        attachment, held, text = self.attachment, self.site.held, self.site.pattern
        label = f"dropout '{self.site.module}'"
        shapes = {f"the input of {label}": (Pattern.parse(text), tuple(x.shape))}
        if held is None:
            return Layout.of(text, solve_sizes(shapes, {}))
        known = attachment.sizes_of_draw(seed)
        sizes = solve_sizes(shapes, attachment.local(known, held, what=label))
        return Layout.of(text, {**sizes, held: known[held]}).split(held, attachment.plan.axis)


def drop(x: Tensor, probability: float, seed: int, layout: Layout, places: Places) -> Tensor:
    """Zero each element with ``probability``, by global position, and scale up the rest.

    Args:
        x: this rank's part, in ``layout``.
        seed: the same on every rank.
        layout: where the part lies in the whole tensor.
        places: (rank, degree) on each mesh axis of the layout.
    """
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim, length in layout.sizes.items():
        axis = layout.pattern.splits.get(dim)
        start, count = 0, length
        if axis is not None:
            rank, degree = places[axis]
            start = shard_offset(length, degree, rank)
            count = layout.local_sizes(places)[dim]
        step = torch.arange(start, start + count, dtype=torch.int64, device=x.device)
        index = index.unsqueeze(-1) * length + step
    keep = (uniform(index, seed) >= probability).reshape(x.shape)
    return torch.where(
        keep, x / (1.0 - probability), torch.zeros((), dtype=x.dtype, device=x.device)
    )
