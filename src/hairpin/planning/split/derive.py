"""Finding the attends table of a model that comes without one.

The model runs once on shapes alone. In every module the flow of dims says which of them it computes
along (:mod:`hairpin.graph.flow`); a stage is the largest module that leaves a dim free which others
compute along. Dims that parameters carry are channels: every module computes along them.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from hairpin.errors import PlanError
from hairpin.graph.dims import first_fault
from hairpin.graph.flow import Call, Flow, Group, Trace, recording
from hairpin.graph.trace import fake_inputs
from hairpin.layout import Pattern
from hairpin.planning.example import Example, as_example, plainly
from hairpin.planning.plan import CarriedTensor, Plan, Stage
from hairpin.planning.split.rehearse import quiet_fakes, rehearse
from hairpin.planning.split.seam import Attends, Seam, Table, bind, match_table

Groups = tuple[Group, ...]


def derive_attends(model: nn.Module, example: Any, *, ranks: int = 2) -> Attends:
    """The table that says which module computes along which dim, from runs on shapes alone.

    Every stage is rehearsed on a part of each dim that the flow finds free, as one of ``ranks``
    would run it; where that goes wrong (a length written down as a number, say) the dim is taken as
    one that it computes along.

    Names: ``b`` the first dim of the model's input, ``c`` channels; the dims that some stage
    computes along ``s``, or ``t s``, or ``t h w``, or ``d0 d1 ...``, in the order in which the
    first stage has them; ``l`` any other. A dim of length 1 is written ``1``: give an example
    longer than 1 wherever inputs may be.

    Args:
        model: in the mode it will run; may lie on the meta device.
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        ranks: number of ranks to rehearse for.

    Returns:
        module path -> :class:`~hairpin.Seam`, parameter name -> pattern, ``""`` -> patterns of the
        model's arguments, as ``hp.plan(attends=...)`` takes it.

    Raises:
        PlanError: the model does not run on the example, an argument is empty, or there is no dim
            that one module computes along and another leaves free; says what computes along what.
    """
    given = as_example(example)
    _require_positive(model, given)
    survey = _Survey(type(model).__name__, _traced(model, given))
    paths = list(dict(model.named_modules()))
    table = survey.table()
    while True:
        attends = _written(table, paths)
        wrong = _wrong(model, given, table, attends, ranks)
        if not wrong:
            return attends
        table = survey.without(table, wrong)


# ---------------------------------------------------------------------------------------- the run


def _require_positive(model: nn.Module, example: Example) -> None:
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        raise PlanError(
            f"the example for {type(model).__name__} holds no tensor, so there is no dim to split; "
            "give the arguments of one forward"
        )
    for tensor in tensors:
        if not tensor.numel():
            raise PlanError(
                f"the example has an empty tensor of shape {tuple(tensor.shape)}, whose dims "
                "cannot be told apart; give one without dims of length 0"
            )


def _traced(model: nn.Module, example: Example) -> Trace:
    """One recorded run: with a batch of 1 doubled where the model takes that, else as given.

    A dim of length 1 cannot be followed, since any length may be laid beside it.
    """
    wider = _widened(example)
    if wider is not None:
        try:
            return _record(model, wider)
        except PlanError:
            pass
    return _record(model, example)


def _widened(example: Example) -> Example | None:
    """The example with each tensor whose first dim is 1 twice in it; None for a longer one."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not (tensors[0].dim() and tensors[0].shape[0] == 1):
        return None

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x

    wider: Example = tree_map_only(Tensor, twice, example)
    return wider


