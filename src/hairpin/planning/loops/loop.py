"""A loop over chunks of one dim: what a region of a graph is replaced by.

The loop is plain Python around a body that is a graph: the body compiles on its own, once, and
stays readable. Outputs are written part by part into one tensor, or into the storage of an input
that dies here; outputs of a summed dim are added up. With gradients on, nothing but the loop's
inputs is kept, and the backward computes each part again, one at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from hairpin.errors import PlanError
from hairpin.graph.axes import Span
from hairpin.graph.halo import has_halo, part
from hairpin.planning.loops.again import Again, Totals, again


@dataclass(frozen=True)
class Out:
    """How one result of the body becomes a whole tensor.

    Attributes:
        span: where the parts lie; None where parts are added up.
        order: dims from the slowest in memory to the fastest, as the whole computation has them.
        into: index of the input whose storage takes the result, None for a new one.
    """

    span: Span | None
    order: tuple[int, ...]
    into: int | None = None


class Loop(nn.Module):
    """Runs ``body(count, *parts)`` over chunks and puts the results together.

    Args:
        cuts: for each input the span that is cut, None where every turn takes it whole.
        outs: for each result of the body.
        counts_from: the body takes the turn's first unit after its count: it has a dropout, whose
            mask goes by position.

    Attributes:
        watch: entered with ``"forward"`` or ``"backward"`` around either; for measurements.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        cuts: Sequence[Span | None],
        outs: Sequence[Out],
        *,
        counts_from: bool = False,
    ) -> None:
        super().__init__()
        self.body = body
        self.cuts = tuple(cuts)
        self.outs = tuple(outs)
        self.counts_from = counts_from
        self.watch: Callable[[str], AbstractContextManager[Any]] = nullcontext

    @cached_property
    def again(self) -> Again:
        """The body as the backward runs it."""
        return again(self.body, self.cuts, 2 if self.counts_from else 1)

    def call(self, body: Callable[..., Any], start: int, count: int, parts: Sequence[Any]) -> Any:
        """One turn's results."""
        return body(count, start, *parts) if self.counts_from else body(count, *parts)

    def words(self) -> list[str]:
        """What is cut and what is put together, one line for each."""
        names = [n.name for n in self.body.graph.nodes if n.op == "placeholder"][1:]
        lines = [
            f"{name} is cut along dim {cut.dim}" + (f" in units of {cut.unit}" * (cut.unit > 1))
            for name, cut in zip(names, self.cuts, strict=False)
            if cut is not None
        ]
        for place, out in enumerate(self.outs):
            how = "added up" if out.span is None else f"put together along dim {out.span.dim}"
            into = "" if out.into is None else f", in the storage of {names[out.into]}"
            lines.append(f"result {place} is {how}{into}")
        return lines

    def units(self, inputs: Sequence[Any]) -> int:
        """Turns at chunk size 1."""
        for cut, value in zip(self.cuts, inputs, strict=True):
            if cut is not None:
                return int(value.shape[cut.dim]) // cut.unit
        raise AssertionError("a loop cuts at least one input")

    def forward(self, chunk: int, *inputs: Any) -> Any:
        """Results of the whole computation: one tensor, or a tuple."""
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            with _precision(inputs)():
                results = _Recomputed.apply(self, chunk, *inputs)
        else:
            results = self.run(chunk, inputs)
        return results[0] if len(self.outs) == 1 else tuple(results)

    def run(self, chunk: int, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """All parts in turn, without gradients."""
        with self.watch("forward"):
            return self._run(chunk, inputs)

    def _run(self, chunk: int, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        units = self.units(inputs)
        wholes: list[Tensor | None] = [
            None if out.into is None else inputs[out.into] for out in self.outs
        ]
        for start, count in turns(units, chunk, inputs):
            results = self.call(self.body, start, count, self.parts(inputs, start, count))
            self._put(wholes, results, start, count, units)
            del results
        return tuple(whole for whole in wholes if whole is not None)

    def parts(self, inputs: Sequence[Any], start: int, count: int) -> list[Any]:
        """What the body takes in the turn that begins at unit ``start``."""
        return [
            x if cut is None else part(x, cut, start, count)
            for cut, x in zip(self.cuts, inputs, strict=True)
        ]

    def _put(
        self,
        wholes: list[Tensor | None],
        results: Sequence[Tensor],
        start: int,
        count: int,
        units: int,
    ) -> None:
        for place, (out, result) in enumerate(zip(self.outs, results, strict=True)):
            whole = wholes[place]
            if out.span is None:
                wholes[place] = result if whole is None else whole.add_(result)
                continue
            if whole is None:
                whole = wholes[place] = _whole_like(result, out, units)
            whole.narrow(out.span.dim, start * out.span.unit, count * out.span.unit).copy_(result)


def turns(units: int, chunk: int, inputs: Sequence[Any]) -> list[tuple[int, int]]:
    """(start, count) of every turn; on fake tensors the first and the last two, which show all."""
    starts = range(0, units, chunk)
    if len(starts) > 3 and any(isinstance(x, FakeTensor) for x in inputs):
        starts = range(0, 2 * chunk, chunk)
    return [(start, min(chunk, units - start)) for start in starts]


def _whole_like(part: Tensor, out: Out, units: int) -> Tensor:
    """Room for all parts, laid out in memory as the whole computation would."""
    assert out.span is not None
    shape = list(part.shape)
    shape[out.span.dim] = units * out.span.unit
    room = part.new_empty([shape[dim] for dim in out.order])
    back = [out.order.index(dim) for dim in range(len(shape))]
    return room.permute(back)


class _Recomputed(torch.autograd.Function):
    """The loop with a backward that computes each part again."""

    @staticmethod
    def forward(ctx: Any, loop: Loop, chunk: int, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.loop, ctx.chunk = loop, chunk
        ctx.precision = _precision(inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.first = [next(i for i, y in enumerate(inputs) if y is x) for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
        return loop.run(chunk, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise PlanError(
                "the backward of a loop cannot be differentiated again (create_graph=True): it "
                "keeps no graph of what it computes again; detach the plan for second derivatives"
            )
        loop: Loop = ctx.loop
        inputs = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        needed = [place for place in ctx.places if ctx.needs_input_grad[2 + place]]
        with loop.watch("backward"), ctx.precision():
            found = _Backward(loop, inputs, needed, ctx.first, grads).run(ctx.chunk)
        return (None, None, *(found.get(place) for place in range(len(inputs))))


def _precision(inputs: Sequence[Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, to be entered again; without its cache, which would keep parts."""
    kind = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype, enabled=enabled, cache_enabled=False)


@dataclass(eq=False)
class _Backward:
    """The way back through a loop, part by part.

    Attributes:
        needed: places of the inputs whose gradients are wanted.
        first: for each input the first place of the same tensor: its gradients share one total.
        grads: of the loop's results.
    """

    loop: Loop
    inputs: Sequence[Any]
    needed: Sequence[int]
    first: Sequence[int]
    grads: Sequence[Tensor | None]
    totals: dict[int, Tensor] = field(default_factory=dict)
    sums: Totals | None = None
    body: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        wanted = set(self.needed)
        if any(
            isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type) for x in self.inputs
        ):
            self.body = self.loop.body  # what autocast does to products is autograd's to undo
            return
        made = self.loop.again
        alone = {place for place in made.summed if self.first.count(self.first[place]) == 1}
        summed = frozenset(wanted & alone)
        if summed == wanted & made.summed:
            anchor = torch.empty(0, requires_grad=True)
            self.sums = Totals(summed, self.totals, anchor)
            self.body = partial(made.body, self.sums)
            self.needed = [place for place in self.needed if place not in summed]
        else:
            self.body = self.loop.body

    def run(self, chunk: int) -> dict[int, Tensor]:
        """Gradient of each input, by the first place it is given at."""
        units = self.loop.units(self.inputs)
        for start, count in turns(units, chunk, self.inputs):
            self._turn(start, count, last=count == units)
        return self.totals

    def _turn(self, start: int, count: int, *, last: bool) -> None:
        """Compute one part again, go back through it, and add its gradients to the totals."""
        loop = self.loop
        parts = loop.parts(self.inputs, start, count)
        for place in self.needed:
            parts[place] = parts[place].detach().requires_grad_()
        with torch.enable_grad():
            results = loop.call(self.body, start, count, parts)
        pairs = [
            (result, _part(grad, out.span, start, count))
            for out, result, grad in zip(loop.outs, results, self.grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        del results
        if not pairs:
            return
        wanted = [parts[place] for place in self.needed]
        if self.sums is not None and self.sums.anchor is not None:
            wanted.append(self.sums.anchor)
        roots, grads = [root for root, _ in pairs], [grad for _, grad in pairs]
        del parts, pairs
        found: list[Tensor | None] = list(
            torch.autograd.grad(roots, wanted, grads, allow_unused=True)
        )
        del roots, wanted
        lent = [x.untyped_storage()._cdata for x in (*found, *grads) if x is not None]
        for number, place in enumerate(self.needed):
            grad, found[number] = found[number], None
            if grad is not None:
                owned = lent.count(grad.untyped_storage()._cdata) == 1
                self._add(place, grad, start, count, owned=owned, only=last)

    def _add(
        self, place: int, grad: Tensor, start: int, count: int, *, owned: bool, only: bool
    ) -> None:
        """Add one part's gradient of one input to its total.

        Args:
            owned: nobody else holds the gradient's storage.
            only: the part is the whole.
        """
        cut, total = self.loop.cuts[place], self.totals.get(self.first[place])
        alone = sum(self.first[other] == self.first[place] for other in self.needed) == 1
        alone = alone and not has_halo(cut)
        if total is None and (cut is None or only):
            # a gradient that is spread out, or lies in another's storage, cannot be added to
            self.totals[self.first[place]] = grad if owned and _dense(grad) else grad.clone()
        elif cut is None:
            assert total is not None
            total.add_(grad)
        else:
            if total is None:
                make = torch.empty_like if alone else torch.zeros_like
                total = self.totals[self.first[place]] = make(self.inputs[place], dtype=grad.dtype)
            own = _part(total, cut, start, count)
            own.copy_(grad) if alone else own.add_(grad)


def _part(whole: Tensor, span: Span | None, start: int, count: int) -> Tensor:
    """The part of a tensor in the turn that begins at unit ``start``."""
    if span is None:
        return whole
    return part(whole, span, start, count)


def _dense(tensor: Tensor) -> bool:
    """Whether no two elements share their place, and none of the storage is wasted."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
