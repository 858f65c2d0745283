"""A plan: which dim each stage of a model holds split. Frozen, printable, saved as TOML."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tomli_w
from torch import nn

from hairpin.errors import LayoutError, OutputError, PlanError
from hairpin.layout import Pattern
from hairpin.planning.loops.data import BlockLoops, explain_loops, loops_from, names_of
from hairpin.planning.split.seam import Seam
from hairpin.units import format_bytes, format_time

VERSION = 2
OutputGrad = Literal["replicated", "partial"]


@dataclass(frozen=True)
class Move:
    """One change of layout of one tensor, as predicted for the busiest rank.

    Attributes:
        what: the tensor, ``"stream"`` or an argument's or output's name.
        before: whether it happens before the module runs (else after).
        src, dst: layouts as text.
        bytes_by_rank: payload bytes that each rank sends in the forward.
        time_s: predicted seconds.
    """

    what: str
    before: bool
    src: str
    dst: str
    bytes_by_rank: tuple[int, ...]
    time_s: float

    @property
    def bytes(self) -> int:
        """Payload bytes that the busiest rank sends."""
        return max(self.bytes_by_rank)


@dataclass(frozen=True)
class Stage:
    """One listed module: the dim that is split when its stream arrives, while it runs, and after.

    None stands for whole.
    """

    module: str
    seam: Seam
    arrive: str | None
    held: str | None
    leave: str | None
    moves: tuple[Move, ...] = ()

    def __post_init__(self) -> None:
        seam = self.seam
        patterns = [seam.stream, *seam.args.values(), *(o for o in seam.outputs if o is not None)]
        for state in (self.arrive, self.held, self.leave):
            _require_dim(f"module '{self.module}'", state, patterns)


@dataclass(frozen=True)
class CarriedTensor:
    """A parameter or buffer along a dim: each rank uses its part where ``held`` is split."""

    name: str
    pattern: str
    held: str | None

    def __post_init__(self) -> None:
        _require_dim(f"tensor '{self.name}'", self.held, [self.pattern])


@dataclass(frozen=True)
class DropoutSite:
    """An ``nn.Dropout``: its mask is drawn by global position, whatever is split.

    ``held`` is the split dim of its input, None where that is whole.
    """

    module: str
    pattern: str
    held: str | None = None

    def __post_init__(self) -> None:
        _require_dim(f"dropout '{self.module}'", self.held, [self.pattern])


@dataclass(frozen=True)
class Plan:
    """Where one model is split over one mesh axis, and which of its blocks run as loops.

    Made by :func:`hairpin.plan` or read from TOML.

    Attributes:
        model: class name of the model.
        fingerprint: digest of the model's structure; the plan fits no other.
        axis, degree: the mesh axis split over and the number of ranks along it.
        sizes: global sizes of the example that the plan was made for; other sizes work too.
        lengths: global lengths of the split dims that were rehearsed, one mapping an example.
        manners: how the model was called in the rehearsals: its flags, texts and absent arguments.
        inputs: patterns of the model's own arguments.
        draws: whether it draws random numbers outside ``nn.Dropout``; ranks must then be seeded
            alike.
        training: whether the model was planned in ``train()``; ``eval()`` is a part of that.
        stages: listed modules in the order they run.
        tensors: parameters and buffers that carry a dim.
        dropouts: every ``nn.Dropout``.
        output_grad: what the loss is: ``"replicated"``, the same on every rank, computed from the
            model's whole output, or ``"partial"``, another on each rank.
        sent_bytes_by_rank: payload bytes that each rank sends in one forward.
        notes: splits that were cheaper and would have been wrong, with the reason.
        peak_bytes: most bytes alive in one rank's forward, parameters not counted.
        whole_peak_bytes: the same for one process without a split or loops.
        memory_bytes: the budget that the loops keep to, 0 where there was none.
        loops: of each distinct block that has any.
        left: modules that were left as they are although they hold much, with the reason.
        programs: the loops ready to run; only in the plan that was just made, not in files.
        origin: of a plan from the cache: how to take it out, and how to make it anew.
    """

    model: str
    fingerprint: str
    axis: str
    degree: int
    sizes: Mapping[str, int]
    lengths: tuple[Mapping[str, int], ...]
    manners: tuple[Mapping[str, str], ...]
    inputs: Mapping[str, str]
    training: bool
    draws: bool
    stages: tuple[Stage, ...]
    tensors: tuple[CarriedTensor, ...] = ()
    dropouts: tuple[DropoutSite, ...] = ()
    output_grad: OutputGrad = "replicated"
    sent_bytes_by_rank: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()
    peak_bytes: int = 0
    whole_peak_bytes: int = 0
    memory_bytes: int = 0
    loops: tuple[BlockLoops, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    origin: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        expected = {"model": str, "fingerprint": str, "axis": str, "degree": int, "training": bool}
        expected |= {"draws": bool, "sizes": Mapping, "inputs": Mapping, "stages": tuple}
        for name, kind in expected.items():
            value = getattr(self, name)
            wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
            if wrong or (name == "degree" and self.degree < 1):
                raise PlanError(
                    f"plan: {name} = {value!r}; it must be "
                    + ("a whole number above 0" if kind is int else f"a {kind.__name__}")
                )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the plan as a file holds it, without graphs."""
        return {**vars(self), "programs": {}, "origin": None}

    def __deepcopy__(self, memo: Any) -> "Plan":
        """A copy of a model shares its plan, which does not change."""
        return self

    @property
    def split_dims(self) -> tuple[str, ...]:
        """Dims that are split somewhere."""
        states = [d for s in self.stages for d in (s.arrive, s.held, s.leave) if d is not None]
        return tuple(dict.fromkeys(states))

    def require_lengths(self, sizes: Mapping[str, int]) -> None:
        """Raise unless the split dims have lengths that were rehearsed.

        Raises:
            PlanError: naming the lengths.
        """
        here = {dim: sizes[dim] for dim in self.split_dims if dim in sizes}
        if not any(here.items() <= dict(known).items() for known in self.lengths):
            got = ", ".join(f"{dim}={n}" for dim, n in here.items())
            known = "; ".join(", ".join(f"{d}={n}" for d, n in k.items()) for k in self.lengths)
            raise PlanError(
                f"this plan was rehearsed at lengths {known}, and this forward has {got}. Code "
                "that branches on a length may go another way there: plan with an example of these "
                "lengths too (more_examples=[...]), or attach with other_lengths=True to go on "
                "unchecked"
            )

    def require_manner(self, manner: Mapping[str, str]) -> None:
        """Raise unless the model was rehearsed with these flags, texts and absent arguments.

        Raises:
            PlanError: naming the argument.
        """
        if dict(manner) in [dict(known) for known in self.manners]:
            return
        known = self.manners[0]
        names = [n for n in {**known, **manner} if known.get(n) != manner.get(n)]
        words = ", ".join(f"{n}={manner.get(n)} instead of {known.get(n)}" for n in names)
        raise PlanError(
            f"this {self.model} is called in a way that was not rehearsed: {words}. Code may go "
            "another way there: plan with an example called like this too (more_examples=[...])"
        )

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every change of layout in one forward, in order."""
        return tuple(move for stage in self.stages for move in stage.moves)

    @property
    def switches(self) -> int:
        """Changes of layout in one forward that send bytes."""
        return sum(move.bytes > 0 for move in self.moves)

    @property
    def sent_bytes(self) -> int:
        """Payload bytes that the busiest rank sends in one forward."""
        return max(self.sent_bytes_by_rank)

    @cached_property
    def digest(self) -> str:
        """A short name for exactly this plan."""
        text = json.dumps(_data(self), sort_keys=True, default=dict)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def explain(self) -> str:
        """The plan for people: every move with layouts, bytes per rank and predicted time."""
        return _explain(self)

    def code(self) -> str:
        """The graphs with their loops as Python, for people to read.

        A plan from the cache holds none either, and is worked out again for them.

        Raises:
            PlanError: there are no loops, or the plan comes from a file, which holds no graphs.
        """
        programs = self.programs
        if not programs and self.loops and self.origin is not None:
            programs = self.origin.again().programs
        if not programs:
            raise PlanError(
                "this plan has no graphs to show: it has no loops, or it was read from a file; "
                "make it again with hp.plan"
            )
        parts = [f"# {names_of(b)}\n{programs[b.modules[0]].code()}" for b in self.loops]
        return "\n".join(parts)

    def to_toml(self) -> str:
        """The plan as TOML text."""
        return tomli_w.dumps(_without_none({"version": VERSION, **_plain(_data(self))}))

    @classmethod
    def from_toml(cls, text: str) -> "Plan":
        """Read a plan back.

        Raises:
            PlanError: not TOML, another version, or a missing or surplus field.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"this is not a plan: not valid TOML ({error})") from error
        version = data.pop("version", None)
        if version != VERSION:
            raise PlanError(
                f"plan has version {version!r}, this Hairpin reads version {VERSION}; make the "
                "plan again with hp.plan or `hairpin plan`"
            )
        try:
            return _plan(data)
        except (TypeError, KeyError, AttributeError, LayoutError) as error:
            raise PlanError(f"this is not a whole plan: {error}; make it again") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_toml())
        except OSError as error:
            raise OutputError(
                f"cannot write the plan to {path}: {error.strerror or error}; choose another path"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan from a TOML file.

        Raises:
            PlanError: no such file, or not a plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read a plan from {path}: {error}") from error
        return cls.from_toml(text)

    def require_model(self, model: nn.Module) -> None:
        """Raise unless the plan was made for a model of this structure.

        Raises:
            PlanError: the model lacks a module of the plan or has another structure.
        """
        modules = dict(model.named_modules())
        named = [s.module for s in self.stages] + [m for b in self.loops for m in b.modules]
        missing = [module for module in named if module not in modules]
        if missing:
            raise PlanError(
                f"this plan was made for {self.model} and names module '{missing[0]}', which "
                f"{type(model).__name__} does not have; make a plan for this model"
            )
        if fingerprint(model) != self.fingerprint:
            raise PlanError(
                f"this plan was made for a {self.model} of another structure than this "
                f"{type(model).__name__} (other modules, parameter names or shapes); make a plan "
                "for this model"
            )


def _require_dim(what: str, state: object, patterns: Sequence[object]) -> None:
    """Raise unless a split is None or a dim of the patterns."""
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise PlanError(f"plan: {what} has a pattern that is not text: {list(patterns)}")
    dims = {dim for pattern in patterns for dim in Pattern.parse(str(pattern)).dims}
    if state is not None and state not in dims:
        raise PlanError(
            f"plan: {what} is split along {state!r}, which none of its patterns has; its dims are "
            f"{', '.join(sorted(dims))}"
        )


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's parameter and buffer names and shapes."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in _all_tensors(model)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _all_tensors(model: nn.Module) -> list[tuple[str, Any]]:
    return sorted([*model.named_parameters(), *model.named_buffers()])


def _data(plan: Plan) -> dict[str, Any]:
    """All that a plan says, as dicts."""
    data = asdict(replace(plan, programs={}, origin=None))
    del data["programs"], data["origin"]
    return data


def _plain(value: Any) -> Any:
    """Mappings and tuples as the dicts and lists that TOML knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _without_none(value: Any) -> Any:
    """TOML has no null: a None is left out in a table and is "" in a list."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return ["" if item is None else _without_none(item) for item in value]
    return value


def _plan(data: dict[str, Any]) -> Plan:
    stages = tuple(_stage(item) for item in data.pop("stages"))
    tensors = tuple(CarriedTensor(**{"held": None, **item}) for item in data.pop("tensors"))
    dropouts = tuple(DropoutSite(**item) for item in data.pop("dropouts"))
    data |= {"lengths": tuple(data["lengths"]), "manners": tuple(data["manners"])}
    loops = loops_from(data.pop("loops"))
    sent, notes = tuple(data.pop("sent_bytes_by_rank")), tuple(data.pop("notes"))
    data |= {"stages": stages, "tensors": tensors, "dropouts": dropouts, "notes": notes}
    return Plan(**data, sent_bytes_by_rank=sent, loops=loops)


def _stage(item: dict[str, Any]) -> Stage:
    seam = dict(item.pop("seam"))
    out = seam.pop("out", None)
    if isinstance(out, list):
        out = tuple(word or None for word in out)
    moves = tuple(
        Move(**{**move, "bytes_by_rank": tuple(move["bytes_by_rank"])})
        for move in item.pop("moves")
    )
    states = {"arrive": None, "held": None, "leave": None}
    return Stage(**{**states, **item}, seam=Seam(**seam, out=out), moves=moves)


def _explain(plan: Plan) -> str:
    parts = []
    if plan.stages or not plan.memory_bytes:
        parts.append(_explain_split(plan))
    if plan.memory_bytes:
        parts.append(_explain_memory(plan))
    return "\n\n".join(parts)


def _explain_memory(plan: Plan) -> str:
    head = (
        f"{plan.model} within {format_bytes(plan.memory_bytes)} of activations: "
        f"{format_bytes(plan.peak_bytes)} certified, {format_bytes(plan.whole_peak_bytes)} without "
        "loops"
    )
    if not plan.loops:
        return f"{head}\nno loops are needed"
    cost_s = sum(loop.cost_s * len(block.modules) for block in plan.loops for loop in block.loops)
    return "\n".join(
        [
            head,
            "",
            *_aligned(explain_loops(plan.loops)),
            "",
            f"{format_time(cost_s)} more than the same operations without loops, as predicted",
            *(f"left as it is: '{path or plan.model}': {why}" for path, why in plan.left.items()),
        ]
    )


def _explain_split(plan: Plan) -> str:
    sizes = ", ".join(f"{dim}={size}" for dim, size in plan.sizes.items())
    head = f"{plan.model} over {plan.degree} ranks of mesh axis '{plan.axis}' ({sizes})"
    rows: list[tuple[str, ...]] = [
        ("stage", "calls", "split", "move", "from", "to", "sent/rank", "time")
    ]
    for stage, count in Counter(_key(stage) for stage in plan.stages).items():
        name, held, moves = stage
        first = (name, str(count), held or "whole")
        lines = [
            (
                "before" if move.before else "after",
                ("" if move.what == "stream" else f"{move.what}: ") + move.src,
                move.dst,
                format_bytes(move.bytes),
                format_time(move.time_s) if move.bytes else "-",
            )
            for move in moves
        ] or [("-", "", "", "", "")]
        rows += [
            ((first if index == 0 else ("", "", "")) + line) for index, line in enumerate(lines)
        ]
    time_s = sum(move.time_s for move in plan.moves)
    foot = [
        (
            f"one forward: {plan.switches} transfers, {format_bytes(plan.sent_bytes)} sent per "
            f"rank, {format_time(time_s)} predicted"
        ),
        (
            f"peak activations: {format_bytes(plan.peak_bytes)} per rank, "
            f"{format_bytes(plan.whole_peak_bytes)} on one process"
        ),
        *(f"{t.name} ({t.pattern}): {_held(t.held)}" for t in plan.tensors),
        *([f"{len(plan.dropouts)} dropouts: masks by global position"] if plan.dropouts else []),
        *plan.notes,
    ]
    return "\n".join([head, "", *_aligned(rows), "", *foot])


def _key(stage: Stage) -> tuple[str, str | None, tuple[Move, ...]]:
    return re.sub(r"\b\d+\b", "*", stage.module), stage.held, stage.moves


def _held(dim: str | None) -> str:
    return "whole on every rank" if dim is None else f"each rank uses its part of {dim}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