def _record(model: nn.Module, example: Example) -> Trace:
    """The run on fake tensors, or for real where the model reads values of its input.

    Raises:
        PlanError: the model cannot run on the example.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    try:
        with quiet_fakes(), fake_inputs(example, device) as inputs:
            return _run(model, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if device.type == "meta":
            raise PlanError(
                f"{type(model).__name__} reads values of its input ({error}), so its dims cannot "
                "be followed on the meta device; build it with real parameters, or give attends"
            ) from error
        return _run(copy.deepcopy(model), example)


def _run(model: nn.Module, example: Example) -> Trace:
    args, kwargs = example
    with torch.no_grad(), plainly(), recording(model, bind) as trace:
        try:
            model(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            line = str(error).strip().partition("\n")[0]
            raise PlanError(
                f"{type(model).__name__} failed on the example: {type(error).__name__}: {line}. "
                "Give one that the model runs"
            ) from error
    return trace


# ------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class _View:
    """One module call by itself: its own flow of dims, from its arguments to its outputs.

    Attributes:
        along: atoms of ``flow`` that some operation inside computes along.
        hidden: atoms of tensors inside other arguments, which no pattern can name.
    """

    call: Call
    flow: Flow
    along: frozenset[int]
    hidden: frozenset[int]

    @classmethod
    def of(cls, trace: Trace, call: Call) -> "_View":
        nodes = trace.nodes[call.begin : call.end]
        flow = Flow(trace).follow(nodes)
        along = frozenset[int]().union(*(flow.along(node) for node in nodes))
        hidden = {atom for value in call.inside for atom in _flat(flow.groups(value))}
        return cls(call, flow, along, frozenset(hidden))

    @cached_property
    def stream(self) -> str | None:
        """The argument that flows through: the one that shares most dims with the first output."""
        if self.call.outputs is None or self.call.outputs[0] is None:
            return None
        out = set(_flat(self.flow.groups(self.call.outputs[0])))
        channels = self.flow.channels
        shared = {
            name: len(out & set(_flat(self.flow.groups(value))) - channels)
            for name, value in self.call.args.items()
        }
        best = max(shared, key=lambda name: shared[name], default=None)
        return best if best is not None and shared[best] else None

    @cached_property
    def values(self) -> tuple[int, ...]:
        """Arguments, outputs, and parameters used inside."""
        trace = self.flow.trace
        used = {v for node in trace.nodes[self.call.begin : self.call.end] for v in node.inputs}
        outputs = [v for v in self.call.outputs or () if v is not None]
        tensors = sorted(v for v in used if v in trace.names)
        return tuple(dict.fromkeys([*self.call.args.values(), *outputs, *tensors]))

    def free(self) -> set[tuple[int, int]]:
        """Places (dim, place in it) of the stream that the module may run on a part of."""
        if self.stream is None or self.call.outputs is None or self.call.outputs[0] is None:
            return set()
        groups = self.flow.groups(self.call.args[self.stream])
        out = Counter(_flat(self.flow.groups(self.call.outputs[0])))
        mine = Counter(_flat(groups))
        return {
            (dim, place)
            for dim, group in enumerate(groups)
            for place, atom in enumerate(group)
            if atom not in self.along | self.hidden and mine[atom] == 1 == out[atom]
        }


def _flat(groups: Iterable[Group]) -> list[int]:
    return [atom for group in groups for atom in group]


@dataclass
class _Survey:
    """The whole run, and the choice of stages in it."""

    model: str
    trace: Trace
    views: dict[int, _View] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    long: frozenset[int] = frozenset()
    is_fine: bool = False

    def view(self, call: Call) -> _View:
        """The call by itself, worked out once."""
        if id(call) not in self.views:
            self.views[id(call)] = _View.of(self.trace, call)
        return self.views[id(call)]

    @cached_property
    def whole(self) -> Flow:
        """The flow of dims through everything."""
        return Flow(self.trace).follow(self.trace.nodes)

    @cached_property
    def runs(self) -> Counter[str]:
        """How often each module runs."""
        return Counter(call.path for call in self.trace.root.walk())

    def stages(self) -> list[Call]:
        """The stages, in the order they run.

        First every dim counts that any operation computes along, then only those that a stage found
        so computes along, until no dim drops out.
        """
        found = frozenset[int]().union(*(self.whole.along(node) for node in self.trace.nodes))
        self.long = found - self.whole.channels
        while True:
            calls = [c for child in self.trace.root.children for c in self.choose(child)]
            known = self.long & self.bracketed(calls)
            if known == self.long:
                return sorted(calls, key=lambda call: call.begin)
            self.long = known

    def table(self) -> "_Table":
        """The stages that matter, with names for their dims.

        Raises:
            PlanError: there are none.
        """
        while True:
            stages = self.stages()
            between = _Between(self, stages)
            kept = between.kept()
            if not kept and not self.is_fine:
                self.is_fine = True  # blocks that cannot be split: look for what can inside them
                continue
            if not kept:
                raise PlanError(self.reason(_Table(between).lines()))
            table = _Table(_Between(self, kept))
            unlike = self.partly(kept) | table.unlike()
            if unlike <= self.skipped:
                return table
            self.skipped |= unlike

    def without(self, table: "_Table", wrong: Iterable[tuple[int, Group]]) -> "_Table":
        """The table with a stage's unit of dims in brackets for each of ``wrong``.

        Raises:
            PlanError: then no dim is left that could be split.
        """
        forced = {index: set(atoms) for index, atoms in table.forced.items()}
        for index, unit in wrong:
            kind = general(table.faces[index].call.path)
            for other, face in enumerate(table.faces):
                if general(face.call.path) == kind:
                    forced.setdefault(other, set()).update(unit)
        changed = _Table(table.between, forced)
        if not changed.core:
            raise PlanError(self.reason(changed.lines()))
        return changed

    def partly(self, stages: Sequence[Call]) -> set[str]:
        """Paths of stages that also run elsewhere than as a stage."""
        listed = Counter(call.path for call in stages)
        return {path for path, count in listed.items() if count != self.runs[path]}

    def choose(self, call: Call) -> Iterator[Call]:
        """The stages in a call: itself, or those of the calls inside it."""
        view = self.view(call)
        is_usable = view.stream is not None and call.path not in self.skipped
        if is_usable and self.splittable(view):
            if self.is_dropout(call) or self.works(call) or self.computes_along(call):
                yield call
        elif not is_usable or any(map(self.is_worth, call.walk())):
            for child in call.children:
                yield from self.choose(child)
        elif self.computes_along(call):
            yield call

    def is_dropout(self, call: Call) -> bool:
        """Whether a call is a dropout's only one, so that a line can tell the dims of its mask."""
        return call.path in self.trace.dropouts and self.runs[call.path] == 1

    def is_worth(self, call: Call) -> bool:
        """Whether a call is reason enough to look into the one around it, which cannot be split.

        It can be split and computes along something else; or just works, where nothing is gained
        without. One linear map is no reason: it does less than moving its tensors takes.
        """
        if not call.children or not self.splittable(self.view(call)):
            return False
        return self.computes_along(call) or (self.is_fine and self.works(call))

    def splittable(self, view: _View) -> bool:
        """Whether some dim that others compute along stays free."""
        if view.stream is None or view.call.path in self.skipped:
            return False
        return bool(self.outside(view, view.free()) & self.long)

    def bracketed(self, calls: Iterable[Call]) -> frozenset[int]:
        """Atoms of ``whole`` in the streams of these calls along which they compute."""
        found = frozenset[int]()
        for view in map(self.view, calls):
            assert view.stream is not None
            places = {
                (dim, place)
                for dim, group in enumerate(view.flow.groups(view.call.args[view.stream]))
                for place, atom in enumerate(group)
                if atom in view.along
            }
            found |= self.outside(view, places)
        return found

    def outside(self, view: _View, places: Iterable[tuple[int, int]]) -> frozenset[int]:
        """Atoms of ``whole`` for places in the stream of one call by itself."""
        assert view.stream is not None
        value = view.call.args[view.stream]
        own, groups = view.flow.groups(value), self.whole.groups(value)
        return frozenset(
            atom
            for dim, place in places
            for atom in self.under(own[dim], place, view.flow, groups[dim])
        )

    def under(self, own: Group, place: int, flow: Flow, whole: Group) -> Group:
        """The atoms of ``whole`` that atom ``place`` of one dim stands for."""
        inner = flow.atoms.length(own[place + 1 :])
        outer = inner * flow.atoms.length(own[place : place + 1])
        found, behind = [], self.whole.atoms.length(whole)
        for atom in whole:
            if inner < behind <= outer:
                found.append(atom)
            behind //= self.whole.atoms.sizes[atom]
        return tuple(found)

    def computes_along(self, call: Call) -> bool:
        """Whether a call computes along a dim that is not of channels."""
        nodes = self.trace.nodes[call.begin : call.end]
        return any(self.whole.along(node) & self.long for node in nodes)

    def works(self, call: Call) -> bool:
        """Whether a call does products on a tensor along a long dim: worth splitting."""
        return any(
            {a for v in node.inputs for a in _flat(self.whole.groups(v))} & self.long
            for node in self.trace.nodes[call.begin : call.end]
            if len(node.inputs) > 1 and any(axis.sums for axis in node.axes)
        )

    def reason(self, lines: Sequence[str]) -> str:
        """Why there is no table."""
        listed = "; ".join(lines) or "no module computes along any dim but the channels"
        return (
            f"{self.model} has no dim that one module computes along and another leaves free, so "
            f"no split can be derived: {listed}. Split the batch instead, or give a table with "
            "attends"
        )


# -------------------------------------------------------------------------------------- the names

_LONG_NAMES = (("s",), ("t", "s"), ("t", "h", "w"))
_NOWHERE = 10**9


@dataclass(frozen=True)
class _Interface:
    """What a stage shows: atoms of the flow between stages, by dim of each value.

    Attributes:
        along: atoms that the stage computes along; ``hidden``: that it needs whole for another
            reason.
        args: groups of the other arguments; ``outputs``: of each output, None where nothing outside
            uses it; ``tensors``: of parameters used inside.
    """

    call: Call
    stream_arg: str
    along: frozenset[int]
    hidden: frozenset[int]
    stream: Groups
    args: Mapping[str, Groups]
    outputs: tuple[Groups | None, ...]
    tensors: Mapping[int, Groups]

    @property
    def values(self) -> list[Groups]:
        """All that a pattern may be written for."""
        shown = [groups for groups in self.outputs if groups is not None]
        return [self.stream, *self.args.values(), *shown]

    def free(self) -> set[int]:
        """Atoms that the stage may hold split."""
        out = set(_flat(self.outputs[0] or ()))
        return {a for a in _flat(self.stream) if a in out} - self.along - self.hidden


class _Between:
    """The flow of dims between chosen stages, each of them taken as one operation."""

    def __init__(self, survey: _Survey, stages: Sequence[Call]) -> None:
        self.survey, self.trace, self.stages = survey, survey.trace, stages
        self.flow = Flow(self.trace)
        self._last_use = {v: i for i, node in enumerate(self.trace.nodes) for v in node.inputs}
        self._last_use |= dict.fromkeys(self.trace.results, _NOWHERE)
        bridged, position = [], 0
        for call in stages:
            self.flow.follow(self.trace.nodes[position : call.begin])
            bridged.append(self._bridge(survey.view(call)))
            position = call.end
        self.flow.follow(self.trace.nodes[position:])
        self.channels = self.flow.channels
        self.interfaces = [
            self._interface(survey.view(call), tuple(_flat(along)), tuple(_flat(hidden)))
            for call, (along, hidden) in zip(stages, bridged, strict=True)
        ]

    def _is_used(self, value: int, after: int) -> bool:
        return self._last_use.get(value, -1) >= after

    def _shown(self, view: _View) -> list[int]:
        """Values of a stage that code outside gives or takes, and parameters used inside."""
        extras = (view.call.outputs or ())[1:]
        unused = {v for v in extras if v is not None and not self._is_used(v, view.call.end)}
        return [v for v in view.values if v not in unused]

    def _bridge(self, view: _View) -> tuple[list[Group], list[Group]]:
        """Tie what goes in to what comes out as the stage by itself does.

        Gives the groups that it computes along, and those that must be whole for another reason.
        """
        atoms = self.flow.atoms
        along: list[Group] = []
        hidden: list[Group] = []
        outer: dict[tuple[int, int], Group] = {}
        for value in self._shown(view):
            seen: Counter[int] = Counter()
            here = self.flow.groups(value)
            for dim, group in enumerate(view.flow.groups(value)):
                keys = []
                for atom in group:
                    keys.append((atom, seen[atom]))
                    seen[atom] += 1
                for key in keys:
                    outer.setdefault(key, atoms.new(view.flow.atoms.sizes[key[0]]))
                atoms.tie(here[dim], tuple(a for key in keys for a in outer[key]))
        for (atom, again), group in outer.items():
            if atom in view.along or again or (atom, 1) in outer:
                along.append(group)
            if atom in view.hidden:
                hidden.append(group)
            if atom in view.flow.channels:
                self.flow.mark_channels(group)
        return along, hidden

    def _interface(self, view: _View, along: Group, hidden: Group) -> _Interface:
        call = view.call
        assert view.stream is not None
        assert call.outputs is not None
        shown = set(self._shown(view))
        groups = self.flow.groups
        return _Interface(
            call,
            view.stream,
            frozenset(self.flow.atoms.leaves(along)) - self.channels,
            frozenset(self.flow.atoms.leaves(hidden)) - self.channels,
            groups(call.args[view.stream]),
            {n: groups(v) for n, v in call.args.items() if n != view.stream},
            tuple(groups(v) if v in shown and v is not None else None for v in call.outputs),
            {v: groups(v) for v in shown if v in self.trace.names},
        )

    def kept(self) -> list[Call]:
        """The stages that matter: from the first that computes along a dim others leave free."""
        bracketed = frozenset[int]().union(*(face.along for face in self.interfaces))
        free = set[int]().union(*(face.free() for face in self.interfaces))
        core = (bracketed & free) - self.channels
        at_core = [f.call for f in self.interfaces if f.along & core]
        if not at_core:
            return []
        first = next((c for c in at_core if self.survey.works(c)), at_core[0]).begin
        last = at_core[-1].begin
        inner = [f for f in self.interfaces if first < f.call.begin < last and f.free() & core]
        if not inner and not self.survey.is_fine:
            return []
        late = {general(f.call.path) for f in self.interfaces if f.call.begin >= first}
        return [
            face.call
            for face in self.interfaces
            if general(face.call.path) in late and core & {a for v in face.values for a in _flat(v)}
        ]


