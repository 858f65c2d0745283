"""LASP's own schedule of linear attention, as its published code has it, to compare with.

LASP (Sun et al. 2024, arXiv 2404.02882) describes a state that crosses the ranks while each
attends within its own part. Its code (github.com/OpenNLPLab/LASP, four variants) waits for the
state *before* the local work and sends the next one after it, forward and backward; so a rank
begins a layer when the one before it has ended that layer. The variant ``fuse_parallel`` also has a
barrier of all ranks before each forward. What is here is that order around our own local work, and
nothing else: sends do not block, the state is one message in float32, and the local work is that of
our schedules.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.transport import Link, Wait
from hairpin.kernels.linear_attention import summarize

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Lasp:
    """Causal linear attention in LASP's order.

    Args:
        link: the ranks, of which each holds consecutive positions.
        barrier: wait for all ranks before each forward.
    """

    def __init__(self, link: Link, *, barrier: bool) -> None:
        self.link, self.barrier = link, barrier
        self.leaving: Wait | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """Attend causally from all earlier positions of all ranks.

        Args:
            q: queries ``[b, h, s, d]``.
            k: keys ``[b, h, s, d]``.
            v: values ``[b, h, s, e]``.
            log_decay: ``[h]``; no gradient.

        Returns:
            ``[b, h, s, e]``.
        """
        if self.barrier:
            dist.barrier()
        incoming: Tensor = _Take.apply(q, (*k.shape[:2], k.shape[3], v.shape[3]), self)
        segment = summarize(k, v, log_decay)
        assert segment.decay is not None
        out = segment.attend(q) + segment.receive(q, incoming)
        state = segment.state + segment.decay * incoming
        given: Tensor = _Give.apply(out, state, self)
        return given

    def take(self, shape: tuple[int, ...], place: int, *, like: Tensor, what: str) -> Tensor:
        """Wait for what ``place`` sends; zeros where there is no such place."""
        into = like.new_zeros(shape)
        if 0 <= place < self.link.size:
            receives = [into.new_empty(0)] * self.link.size
            receives[place] = into
            self.link.exchange([into.new_empty(0)] * self.link.size, receives, what=what)()
        return into

    def give(self, x: Tensor, place: int, *, what: str) -> None:
        """Start sending to ``place``, if there is one; at most one such message is under way."""
        if self.leaving is not None:
            self.leaving()
            self.leaving = None
        if 0 <= place < self.link.size:
            sends = [x.new_empty(0)] * self.link.size
            sends[place] = x.contiguous()
            receives = [x.new_empty(0)] * self.link.size
            self.leaving = self.link.exchange(sends, receives, what=what)


class _Take(torch.autograd.Function):
    """The state from the rank before. Its backward, a layer's last, sends the gradient there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], lasp: Lasp) -> Tensor:
        ctx.lasp = lasp  # the anchor needs a gradient, so that there is a backward
        return lasp.take(shape, lasp.link.rank - 1, like=anchor, what="LASP forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.lasp.give(grad, ctx.lasp.link.rank - 1, what="LASP backward")
        return None, None, None


class _Give(torch.autograd.Function):
    """The state to the next rank. Its backward, the first of a layer, waits for the gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, state: Tensor, lasp: Lasp) -> Tensor:
        ctx.lasp, ctx.shape = lasp, tuple(state.shape)
        lasp.give(state, lasp.link.rank + 1, what="LASP forward")
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        after, what = ctx.lasp.link.rank + 1, "LASP backward"
        return grad, ctx.lasp.take(ctx.shape, after, like=grad, what=what), None
