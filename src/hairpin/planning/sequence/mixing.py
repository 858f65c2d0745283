"""Finding what mixes positions outside a routed model's attention, before it gives wrong numbers.

A model whose attention crosses the ranks may have other operations along the sequence: a
convolution, a pooling, statistics over positions, positions counted from the start of what it is
given. On a part of the sequence they compute something else, and nothing fails. So the model runs
twice on a few positions of this rank's part, with attention that gives each position its own value:
once on all of them, once on some of them in another order. What it gives for a position, in every
module on the way, must be the same.

The runs leave nothing behind: no gradients, random numbers, statistics or calls of others' hooks.
"""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

FEWEST = 3  # positions to tell anything by
_MOST = 32  # positions beside which one is looked at
_SOME = 8  # of which so many are in the second run
_LOW_PRECISION = 1e-5  # above such an epsilon rounding may send a token to another expert

Event = tuple[str, str, int]


class NoAnswer(Exception):
    """The model cannot be run on a few of its positions; never leaves this room."""


class Reached(Exception):
    """The stream has left the last block; what follows sees it whole."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


@dataclass
class Probe:
    """One of the two runs: what it sees of each module, compared with the run before.

    Attributes:
        rows: which positions it is on, int64.
        before: the run to compare with, on positions 0..n.
        watching: whether the stream has been cut already.
        path: of the innermost module where a position first depends on what is beside it.
    """

    rows: Tensor
    before: "Probe | None" = None
    watching: bool = True
    path: str | None = None
    seen: dict[Event, list[Tensor]] = field(default_factory=dict)
    running: list[str] = field(default_factory=lambda: [""])
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    epsilon: float = 0.0

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This run's positions of a tensor."""
        self.watching = True
        return x.index_select(dim, self.rows.to(x.device))

    def attend(self, q: Tensor, *others: Tensor) -> Tensor:
        """In place of attention: each position's own value, for every head."""
        v = others[1]
        self._meet("attention", self.running[-1], (q, *others), self.running[-1])
        if v.shape[2] != q.shape[2]:  # keys of another sequence
            return v.new_zeros(*q.shape[:3], v.shape[3])
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def enter(self, path: str, _: nn.Module, args: object, kwargs: object) -> None:
        """A module begins; what differs in its inputs was done around it."""
        self._meet("inputs", path, (args, kwargs), self.running[-1])
        self.running.append(path)

    def leave(self, path: str, _: nn.Module, __: object, output: object) -> None:
        """A module ends."""
        self._meet("output", path, output, path)
        self.running.pop()

    def finish(self, output: object) -> None:
        """The run is over: what comes out may have positions along any dim, or have lost them."""
        self._meet("end", "", output, "", whole=True)

    def _meet(self, kind: str, path: str, x: object, blame: str, *, whole: bool = False) -> None:
        if not self.watching or self.path is not None:
            return
        self.met[kind, path] += 1
        event = kind, path, self.met[kind, path]
        tensors = [x for x in _tensors(x) if x.is_floating_point() or x.dtype == torch.int64]
        for tensor in tensors:
            self.epsilon = max(self.epsilon, _epsilon(tensor))
        if self.before is None:
            self.seen[event] = [
                x.detach().clone() if whole or _has(x, len(self.rows)) else x.new_empty(0)
                for x in tensors
            ]
            return
        theirs = self.before.seen.get(event, [])
        epsilon = max(self.epsilon, self.before.epsilon)
        for one, other in zip(theirs, tensors, strict=False):
            if one.numel() and _differs(one, other, self, epsilon=epsilon, whole=whole):
                self.path = blame
                return