def general(path: str) -> str:
    """A path with a star for each number in it."""
    return ".".join("*" if word.isdigit() else word for word in path.split("."))


@dataclass
class _Table:
    """Names for the dims, and the table written with them."""

    between: _Between
    forced: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trace, self.channels = self.between.trace, self.between.channels
        self.faces = self.between.interfaces
        self.core = self._core()
        self.places: dict[int, int] = {}
        self.tensors = self._carried()
        self.units = self._units()
        self.merged: set[Group] = set()  # groups whose parts no shape tells, taken as one dim
        while (group := self._undetermined()) is not None:
            self.merged.add(group)
        self.names = self._names()

    def _along(self, index: int) -> frozenset[int]:
        face = self.faces[index]
        return face.along | face.hidden | self.forced.get(index, set())

    def _core(self) -> set[int]:
        bracketed = frozenset[int]().union(*(face.along for face in self.faces))
        bracketed |= set().union(*self.forced.values())
        free = (face.free() - self._along(i) for i, face in enumerate(self.faces))
        return set(bracketed & set[int]().union(*free))

    def unlike(self) -> set[str]:
        """Modules whose calls differ, so that one line of a table cannot tell of all."""
        seams: dict[str, Seam] = {}
        found = set()
        for index, face in enumerate(self.faces):
            if seams.setdefault(face.call.path, self.seam(index)) != self.seam(index):
                found.add(face.call.path)
        return found

    def _carried(self) -> dict[int, Groups]:
        """Parameters along a dim that may be split where they are used.

        One that is used at several places cannot be in two states, so the stages among those are
        made to compute along its dims.
        """
        found: dict[int, Groups] = {}
        for value in self.trace.names:
            groups = self.between.flow.groups(value)
            dims = set(_flat(groups)) & self.core
            places = self._places(value) if dims else set()
            free = {p for p in places if p % 2 == 0 or dims - self._along(p // 2)}
            if len(free) == 1 and free != {0} and len(places) == 1:
                found[value], self.places[value] = groups, places.pop()
            else:
                for place in free:
                    if place % 2:
                        self.forced.setdefault(place // 2, set()).update(dims)
        return found

    def _places(self, value: int) -> set[int]:
        """Where a value is used: 2 i before stage i, 2 i + 1 in it."""
        found = set()
        for position, node in enumerate(self.trace.nodes):
            if value in node.inputs:
                begun = sum(face.call.begin <= position for face in self.faces)
                ended = sum(face.call.end <= position for face in self.faces)
                found.add(begun + ended)
        return found

    def _units(self) -> dict[int, Group]:
        """Atom -> the run of atoms that always stand together, and alike in brackets."""
        groups = [g for face in self.faces for value in face.values for g in value]
        groups += [g for value in self.tensors.values() for g in value]
        after: dict[int, set[int | None]] = {}
        before: dict[int, set[int | None]] = {}
        for group in groups:
            for x, y in pairwise((None, *group, None)):
                if x is not None:
                    after.setdefault(x, set()).add(y)
                if y is not None:
                    before.setdefault(y, set()).add(x)
        units: dict[int, Group] = {atom: (atom,) for atom in after}
        for x, followers in after.items():
            y = next(iter(followers)) if len(followers) == 1 else None
            if y is not None and before[y] == {x} and y != x and self._are_alike(x, y):
                joined = units[x] + units[y]
                if len(set(joined)) == len(joined):
                    units |= dict.fromkeys(joined, joined)
        return units

    def _are_alike(self, x: int, y: int) -> bool:
        both = all((x in self._along(i)) == (y in self._along(i)) for i, _ in enumerate(self.faces))
        return both and (x in self.channels) == (y in self.channels)

    def _undetermined(self) -> Group | None:
        """A group of which two dims are still unknown where a forward meets it."""
        known: set[Group] = set()
        for value in self.trace.root.args.values():
            for group in self.between.flow.groups(value):
                known |= set(new if len(new := self._unknown(group, known)) == 1 else ())
        for face in self.faces:
            groups = [g for value in face.values for g in value]
            while True:
                left = [self._unknown(group, known) for group in groups]
                found = {new[0] for new in left if len(new) == 1}
                known |= found
                if not found:
                    break
            for group in groups:
                if len(self._unknown(group, known)) > 1:
                    return group
        return None

    def _unknown(self, group: Group, known: set[Group]) -> list[Group]:
        return [unit for unit in self._split(group) or () if unit not in known]

    def _names(self) -> dict[Group, str]:
        """A name for each unit, in the order in which the patterns have them."""
        patterns = [value for face in self.faces for value in face.values]
        patterns += self.tensors.values()
        split = (self._split(group) or () for value in patterns for group in value)
        units = dict.fromkeys(unit for run in split for unit in run)
        along = {
            atom
            for place, face in enumerate(self.faces)
            for atom in _flat(face.stream)
            if atom in self._along(place)
        }
        long = [unit for unit in units if along.intersection(unit)]
        words = dict(zip(long, self._long_names(len(long)), strict=True))
        names: dict[Group, str] = {}
        channels: dict[int, str] = {}  # never split, and as long in every run: one name a length
        for unit in units:
            is_channel = self.channels.issuperset(unit)
            length = self.between.flow.atoms.length(unit)
            if is_channel and length in channels:
                names[unit] = channels[length]
                continue
            default = "c" if is_channel else "b" if self._is_batch(unit) else "l"
            names[unit] = _fresh(words.get(unit, default), names.values())
            if is_channel:
                channels[length] = names[unit]
        return names

    def _long_names(self, count: int) -> Sequence[str]:
        if 0 < count <= len(_LONG_NAMES):
            return _LONG_NAMES[count - 1]
        return [f"d{place}" for place in range(count)]

    def _is_batch(self, unit: Group) -> bool:
        """Whether a unit is the first dim of the model's first argument."""
        first = next(iter(self.trace.root.args.values()), None)
        groups = self.between.flow.groups(first) if first is not None else ()
        return bool(groups) and groups[0] == unit

    def render(self, value: Groups, along: frozenset[int] | set[int] = frozenset()) -> str:
        """The pattern of a value."""
        seen: Counter[str] = Counter()
        words = []
        for group in value:
            run = [self._word(unit, along, seen) for unit in self._split(group) or ()]
            words.append("1" if not run else run[0] if len(run) == 1 else f"({' '.join(run)})")
        return " ".join(words)

    def _word(self, unit: Group, along: frozenset[int] | set[int], seen: Counter[str]) -> str:
        name = self.names[unit]
        seen[name] += 1
        name += f"_{seen[name]}" if seen[name] > 1 else ""
        return f"[{name}]" if not along.isdisjoint(unit) else name

    def _split(self, group: Group) -> list[Group] | None:
        """A group as whole units, or None where it is not made of such."""
        if group in self.merged:
            return [group]
        found, place = [], 0
        while place < len(group):
            unit = self.units.get(group[place])
            if unit is None or group[place : place + len(unit)] != unit:
                return None
            found.append(unit)
            place += len(unit)
        return found

    def seam(self, index: int) -> Seam:
        """The seam of one call."""
        face = self.faces[index]
        stream = self.render(face.stream, self._along(index))
        args = {
            name: self.render(value)
            for name, value in face.args.items()
            if set(_flat(value)) & set(_flat(face.stream)) - self.channels
        }
        outputs = [None if value is None else self.render(value) for value in face.outputs]
        is_first = next(iter(face.call.args)) == face.stream_arg
        same = outputs == [self.render(face.stream)]
        return Seam(
            stream,
            args,
            None if same else outputs[0] if len(outputs) == 1 else tuple(outputs),
            None if is_first else face.stream_arg,
        )

    def inputs(self) -> dict[str, str]:
        """Patterns of the model's own arguments, where merged dims need them to be told apart."""
        values = [value for face in self.faces for value in face.values]
        values += self.tensors.values()
        if all(len(self._split(group) or ()) < 2 for value in values for group in value):
            return {}
        taken, known = list(self.names.values()), set[Group]()
        found = {}
        for name, value in self.trace.root.args.items():
            words = []
            for group in self.between.flow.groups(value):
                new = self._unknown(group, known)
                if self._split(group) and len(new) < 2:
                    known |= set(new)
                    words.append(self.render((group,)))
                else:
                    words.append(_fresh("x", taken))
                    taken.append(words[-1])
            if not set(words).isdisjoint(self.names.values()) and len(set(words)) == len(words):
                found[name] = " ".join(words)
        return found

    def holds(self, index: int, unit: Group) -> bool:
        """Whether a stage may run on a part of a unit, as its seam says."""
        face = self.faces[index]
        groups = [self._split(group) or () for group in face.stream]
        last = groups[-1] if groups else ()
        is_free = (face.free() - self._along(index)).issuperset(unit)
        return is_free and any(unit in run for run in groups) and unit not in last

    def lines(self) -> list[str]:
        """What each kind of stage computes along, for messages."""
        found = {}
        for index, face in enumerate(self.faces):
            dims = [n for u, n in self.names.items() if not self._along(index).isdisjoint(u)]
            found[general(face.call.path)] = ", ".join(dims) or "nothing"
        return [f"'{path}' computes along {dims}" for path, dims in found.items()]


def _fresh(word: str, taken: Iterable[str]) -> str:
    """``word``, with a number behind it where it is taken."""
    used, count = set(taken), 1
    while (name := word if count == 1 else f"{word}{count}") in used:
        count += 1
    return name


def _written(table: _Table, order: Sequence[str]) -> Attends:
    """The table with stars where all modules of a kind are alike."""
    inputs = table.inputs()
    found: dict[str, Any] = {"": inputs} if inputs else {}
    seams = {face.call.path: table.seam(index) for index, face in enumerate(table.faces)}
    found |= _starred({path: seams[path] for path in order if path in seams}, order)
    tensors = {table.trace.names[v]: table.render(g) for v, g in table.tensors.items()}
    return found | _starred(tensors, list(table.trace.names.values()))


def _starred(entries: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    found = {}
    for path, entry in entries.items():
        alike = [entries.get(other) for other in order if general(other) == general(path)]
        found[general(path) if all(other == entry for other in alike) else path] = entry
    return found


# ---------------------------------------------------------------------------------- the rehearsals


def _wrong(
    model: nn.Module, example: Example, table: _Table, attends: Attends, ranks: int
) -> set[tuple[int, Group]]:
    """Stages, and units of dims of which they cannot run on a part, though the flow says so.

    Each dim is rehearsed by itself: every stage that may hold it split does, and all between them
    is whole.
    """
    matched = match_table(model, attends)
    whole = rehearse(model, example, matched)
    found: set[tuple[int, Group]] = set()
    if [call.module for call in whole.calls] != [face.call.path for face in table.faces]:
        return found  # a batch of 1 goes another way than one of 2; left to the planner
    for unit in table.names:
        length = table.between.flow.atoms.length(unit)
        if table.core.isdisjoint(unit):
            continue
        for degree in sorted({min(ranks, length), ranks}):
            trial = _trial(model, table, matched, unit, ranks=degree)
            run = rehearse(model, example, matched, trial, rank=degree - 1)
            fault = run.fault
            if fault is None and degree <= length:  # of nothing, nothing can come out wrong
                fault = first_fault(whole.ops(model), run.ops(model))
            if fault is not None:
                begun, ended = fault.place
                index = ended if begun > ended else max(ended - 1, 0)
                if table.holds(index, unit):
                    found.add((index, unit))
                    break
    return found


def _trial(model: nn.Module, table: _Table, matched: Table, unit: Group, *, ranks: int) -> Plan:
    """The plan that splits one dim in every stage that may hold it, and nowhere between."""
    name = table.names[unit]
    held = [name if table.holds(i, unit) else None for i, _ in enumerate(table.faces)]
    stages = [
        Stage(face.call.path, matched.seams[face.call.path], None, state, None)
        for face, state in zip(table.faces, held, strict=True)
    ]
    tensors = []
    for value, place in table.places.items():
        path = table.trace.names[value]
        pattern = matched.tensors[path]
        is_part = place % 2 and held[place // 2] in Pattern.parse(pattern).dims
        tensors.append(CarriedTensor(path, pattern, name if is_part else None))
    return Plan(
        model=type(model).__name__,
        fingerprint="",
        axis="sp",
        degree=ranks,
        sizes={},
        lengths=(),
        manners=(),
        inputs=matched.inputs,
        training=model.training,
        draws=False,
        stages=tuple(stages),
        tensors=tuple(tensors),
    )
