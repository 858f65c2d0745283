"""Something made of parts that pass by, of which no rank keeps more than its own.

The backward lets them pass by again, computes each piece again, and sends the gradients of a part
one step behind it, to end at its owner.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hairpin.planning.axial.moves import taken

Use = Callable[..., Tensor]  # (rows, part, *near) to a piece of a result


class Passage(Protocol):
    """How the parts of all ranks pass by."""

    def passing(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and part of every rank, this rank's first."""
        ...

    def returned(self, x: Tensor, term: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """The sum of all ranks' terms of this rank's part."""
        ...


@dataclass(frozen=True)
class Job:
    """What is made of the parts.

    Attributes:
        use: see :meth:`Way.as_it_passes`.
        dim: of the result, along which pieces are rows.
        length: of the result along it.
        parameters: those that ``use`` has.
    """

    use: Use
    passage: Passage
    dim: int
    length: int
    parameters: tuple[nn.Parameter, ...]


def as_it_passes(job: Job, x: Tensor, near: Sequence[Tensor]) -> Tensor:
    """The result of a job; ``x`` is this rank's part."""
    return _AsItPasses.apply(job, x, *near, *job.parameters)  # type: ignore[no-any-return]


class _AsItPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, x: Tensor, *others: Tensor) -> Tensor:
        near = others[: len(others) - len(job.parameters)]
        ctx.job, ctx.autocast = job, _autocast(x)
        ctx.save_for_backward(x, *near)
        out = x.new_empty(0)
        for place, (rows, part) in enumerate(job.passage.passing(x)):
            piece = job.use(rows, part, *near)
            if place == 0:
                shape = list(piece.shape)
                shape[job.dim] = job.length
                out = piece.new_empty(shape)
            taken(out, job.dim, rows).copy_(piece)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        job, wanted = ctx.job, ctx.needs_input_grad[2:]
        x, *near = ctx.saved_tensors
        near = [t.detach().requires_grad_(w) for t, w in zip(near, wanted, strict=False)]
        leaves = zip((*near, *job.parameters), wanted, strict=True)
        learning = [leaf for leaf, want in leaves if want]
        totals = [torch.zeros_like(t) for t in learning]

        def term(rows: slice, part: Tensor) -> Tensor:
            part = part.detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast():
                piece = job.use(rows, part, *near)
            rows_grad = taken(grad, job.dim, rows)
            of_part, *terms = torch.autograd.grad(piece, [part, *learning], rows_grad)
            for place, more in enumerate(terms):
                totals[place] += more
            return of_part

        of_x = job.passage.returned(x, term)
        found = iter(totals)
        return None, of_x, *(next(found) if w else None for w in wanted)


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, for when the pieces are computed again."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype, enabled=enabled)