def find_mixing(
    model: nn.Module,
    run: Callable[[Probe], object],
    positions: int,
    *,
    watching: bool,
) -> str | None:
    """Path of the innermost module that mixes positions, None where none does.

    Args:
        run: runs the model on a probe's positions and gives its output.
        positions: that there are to choose from, at least ``FEWEST``.
        watching: False where the model cuts its stream itself.

    Raises:
        NoAnswer: the model does not run on a few positions.
    """
    if _get_current_dispatch_mode() is not None:
        raise NoAnswer("it first ran where every operation is recorded or replaced")
    most = min(positions, _MOST)
    first = Probe(torch.arange(most), watching=watching)
    some = torch.arange(1, most, max(1, most // _SOME)).flip(0)
    for probe in (first, Probe(some, first, watching)):
        with _undisturbed(model), _watched(model, probe):
            try:
                output = run(probe)
            except Reached as end:
                output = end.output
            except Exception as error:
                reason = (str(error).strip() or "?").splitlines()[0][:200]
                where = probe.running[-1] or type(model).__name__
                raise NoAnswer(
                    f"'{where}' failed on {len(probe.rows)} positions: {reason}"
                ) from error
        probe.finish(output)
    return probe.path


def some_positions(x: object, length: int, probe: Probe) -> Any:
    """Inputs with a probe's positions in place of this rank's ``length``.

    Raises:
        NoAnswer: nothing in them is along the sequence, or something cannot be looked into.
    """
    cut = 0

    def part(x: Tensor) -> Tensor:
        nonlocal cut
        dim = _along(x, length)
        cut += dim is not None
        return x.clone() if dim is None else probe.take(x, dim)

    result = _mapped(x, part)
    if not cut:
        raise NoAnswer(f"no input has this rank's {length} positions")
    return result


def copied(x: object) -> Any:
    """Inputs that a run may write into."""
    return _mapped(x, Tensor.clone)


# ----------------------------------------------------------------------------------- comparing


def _along(x: Tensor, length: int) -> int | None:
    """The dim of the sequence: the second, or the last of ids ``[3, b, s]``, or the first."""
    return next((dim for dim in (1, 2, 0) if dim < x.dim() and x.shape[dim] == length), None)


def _has(x: Tensor, positions: int) -> bool:
    """Whether some dim is of positions; of two dims ``[tokens, channels]`` one cannot tell."""
    if x.dim() == 2:
        return not x.is_floating_point() and x.shape[1] == positions
    return x.dim() > 2 and positions in x.shape


def _differs(one: Tensor, other: Tensor, probe: Probe, *, epsilon: float, whole: bool) -> bool:
    """Whether a position has other values in ``probe``'s run than in the run before.

    Args:
        whole: the tensors are the model's outputs, in which positions may have been joined with
            other dims, or be gone.
    """
    assert probe.before is not None
    n, some = len(probe.before.rows), len(probe.rows)
    changed = [d for d, size in enumerate(one.shape) if size != other.shape[d : d + 1].numel()]
    if one.dim() != other.dim() or len(changed) > 1:
        return False
    if not changed:
        return whole and one.dim() > 0 and _apart(one[None], other[None], epsilon)
    one, other = one.movedim(changed[0], 0), other.movedim(changed[0], 0)
    if len(one) * some != len(other) * n:
        return False
    if len(one) % n:  # fewer than came in
        return whole
    times = len(one) // n
    if times > 1 and not whole:
        return False
    ways = [(0, (n, times), (some, times)), (1, (times, n), (times, some))][: 1 + (times > 1)]
    pairs = [
        (one.unflatten(0, a).movedim(at, 0)[probe.rows], other.unflatten(0, b).movedim(at, 0))
        for at, a, b in ways
    ]
    return all(_apart(a, b, epsilon) for a, b in pairs)


def _apart(one: Tensor, other: Tensor, epsilon: float) -> bool:
    """Whether rows differ by more than rounding; of low precision, half of them."""
    if not one.numel():
        return False
    one, other = (torch.nan_to_num(x.double()).flatten(1) for x in (one, other))
    size = one.norm(dim=1)
    size = size.maximum(0.1 * size.square().mean().sqrt()).clamp(min=1e-30)
    far = ((one - other).norm(dim=1) / size) > epsilon**0.5
    return bool(far.double().mean() >= 0.5 if epsilon > _LOW_PRECISION else far.any())


def _epsilon(x: Tensor) -> float:
    if not x.is_floating_point():
        return 0.0
    rough = x.dtype == torch.float32 and x.device.type != "cpu"  # its products may be rounded more
    return torch.finfo(torch.float16 if rough else x.dtype).eps


# ------------------------------------------------------------------------------ looking into values


def _tensors(x: object) -> Iterator[Tensor]:
    """Tensors of arguments and results, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for item in x.values():
            yield from _tensors(item)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item)
    elif is_dataclass(x) and not isinstance(x, type):
        for item in fields(x):
            yield from _tensors(getattr(x, item.name))


def _mapped(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(x, Tensor):
        return function(x)
    if type(x) in (tuple, list):
        return type(x)(_mapped(item, function) for item in x)
    if type(x) is dict:
        return {name: _mapped(item, function) for name, item in x.items()}
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype, torch.device)):
        return x
    raise NoAnswer(f"an input is a {type(x).__name__}")


# --------------------------------------------------------------------------- leaving nothing behind


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """While it runs: no dropout, no gradients, no others' hooks; buffers and random numbers kept.

    Batch norm stays in training, where it mixes. torch's hooks (FSDP2, tensor parallel) stay.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = module.training and _takes_statistics(module)
            stack.callback(_put_back, module._buffers, dict(module._buffers))
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                registered: OrderedDict[int, Any] = getattr(module, hooks)
                stack.callback(setattr, module, hooks, registered)
                kept = {key: hook for key, hook in registered.items() if _is_kept(hook)}
                setattr(module, hooks, OrderedDict(kept))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # casts made here have no gradient
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        yield


def _put_back(buffers: dict[str, Any], before: Mapping[str, Any]) -> None:
    buffers.clear()
    buffers.update(before)


def _takes_statistics(module: nn.Module) -> bool:
    kinds = nn.modules.batchnorm._BatchNorm
    return isinstance(module, kinds) and not isinstance(module, nn.SyncBatchNorm)


def _is_kept(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith(("torch.", "hairpin."))


@contextmanager
def _watched(model: nn.Module, probe: Probe) -> Iterator[None]:
    """Tell the probe when a module inside begins and ends."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not path:
                continue
            enter, leave = (functools.partial(f, path) for f in (probe.enter, probe.leave))
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield
