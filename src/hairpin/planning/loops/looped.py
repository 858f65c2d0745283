"""Loops on a live model: each planned block's forward is its graph with loops, until detached."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from hairpin.errors import PlanError, TraceError
from hairpin.graph.autocast import autocast_now
from hairpin.graph.export import Traced, filled
from hairpin.graph.leaf import Call
from hairpin.graph.meter import measure
from hairpin.planning.example import Example
from hairpin.planning.loops.budget import fit
from hairpin.planning.loops.budget_training import fit_training
from hairpin.planning.loops.data import BlockLoops
from hairpin.planning.loops.graphs import Graphs
from hairpin.planning.loops.hookless import trace_block
from hairpin.planning.loops.program import Program, make_program, restored
from hairpin.planning.loops.search import Search
from hairpin.planning.loops.stamp import stamp
from hairpin.planning.loops.training import Kept, TrainingProgram, make_training_program

_LESS = 0.9  # of a budget, tried next where what was found keeps too much
_log = logging.getLogger(__name__)


class LoopedForward:
    """Stands in for the forward of one block.

    Args:
        shared: the programs of all blocks of its kind.
    """

    ours = True

    def __init__(self, block: nn.Module, loops: BlockLoops, shared: "Shared") -> None:
        self.block = block
        self.loops = loops
        self.shared = shared
        self.original = type(block).forward.__get__(block)
        self.stamp = stamp(block)
        self.__signature__ = inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._require_unchanged(args, kwargs)
        if not self.shared.needs_loops(self, args, kwargs):
            return self.original(*args, **kwargs)
        program, flat = self.shared.program(self.block, self, args, kwargs)
        return program.run_flat(self.block, flat)

    def from_given(self, call: Call, tensors: Sequence[Tensor]) -> Any:
        """The block's result where it makes some of its arguments itself.

        Args:
            tensors: what it takes, in the order of the call that was traced.
        """
        self._require_unchanged(tensors, {})
        for program in self.shared.programs:
            if program.traced.call.recipes and program.traced.holds(tensors):
                return program.run_flat(self.block, program.traced.filled(self.block, tensors))
        args, kwargs = call.arguments(tensors)
        return self(*args, **kwargs)

    def _require_unchanged(self, args: Any, kwargs: Any) -> None:
        block, loops = self.block, self.loops
        if block.training != loops.training:
            now, then = ("train()", "eval()") if block.training else ("eval()", "train()")
            raise PlanError(
                f"this {loops.block} is in {now} and its loops were planned in {then}; plan again "
                f"after model.{now}"
            )
        if autocast_now() != loops.autocast:
            raise PlanError(_other_autocast(loops.block, loops.autocast))
        if stamp(block) != self.stamp:
            raise PlanError(_changed(loops.block))
        if not loops.backward and torch.is_grad_enabled() and _wants_gradients(block, args, kwargs):
            raise PlanError(
                f"the loops of this {loops.block} were planned for a forward alone, and this call "
                "keeps what a backward needs; run it under torch.no_grad(), or plan with "
                "backward=True"
            )


def _changed(block: str) -> str:
    return (
        f"this {block} has changed since it was planned (a setting, a mode, a hook or a layer "
        "inside it), and its loops compute what it was; hp.detach the model and plan again"
    )


def _other_autocast(block: str, planned: str) -> str:
    then, now = (
        f"under torch.autocast ({setting})" if setting else "without torch.autocast"
        for setting in (planned, autocast_now())
    )
    return (
        f"the loops of this {block} were planned {then} and are called {now}, which computes in "
        "other dtypes; call hp.plan under the same torch.autocast as the model"
    )


def _wants_gradients(block: nn.Module, args: Any, kwargs: Any) -> bool:
    tensors = (*block.parameters(), *tree_leaves((args, kwargs)))
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


class Shared:
    """The programs of all blocks of one kind: one for each way in which they are called.

    Attributes:
        others: for what lies around blocks: theirs, by path; their graphs depend on each other.

    Args:
        drop: takes their plan out of the cache, should the loops be for another graph.
    """

    def __init__(
        self,
        loops: BlockLoops,
        first: Program | None,
        *,
        compile_bodies: bool,
        drop: Callable[[], None] | None = None,
    ) -> None:
        self.loops = loops
        self.others: dict[str, Shared] = {}
        self.drop = drop
        self.programs: list[Program] = []
        self.compile_bodies = compile_bodies
        self._whole_bytes: dict[tuple[str, ...], float] = {}
        if first is not None:
            self._add(first)

    def _add(self, program: Program) -> None:
        if self.compile_bodies:
            program.compile_bodies()
        self.programs.append(program)

    def __deepcopy__(self, memo: Any) -> "Shared":
        """A copy of a model shares the programs: they hold no weights."""
        return self

    def __reduce__(self) -> Any:
        raise PlanError(
            f"a model with loops (here of {self.loops.block}) is not pickled; save its "
            "state_dict(), or call hp.detach(model) first"
        )

    def needs_loops(self, looped: LoopedForward, args: Any, kwargs: Any) -> bool:
        """Whether a call may not go without loops.

        One with a length of 1 where the graph leaves it open, for which there is no graph yet, may
        if it keeps to the budget as it is: that is cheaper to tell than to trace it.
        """
        leaves = tree_leaves((args, kwargs))
        if any(program.backward or program.traced.is_long(leaves) for program in self.programs[:1]):
            return True
        key = tuple(_words(leaf) for leaf in leaves)
        if key not in self._whole_bytes and self.programs:
            with _disable_current_modes():  # we may be on fake tensors, and counted, ourselves
                self._whole_bytes[key] = _bytes_of(looped.original, args, kwargs)
        return not self.programs or self._whole_bytes[key] > self.programs[0].budget_bytes

    def program(
        self, block: nn.Module, looped: LoopedForward, args: Any, kwargs: Any
    ) -> tuple[Program, list[Any]]:
        """The program for a call like this, and the inputs of its graph.

        A call that no graph holds for (other flags, a missing mask, another batch of 1) is traced
        and planned then, for the same budget.
        """
        inspect.signature(looped.original).bind(*args, **kwargs)  # a TypeError as without loops
        reason = ""
        for program in self.programs:
            try:
                return program, program.traced.flat_inputs(block, looped.original, args, kwargs)
            except TraceError as error:
                reason = str(error)
        with _disable_current_modes():  # we may be on fake tensors, and counted, ourselves
            return self._traced(block, looped, (args, kwargs), reason)

    def _traced(
        self, block: nn.Module, looped: LoopedForward, call: Example, reason: str
    ) -> tuple[Program, list[Any]]:
        traced = self._traced_whole if self.others else self._traced_alone
        with _with_parameters(block):
            made = traced(block, call, reason)
        return made, made.traced.flat_inputs(block, looped.original, *call)

    def _traced_alone(self, block: nn.Module, call: Example, reason: str) -> Program:
        """The program of a block as it is called now."""
        with _bare(block):
            args, kwargs = tree_map_only(FakeTensor, filled, call)
            traced = trace_block(block, args, kwargs, backward=self.loops.backward)
        if not self.programs:
            made = self._restored(traced)
        else:
            first = self.programs[0]
            flat = traced.flat_inputs(block, type(block).forward.__get__(block), *call)
            _log.info("planning the loops of %s again: %s", traced.name, reason)
            make = _keeping_no_more if first.backward else _within
            made = make(first, Search.of(traced), flat)
            made.entry_bytes = first.entry_bytes
        self._add(made)
        return made

    def _restored(self, traced: Traced) -> Program:
        try:
            return program_of(traced, self.loops)
        except PlanError:
            if self.drop is not None:
                self.drop()  # else the next plan would be this one again
            raise

    def _traced_whole(self, model: nn.Module, call: Example, reason: str) -> Program:
        """The programs of a model and its blocks, as the model is called now."""
        if self.programs:
            _log.info("planning the loops of %s again: %s", type(model).__name__, reason)
            with _bare(model):
                again = fit_training if self.loops.backward else fit
                fitted = again(
                    model,
                    call,
                    self.loops.budget_bytes,
                    speeds=self.programs[0].speeds,
                    progress=_log.debug,
                )
            programs = fitted.programs
            if "" not in programs:
                raise PlanError(f"this {type(model).__name__} is called otherwise: {reason}")
        else:
            with _bare(model):
                loops = self.loops
                graphs = Graphs(model, call, loops.budget_bytes, backward=loops.backward)
                graphs.look_inside()
                graphs.look_around()
            if graphs.around is None:
                raise PlanError(f"{type(model).__name__} cannot be traced: {graphs.left['']}")
            programs = {"": self._restored(graphs.around)}
            for path, shared in self.others.items():
                programs[path] = shared._restored(graphs.traced[path])
        for path, shared in self.others.items():
            if path in programs:
                shared._add(programs[path])
        self._add(programs[""])
        return programs[""]


def _words(leaf: Any) -> str:
    """The same for arguments with which a block holds the same."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()}"


