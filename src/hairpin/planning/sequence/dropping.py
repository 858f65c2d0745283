"""Dropout beside attention, drawn by the places that elements have in the whole sequence.

Modules of class ``nn.Dropout`` get another forward. Where a class calls ``F.dropout`` in its own
methods, its forward is watched while it trains.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.errors import SequenceError
from hairpin.kernels.random import uniform
from hairpin.planning.sequence.plan import SequencePlan
from hairpin.planning.sequence.watching import Watching


def draw_seed() -> int:
    """One draw from torch's CPU generator: alike on all ranks, and again when recomputed."""
    return int(torch.randint(2**62, ()).item())


def route_dropout(model: nn.Module, plan: SequencePlan) -> None:
    """Give a model's dropout the places that elements have in the whole sequence."""
    for path, module in model.named_modules():
        if type(module) is nn.Dropout:
            module.__dict__["forward"] = _Dropout(module, path, plan)
        elif _drops_by_function(type(module)):
            module.__dict__["forward"] = _Dropping(module, path, plan)


def take_off_dropping(module: nn.Module) -> None:
    """Give a module the forward that it had before."""
    forward = module.__dict__.get("forward")
    before = forward.before if isinstance(forward, _Dropping) else None
    if isinstance(forward, (_Dropout, _Dropping)):
        del module.__dict__["forward"]
    if before is not None:
        module.__dict__["forward"] = before


def _drops_by_function(kind: type[nn.Module]) -> bool:
    """Whether a method of a class, other than torch's, names ``functional.dropout``."""
    ours = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    methods = [unwrap(value) for base in ours for value in vars(base).values() if callable(value)]
    names = [set(value.__code__.co_names) for value in methods if isinstance(value, FunctionType)]
    return any("dropout" in some and some & {"functional", "F"} for some in names)


@dataclass(frozen=True)
class _Dropout:
    """Stands in for a dropout module."""

    module: nn.Dropout
    path: str
    plan: SequencePlan

    def __call__(self, x: Tensor) -> Tensor:
        if not self.module.training or self.module.p == 0.0:
            return x
        return _dropout(x, self.module.p, self.plan, self.path)


def _dropout(x: Tensor, p: float, plan: SequencePlan, path: str) -> Tensor:
    """Dropout by global position: the same elements on any number of ranks.

    Args:
        x: this rank's part ``[b, s, ...]`` or ``[b s, c]``, or a tensor without positions.
    """
    kept = uniform(_index(x, plan, path).to(x.device), draw_seed()) >= p
    share = 1.0 - p or 1.0  # where all is dropped, gradients are 0
    return torch.where(kept, x / share, torch.zeros((), dtype=x.dtype, device=x.device))


def _index(x: Tensor, plan: SequencePlan, path: str) -> Tensor:
    """The place that each element has in the tensor of the whole sequence."""
    held, shape = len(plan.positions), tuple(x.shape)
    if held == plan.length or not x.numel():
        return torch.arange(x.numel()).view(shape)
    if x.dim() == 2 and shape[1] != held and shape[0] % held == 0:
        shape = (shape[0] // held, held, shape[1])
    if x.dim() < 2 or held not in shape:
        return torch.arange(x.numel()).view(shape)
    if shape[1] != held:
        raise SequenceError(
            f"module '{path}' drops elements of a tensor of shape {shape}, of which it is not "
            f"known where this rank's {held} positions are; in training drop from [b, {held}, ...] "
            "or set its dropout to 0"
        )
    rest = math.prod(shape[2:])
    rows = torch.arange(shape[0])[:, None] * plan.length + plan.positions
    return (rows[..., None] * rest + torch.arange(rest)).view(x.shape)


class _Dropping:
    """Runs a module's own forward, its calls of ``F.dropout`` drawing by global position.

    Attributes:
        before: the forward that the module was given before, if any.
    """

    def __init__(self, module: nn.Module, path: str, plan: SequencePlan) -> None:
        self.before = module.__dict__.get("forward")
        self.forward, self.module = module.forward, module
        self.path, self.plan = path, plan
        self.__wrapped__ = self.forward  # whose signature others ask for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return self.forward(*args, **kwargs)
        recompute = self.module.__dict__.get(_RECOMPUTE)
        if recompute is None:
            return self._run(self.forward, *args, **kwargs)
        self.module.__dict__[_RECOMPUTE] = _Recompute(self._run, recompute)
        try:
            return self._run(self.forward, *args, **kwargs)
        finally:
            self.module.__dict__[_RECOMPUTE] = recompute

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Drops(self.plan, self.path):
            return function(*args, **kwargs)


_RECOMPUTE = "_gradient_checkpointing_func"  # of a layer of transformers, which its forward calls


@dataclass(frozen=True)
class _Recompute:
    """What is run again in the backward sees its dropout there too."""

    run: Callable[..., Any]
    recompute: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.recompute(partial(self.run, function), *args, **kwargs)


def _recomputing() -> tuple[bool, object]:
    """Differs inside of what will be run again in the backward, reentrant or not."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), hooks


class _Drops(Watching):
    """Sees the calls of ``F.dropout`` in a module's forward."""

    function = F.dropout
    names = ("input", "p", "training", "inplace")

    def __init__(self, plan: SequencePlan, path: str) -> None:
        super().__init__()
        self.plan, self.path, self.outside = plan, path, _recomputing()

    def instead(self, call: dict[str, Any], usual: Callable[[], Any]) -> Any:
        x, p = call["input"], call.get("p", 0.5)
        if not call.get("training", True) or p == 0.0:
            return usual()
        if self.outside != _recomputing():
            raise SequenceError(
                f"module '{self.path}' calls F.dropout in a part of its forward that is "
                "recomputed, where dropout is not drawn by position; recompute whole modules, or "
                "set its dropout to 0"
            )
        dropped = _dropout(x, p, self.plan, self.path)
        return x.copy_(dropped) if call.get("inplace") else dropped