def _bytes_of(forward: Callable[..., Any], args: Any, kwargs: Any) -> float:
    """What a forward holds, from a run on fake tensors; infinite where that cannot be told."""
    try:
        return measure(forward, args, kwargs).peak_bytes
    except (DataDependentOutputException, DynamicOutputShapeException):
        return inf


def _within(first: Program, search: Search, flat: Sequence[Any]) -> Program:
    """A program for another call of a block, under the same budget."""
    return make_program(search, first.budget_bytes, flat, first.speeds)


def _keeping_no_more(first: Program, search: Search, flat: Sequence[Any]) -> Program:
    """The same for training, where what a block keeps is alive while others run.

    All its arguments count as needing gradients: those of the same block elsewhere may.

    Raises:
        MemoryBudgetError: there is none that keeps as little.
    """
    ports = zip(flat, search.traced.inputs, strict=True)
    flat = [_with_gradient(x) if port.kind == "given" else x for x, port in ports]
    budget = first.peak_bytes or first.budget_bytes
    while True:
        made = make_training_program(search, budget, flat, first.speeds)
        if not isinstance(first, TrainingProgram) or _keeps(made) <= _keeps(first):
            return made
        budget = int(_LESS * min(budget, made.peak_bytes))


def _with_gradient(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _keeps(program: TrainingProgram) -> int:
    return program.kept.kept_bytes + program.kept.output_bytes


@contextmanager
def _with_parameters(model: nn.Module) -> Iterator[None]:
    """While the block lasts, parameters where shapes alone stand for them, as in an estimate."""
    swapped: list[tuple[dict[str, Any], str, FakeTensor]] = [
        (held, name, tensor)
        for part in model.modules()
        for held in (vars(part)["_parameters"], vars(part)["_buffers"])
        for name, tensor in held.items()
        if isinstance(tensor, FakeTensor)
    ]
    owned = {id(tensor) for part in model.modules() for tensor in part._parameters.values()}
    solid = {id(tensor): filled(tensor) for _, _, tensor in swapped}  # one for all that share it
    for key, flag in {id(tensor): tensor.requires_grad for _, _, tensor in swapped}.items():
        if key in owned:
            solid[key] = nn.Parameter(solid[key], flag)
    for held, name, tensor in swapped:
        held[name] = solid[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The model without loops while the block lasts."""
    looped = {
        module: module.__dict__.pop("forward")
        for module in model.modules()
        if isinstance(module.__dict__.get("forward"), LoopedForward)
    }
    try:
        yield
    finally:
        for module, forward in looped.items():
            module.__dict__["forward"] = forward


def program_of(traced: Traced, loops: BlockLoops) -> Program:
    """A program from its description.

    Raises:
        PlanError: the graph is not the one that was planned for.
    """
    if traced.digest != loops.graph:
        raise PlanError(
            f"this plan's loops are for another {loops.block} than this one: its operations are "
            "others (another version of the model's code, of torch, or other settings); plan again"
        )
    if not loops.backward:
        return restored(traced, loops)
    if len(loops.kept) != len(fields(Kept)) or len(loops.loop_peaks) != len(loops.loops):
        raise PlanError(
            f"this plan does not say what the loops of {loops.block} keep for a backward, so they "
            "cannot be fitted to other lengths; make it again with hp.plan"
        )
    kept, peaks = Kept(*loops.kept), loops.loop_peaks
    return restored(traced, loops, TrainingProgram, kept=kept, loop_peaks=peaks)


def attach_loops(
    model: nn.Module,
    blocks: Sequence[BlockLoops],
    programs: Mapping[str, Program],
    *,
    compile_bodies: bool = False,
    drop: Callable[[], None] | None = None,
) -> None:
    """Give every planned block its loops.

    Args:
        drop: takes a plan that turns out to be stale out of the cache.

    Raises:
        PlanError: the model lacks a block, or its forward is replaced already.
    """
    modules = dict(model.named_modules())
    paths = tuple(path for loops in blocks for path in loops.modules)
    for path in paths:
        _require_own_forward(model, modules, path)
    everything: dict[str, Shared] = {}
    for loops in blocks:
        program = programs.get(loops.modules[0])
        for path, known in (program.stamps if program is not None else {}).items():
            if stamp(modules[path]) != known:
                raise PlanError(_changed(loops.block))
        shared = Shared(loops, program, compile_bodies=compile_bodies, drop=drop)
        everything[loops.modules[0]] = shared
        for path in loops.modules:
            block = modules[path]
            block.__dict__["forward"] = LoopedForward(block, loops, shared)
    if "" in everything:
        everything[""].others = {path: each for path, each in everything.items() if path}
    elif everything:
        model.register_forward_pre_hook(RequireLoops(paths), prepend=True)


def _require_own_forward(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> None:
    """Raise unless a model has this module, whose forward nobody has replaced."""
    if path not in modules:
        raise PlanError(
            f"this plan gives loops to module '{path}', which {type(model).__name__} does not "
            "have; make a plan for this model"
        )
    if "forward" in vars(modules[path]):
        raise PlanError(
            f"the forward of module '{path}' is replaced already (by another library?); take that "
            "off first"
        )


@dataclass(frozen=True)
class RequireLoops:
    """Before a model's forward: its planned blocks are still those that were given loops."""

    paths: tuple[str, ...]

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Raise PlanError where one has been replaced, and would run without its loops."""
        for path in self.paths:
            if not isinstance(vars(model.get_submodule(path)).get("forward"), LoopedForward):
                raise PlanError(
                    f"module '{path}' has been replaced since it was planned, and has no loops; "
                    "hp.detach the model and plan again"
                )


def detach_loops(model: nn.Module) -> None:
    """Give every block its own forward back."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, RequireLoops):
            del model._forward_pre_hooks[key]
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), LoopedForward):
            del module.__dict__["forward"]
