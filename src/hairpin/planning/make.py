"""Making a plan: the cheapest sequence of splits that a rehearsal on every rank finds right."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.errors import LayoutError, PlanError, SplitError
from hairpin.graph.dims import Fault, differing, first_fault
from hairpin.graph.trace import Shape
from hairpin.layout import Layout, Pattern, shard_sizes, solve_sizes
from hairpin.planning.apply import require_bare
from hairpin.planning.example import Example, as_example
from hairpin.planning.fitted import plan_loops, with_loops
from hairpin.planning.loops.budget import Progress
from hairpin.planning.plan import (
    CarriedTensor,
    DropoutSite,
    Move,
    OutputGrad,
    Plan,
    Stage,
    fingerprint,
)
from hairpin.planning.remembered import remembered
from hairpin.planning.split.cost import Costs, sent_bytes, sent_bytes_by_rank, share
from hairpin.planning.split.derive import derive_attends
from hairpin.planning.split.rehearse import Run, StageCall, rehearse
from hairpin.planning.split.seam import Attends, Seam, Table, match_table
from hairpin.planning.split.shard import Cost, cheapest_path
from hairpin.units import parse_bytes

_IDLE_S = (
    1e3  # a stage that leaves half of the ranks without work is taken only if there is no other
)

Held = str | None
Sizes = Mapping[str, int]
Ban = tuple[str, Held, Held]


def plan(
    model: nn.Module,
    example: Any,
    mesh: Mesh | DeviceMesh | None = None,
    *,
    attends: Attends | None = None,
    dims: str | None = None,
    free_dims: Sequence[str] = (),
    axis: str = "sp",
    costs: Costs | None = None,
    output_grad: OutputGrad = "replicated",
    more_examples: Sequence[Any] = (),
    memory: int | str | None = None,
    backward: bool = False,
    progress: Progress | None = None,
    cache: bool = True,
) -> Plan:
    """Find where to split a model over one mesh axis, on shapes alone: needs no devices.

    With a budget of ``memory``, blocks that hold too much are given loops over chunks of a dim; a
    budget alone, without a mesh, plans for one device.

    The model is rehearsed on fake tensors at its global shape and again at each local shape that a
    rank of the plan would see. The operations must be the same, and none may compute along a dim
    that is split there; otherwise the plan avoids that split or is refused, with the module and
    the dim.

    Args:
        model: may lie on the meta device. Plan in the mode, ``train()`` or ``eval()``, it will run.
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        mesh: live, or a description such as ``hp.Mesh(sp=8)``; left out for one device.
        attends: module path -> pattern or :class:`~hairpin.Seam`; see there. Left out, it is
            derived by following every dim through the model.
        dims: pattern of the stream, where the table only names dims.
        free_dims: dims to consider besides those in brackets, such as the batch ``"b"``. Every
            argument that carries such a dim must have its pattern in the table.
        axis: the mesh axis to split over.
        costs: speeds of the links and the arithmetic that the choice weighs.
        output_grad: ``"replicated"`` where every rank computes the same loss from the model's whole
            output, as an unedited training script does; ``"partial"`` where each computes its own.
        more_examples: inputs of other lengths that the plan must also be right for. A forward of
            lengths that were not rehearsed is refused.
        memory: bytes, or text such as ``"2GiB"``, that one rank's activations may take: all that
            a forward allocates, its outputs included, parameters and inputs not.
        backward: whether the budget is for a forward and a backward; gradients count then.
        progress: called with a few words as the search for loops goes on.
        cache: whether a plan with a budget may come from the cache folder, and is kept there. One
            is found again only for the same code, settings, shapes, example and versions.

    Raises:
        PlanError: the table or the example is wrong, or there is no way to split.
        SplitError: a listed module computes along a dim that its pattern does not bracket.
        MemoryBudgetError: no loops bring the activations under ``memory``; says the floor and what
            sets it.
        MeshError: no such axis.
    """
    require_bare(model)
    budget_bytes = None if memory is None else parse_bytes(memory)
    if mesh is None and budget_bytes is None:
        raise PlanError(
            "there is nothing to plan for: give a mesh to split over, such as hp.Mesh(sp=4), "
            "or a budget, such as memory='2GiB', or both"
        )
    ranks = None if mesh is None else as_mesh(mesh).size(axis)
    how = _How(attends, dims, tuple(free_dims), axis, costs, output_grad, tuple(more_examples))
    make = partial(_made, model, example, ranks, how, budget_bytes, backward, progress)
    if budget_bytes is None or not cache:
        return make()
    asked = (as_example(example), ranks, how, budget_bytes, backward)
    return remembered(make, model, *asked, say=progress or (lambda _: None))


@dataclass(frozen=True)
class _How:
    """What a caller of :func:`plan` may say about a split."""

    attends: Attends | None
    dims: str | None
    free_dims: tuple[str, ...]
    axis: str
    costs: Costs | None
    output_grad: OutputGrad
    more_examples: tuple[Any, ...]


def _made(  # noqa: PLR0917 - called with all of them, by plan alone
    model: nn.Module,
    example: Any,
    ranks: int | None,
    how: _How,
    budget_bytes: int | None,
    backward: bool,  # noqa: FBT001
    progress: Progress | None,
) -> Plan:
    """The plan, worked out."""
    if ranks is None:
        assert budget_bytes is not None
        return plan_loops(
            model,
            as_example(example),
            budget_bytes,
            axis=how.axis,
            backward=backward,
            progress=progress,
        )
    attends = how.attends
    if attends is None:
        attends = derive_attends(model, example, ranks=ranks)
    table = match_table(model, attends, how.dims)
    cases = [_Case.of(model, table, given) for given in (example, *how.more_examples)]
    whole = cases[0].whole
    chain = _Chain.of(
        table,
        cases[0],
        axis=how.axis,
        ranks=ranks,
        costs=how.costs or Costs(),
        free_dims=how.free_dims,
    )
    base = Plan(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        axis=how.axis,
        degree=ranks,
        sizes=chain.sizes,
        lengths=(),
        manners=tuple(case.whole.manner for case in cases),
        inputs=table.inputs,
        training=model.training,
        draws=any(torch.Tag.nondeterministic_seeded in op.tags for op in whole.ops(model)),
        stages=(),
        output_grad=how.output_grad,
        peak_bytes=whole.recording.peak_bytes,
        whole_peak_bytes=whole.recording.peak_bytes,
    )
    found = _Search(model, table, cases, chain, base).run()
    if budget_bytes is None:
        return found
    return with_loops(
        model, cases[0].example, found, budget_bytes, backward=backward, progress=progress
    )


@dataclass(frozen=True)
class _Case:
    """An example, the run of the whole model on it, and the sizes it has there."""

    example: Example
    whole: Run
    sizes: Sizes

    @classmethod
    def of(cls, model: nn.Module, table: Table, example: Any) -> "_Case":
        given = as_example(example)
        whole = rehearse(model, given, table)
        if not whole.calls:
            raise PlanError(
                f"no listed module ran: {', '.join(table.keys) or 'none'}; check the attends table "
                "and the example"
            )
        return cls(given, whole, _sizes(table, whole))


@dataclass(frozen=True)
class _Point:
    """One stage call with everything that its cost depends on."""

    call: StageCall
    seam: Seam
    key: str
    flops: int

    @property
    def out(self) -> str:
        """Pattern of the first output; the stream's where the module gives none back."""
        return self.seam.outputs[0] or Pattern.parse(self.seam.stream).render(brackets=False)


@dataclass(frozen=True)
class _Chain:
    """The stages in the order they ran, and the cost of every way to split them."""

    points: tuple[_Point, ...]
    sizes: Mapping[str, int]
    axis: str
    ranks: int
    costs: Costs
    candidates: tuple[str, ...]

    @classmethod
    def of(
        cls,
        table: Table,
        case: _Case,
        *,
        axis: str,
        ranks: int,
        costs: Costs,
        free_dims: tuple[str, ...],
    ) -> "_Chain":
        run = case.whole
        flops = [0] * len(run.calls)
        for op in run.recording.calls:
            begun, ended = op.place
            if begun > ended:
                flops[ended] += op.flops
        points = tuple(
            _Point(call, table.seams[call.module], table.keys[call.module], work)
            for call, work in zip(run.calls, flops, strict=True)
        )
        candidates = _candidates(table, free_dims, case.sizes)
        return cls(points, case.sizes, axis, ranks, costs, candidates)

    def holds(self, index: int) -> list[Held]:
        """Dims that stage ``index`` may hold split, and whole."""
        point = self.points[index]
        out_dims = Pattern.parse(point.out).dims
        stream = Pattern.parse(point.seam.stream)
        free = [
            dim
            for dim in stream.dims
            if dim not in point.seam.along and dim in out_dims and dim in self.candidates
        ]
        return [*free, None]

    def between(self, index: int) -> list[Held]:
        """Dims that may be split between stage ``index - 1`` and stage ``index``, and whole."""
        before = Pattern.parse(self.points[index - 1].out)
        after = Pattern.parse(self.points[index].seam.stream)
        common = [d for d in before.dims if d in after.dims and d in self.candidates]
        return [*common, None]

    def kind(self, index: int) -> str:
        """A name for the code between two stages, alike for all repetitions of a block."""
        names = [point.key for point in self.points[max(index - 1, 0) : index + 1]]
        return " -> ".join(names)

    def arrival_cost(self, index: int, arrive: Held, held: Held) -> Cost:
        point = self.points[index]
        layout = Layout.of(point.seam.stream, self.sizes)
        sent = sent_bytes(layout, point.call.element_bytes[0], arrive, held, self.ranks)
        busiest = share(layout, held, self.ranks)
        idle = _IDLE_S * busiest if busiest * self.ranks >= 2 else 0.0
        work_s = self.costs.compute_s(point.flops) * busiest
        return _ticks(idle + work_s + self.costs.transfer_s(sent)), int(arrive != held)

    def departure_cost(self, index: int, held: Held, leave: Held) -> Cost:
        point = self.points[index]
        layout = Layout.of(point.out, self.sizes)
        sent = sent_bytes(layout, point.call.element_bytes[1], held, leave, self.ranks)
        return _ticks(self.costs.transfer_s(sent)), 0

    def solve(self, bans: Collection[Ban], whole_around: set[str]) -> list[Held] | None:
        """States arrive, held, arrive, held, ..., leave of the cheapest way, or None."""
        count = len(self.points)
        if self.ranks == 1:
            return [None] * (2 * count + 1)
        borders: list[list[Held]] = [[None], *(self.between(i) for i in range(1, count)), [None]]
        for index, point in enumerate(self.points):
            if point.call.module in whole_around:
                borders[index] = borders[index + 1] = [None]
        layers: list[list[tuple[Held, ...]]] = []
        for index in range(count):
            layers.append([(state,) for state in borders[index]])
            layers.append([(a, h) for a in borders[index] for h in self.holds(index)])
        layers.append([(None,)])

        def edge(layer: int, start: tuple[Held, ...], end: tuple[Held, ...]) -> Cost | None:
            index, at_stage = divmod(layer, 2)
            if not at_stage:
                return self.arrival_cost(index, *end) if start[0] == end[0] else None
            if (self.kind(index + 1), start[0], end[0]) in bans:
                return None
            return self.departure_cost(index, start[1], end[0])

        path = cheapest_path(layers, edge)
        return None if path is None else [state[-1] for state in path]


@dataclass
class _Search:
    """Solve, rehearse, forbid what failed, until a plan is right on every rank."""

    model: nn.Module
    table: Table
    cases: Sequence[_Case]
    chain: _Chain
    base: Plan
    eval_cases: Sequence[_Case] = ()

    @property
    def first(self) -> Run:
        """The whole model's run on the example."""
        return self.cases[0].whole

    def run(self) -> Plan:
        bans: dict[Ban, str] = {}
        whole_around: set[str] = set()
        fault: Fault | None = None
        while True:
            path = self.chain.solve(bans, whole_around)
            if path is None:
                assert fault is not None
                raise PlanError(
                    f"{self.base.model} cannot be split over {self.chain.ranks} ranks: between its "
                    f"stages, in module '{fault.module or 'the model itself'}', {fault.reason}"
                )
            if self.chain.ranks > 1 and not any(path[1::2]):
                raise PlanError(
                    f"no stage of {self.base.model} can be split over {self.chain.ranks} ranks: "
                    "each computes along every bracketed dim longer than 1; name others, such "
                    "as the batch, with free_dims"
                )
            torn = _torn(self.chain, path)
            if torn and not torn <= whole_around:
                whole_around |= torn
                continue
            candidate = self._plan(path)
            if candidate.degree == 1:
                return replace(candidate, dropouts=tuple(self._dropouts(candidate, self.first)))
            fault, runs = self._rehearse(candidate)
            if fault is None:
                ranks = len(_distinct_ranks(candidate, self.chain.sizes))  # those of the example
                return replace(
                    candidate,
                    peak_bytes=max(run.recording.peak_bytes for run in runs[:ranks]),
                    dropouts=tuple(self._dropouts(candidate, runs[ranks - 1])),
                    notes=tuple(dict.fromkeys(bans.values())),
                )
            ban = self._forbid(candidate, fault)
            bans[ban] = (
                f"not split along {ban[2]} between {ban[0]}: there, in "
                f"'{fault.module or 'the model'}', {fault.reason}"
            )

    def _rehearse(self, candidate: Plan) -> tuple[Fault | None, list[Run]]:
        """Compare each case's whole run with that of every rank that sees other shapes.

        A model in ``train()`` is looked at in ``eval()`` too, as the rank with the least would run
        it.
        """
        runs: list[Run] = []
        for case in self.cases:
            for rank in _distinct_ranks(candidate, case.sizes):
                fault, run = self._compare(candidate, case, rank)
                if fault is not None:
                    return fault, runs
                runs.append(run)
        if self.model.training:
            with _evaluating(self.model):
                self.eval_cases = self.eval_cases or [
                    _Case.of(self.model, self.table, case.example) for case in self.cases
                ]
                for case in self.eval_cases:
                    rank = _distinct_ranks(candidate, case.sizes)[-1]
                    fault, _ = self._compare(candidate, case, rank)
                    if fault is not None:
                        return fault, runs
        return None, runs

    def _compare(self, candidate: Plan, case: _Case, rank: int) -> tuple[Fault | None, Run]:
        run = rehearse(self.model, case.example, self.table, candidate, rank)
        empty = _empty_places(candidate, case.sizes, rank)
        whole_ops = case.whole.ops(self.model)
        fault = run.fault or first_fault(whole_ops, run.ops(self.model), passed_over=empty)
        if fault is None and run.outputs != case.whole.outputs:
            count = len(candidate.stages)
            fault = Fault(None, "", (count, count), "the model's output keeps the split shape")
        return fault, run

    def _forbid(self, candidate: Plan, fault: Fault) -> Ban:
        """The pair of states around the code that failed; an error if a listed module failed."""
        begun, ended = fault.place
        if begun > ended or ended == 0:
            stage = candidate.stages[ended]
            raise SplitError(
                f"module '{fault.module}' cannot run on a part of dim '{stage.held}': "
                f"{fault.reason}. The table lists '{stage.module}' as '{stage.seam.stream}'; if it "
                f"computes along '{stage.held}', write [{stage.held}], and if an argument of it "
                "carries that dim, give the argument's pattern with hp.Seam(args=...)"
            )
        arrive, leave = candidate.stages[ended - 1].arrive, candidate.stages[ended - 1].leave
        ban = (self.chain.kind(ended), arrive, leave)
        if leave is None and ended == len(candidate.stages):
            raise PlanError(
                f"{self.base.model}: after the last stage, in module '{fault.module}': "
                f"{fault.reason}"
            )
        return ban

    def _plan(self, path: Sequence[Held]) -> Plan:
        chain = self.chain
        stages = tuple(
            _stage(chain, index, path[2 * index], path[2 * index + 1], path[2 * index + 2])
            for index in range(len(chain.points))
        )
        named = replace(self.base, stages=stages)
        return replace(
            named,
            lengths=tuple({d: c.sizes[d] for d in named.split_dims} for c in self.cases),
            tensors=tuple(self._tensors(stages)),
            sent_bytes_by_rank=tuple(
                sum(move.bytes_by_rank[rank] for stage in stages for move in stage.moves)
                for rank in range(chain.ranks)
            ),
        )

    def _tensors(self, stages: tuple[Stage, ...]) -> Iterator[CarriedTensor]:
        """Each listed parameter or buffer with the split of the place where it is used."""
        for name, pattern in self.table.tensors.items():
            states = set()
            for op in self.first.recording.calls:
                if name in op.sources:
                    begun, ended = op.place
                    state = stages[ended].held if begun > ended else _border(stages, ended)
                    states.add(state if state in Pattern.parse(pattern).dims else None)
            if len(states) > 1:
                raise PlanError(
                    f"'{name}' is used where {' and where '.join(map(str, states))} is split; a "
                    "tensor of the table must be used at one split only"
                )
            yield CarriedTensor(name, pattern, states.pop() if states else None)

    def _dropouts(self, candidate: Plan, part: Run) -> Iterator[DropoutSite]:
        """Every ``nn.Dropout`` that ran, with the dim of its input that is split there."""
        stages = {stage.module: stage for stage in candidate.stages}
        for path, calls in self.first.dropouts.items():
            sites = {
                _dropout_site(path, shape, part_shape, stages.get(owner), self.chain.sizes)
                for (owner, shape), (_, part_shape) in zip(calls, part.dropouts[path], strict=True)
            }
            if len(sites) > 1:
                raise PlanError(
                    f"dropout '{path}' is called on tensors laid out in different ways "
                    f"({', '.join(sorted(site.pattern for site in sites))}); give each its own "
                    "nn.Dropout"
                )
            yield from sites


def _ticks(time_s: float) -> int:
    """Picoseconds, so that equal costs added in another order stay equal."""
    return round(time_s * 1e12)


def _stage(chain: _Chain, index: int, arrive: Held, held: Held, leave: Held) -> Stage:
    point = chain.points[index]
    seam, sizes = point.seam, point.call.element_bytes

    def arrival(what: str, pattern: str, src: Held) -> Move | None:
        return _move(chain, what, pattern, src=src, dst=held, element_bytes=sizes[0])

    def departure(what: str, pattern: str, dst: Held) -> Move | None:
        found = _move(chain, what, pattern, src=held, dst=dst, element_bytes=sizes[1])
        return None if found is None else replace(found, before=False)

    sides = {n: p for n, p in seam.args.items() if n in point.call.args and held in _dims(p)}
    extras = {n: p for n, p in enumerate(seam.outputs) if n and p and held in _dims(p)}
    moves = [
        arrival("stream", seam.stream, arrive),
        *(arrival(name, pattern, None) for name, pattern in sides.items()),
        departure("stream", point.out, leave),
        *(departure(f"output {place}", pattern, None) for place, pattern in extras.items()),
    ]
    kept = tuple(move for move in moves if move is not None)
    return Stage(point.call.module, seam, arrive, held, leave, kept)


def _dims(pattern: str) -> tuple[str, ...]:
    return Pattern.parse(pattern).dims


def _move(
    chain: _Chain, what: str, pattern: str, *, src: Held, dst: Held, element_bytes: int
) -> Move | None:
    """The change of one tensor's split before a stage, or None if there is none."""
    if src == dst or chain.ranks == 1:
        return None
    layout = Layout.of(pattern, chain.sizes)
    sent = sent_bytes_by_rank(layout, element_bytes, src, dst, chain.ranks)
    before, after = (layout.split(dim, chain.axis).pattern.render() for dim in (src, dst))
    return Move(what, True, before, after, sent, chain.costs.transfer_s(max(sent)))


def _sizes(table: Table, run: Run) -> dict[str, int]:
    """Global sizes of all dims, learnt in the order in which a forward meets them."""
    sizes: dict[str, int] = {}
    try:
        for name, pattern in table.inputs.items():
            if name not in run.inputs:
                raise PlanError(
                    f"attends names argument {name!r} of the model; its tensor arguments are "
                    f"{', '.join(run.inputs) or 'none'}"
                )
            label = f"argument '{name}' of the model"
            sizes = solve_sizes({label: (Pattern.parse(pattern), run.inputs[name])}, sizes)
        for call in run.calls:
            seam = table.seams[call.module]
            label = f"module '{call.module}'"
            shapes: dict[str, tuple[Pattern, Shape]] = {
                f"the stream of {label}": (Pattern.parse(seam.stream), call.stream),
                **{
                    f"argument '{n}' of {label}": (Pattern.parse(seam.args[n]), shape)
                    for n, shape in call.args.items()
                },
            }
            for place, (pattern_, shape) in enumerate(
                zip(seam.outputs, call.outputs, strict=False)
            ):
                if pattern_ is not None and shape is not None:
                    shapes[f"output {place} of {label}"] = (Pattern.parse(pattern_), shape)
            sizes = solve_sizes(shapes, sizes)
        for name, pattern in table.tensors.items():
            solve_sizes({f"'{name}'": (Pattern.parse(pattern), table.shapes[name])}, sizes)
    except LayoutError as error:
        raise PlanError(
            f"{error}. Correct the attends table; if a merged dim is not determined, name the "
            "model's own arguments too: attends={'': {'x': 'b t s c'}, ...}"
        ) from error
    return sizes


def _candidates(table: Table, free_dims: Sequence[str], sizes: Sizes) -> tuple[str, ...]:
    """Dims that may be split: those that some module computes along, and the free ones.

    Raises:
        PlanError: a free dim that no pattern has.
    """
    for dim in free_dims:
        if dim not in sizes:
            raise PlanError(
                f"free_dims names {dim!r}, which no pattern of the table has; its dims are "
                f"{', '.join(sizes)}"
            )
    bracketed = [d for s in table.seams.values() for d in Pattern.parse(s.stream).bracketed]
    return tuple(dim for dim in dict.fromkeys((*bracketed, *free_dims)) if sizes[dim] > 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()``, and every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _distinct_ranks(candidate: Plan, sizes: Sizes) -> list[int]:
    """One rank for each set of local shapes that the plan gives rise to."""
    seen: dict[tuple[int, ...], int] = {}
    for rank in range(candidate.degree):
        lengths = (shard_sizes(sizes[dim], candidate.degree)[rank] for dim in candidate.split_dims)
        seen.setdefault(tuple(lengths), rank)
    return list(seen.values())


def _empty_places(candidate: Plan, sizes: Sizes, rank: int) -> set[tuple[int, int]]:
    """Where ``rank`` holds nothing: inside stage i is place (i + 1, i), before it (i, i)."""

    def is_empty(dim: Held) -> bool:
        return dim is not None and shard_sizes(sizes[dim], candidate.degree)[rank] == 0

    inside = {(i + 1, i) for i, stage in enumerate(candidate.stages) if is_empty(stage.held)}
    after = {(i + 1, i + 1) for i, stage in enumerate(candidate.stages) if is_empty(stage.leave)}
    return inside | after


def _torn(chain: _Chain, path: Sequence[Held]) -> set[str]:
    """Modules that run more than once and would meet other states on another call."""
    states: dict[str, set[tuple[Held, ...]]] = {}
    for index, point in enumerate(chain.points):
        states.setdefault(point.call.module, set()).add(tuple(path[2 * index : 2 * index + 3]))
    return {module for module, triples in states.items() if len(triples) > 1}


def _border(stages: Sequence[Stage], index: int) -> Held:
    """The split of the code before stage ``index``."""
    return stages[index - 1].leave if index else None


def _dropout_site(
    path: str, whole: Shape, part: Shape, stage: Stage | None, sizes: Sizes
) -> DropoutSite:
    """Pattern and split of a dropout's input, found by comparing two runs.

    Raises:
        PlanError: the dropout is outside all stages, two dims are split, or no dims of the stage
            merge to the split one.
    """
    words = [f"_{place}" for place in range(len(whole))]
    places = differing(whole, part)
    if not places:
        return DropoutSite(path, " ".join(words), None)
    if stage is None or stage.held is None:
        raise PlanError(
            f"dropout '{path}' lies outside all listed modules, where a dim is split; list it in "
            "the attends table, for example with 'b t s c'"
        )
    length = whole[places[0]]
    fits = (run for run in _runs(stage) if prod(sizes[d] for d in run) == length)
    merged = next(fits, None)
    if len(places) != 1 or merged is None:
        raise PlanError(
            f"dropout '{path}' in module '{stage.module}' takes a tensor of shape {whole}, in "
            f"which dim '{stage.held}' (length {sizes[stage.held]}) cannot be told apart; set this "
            "one to 0, or list it with a pattern of its own instead of its module"
        )
    words[places[0]] = merged[0] if len(merged) == 1 else f"({' '.join(merged)})"
    return DropoutSite(path, " ".join(words), stage.held)


def _runs(stage: Stage) -> list[tuple[str, ...]]:
    """Neighbouring dims that hold a stage's split dim: its own groups first, then the shortest."""
    patterns = [stage.seam.stream, *stage.seam.args.values(), *filter(None, stage.seam.outputs)]
    parsed = [Pattern.parse(pattern) for pattern in patterns]
    groups = [group for pattern in parsed for group in pattern.groups]
    runs = {
        pattern.dims[i:j]
        for pattern in parsed
        for i in range(len(pattern.dims))
        for j in range(i + 1, len(pattern.dims) + 1)
    }
    ordered = dict.fromkeys((*groups, *sorted(runs, key=lambda run: (len(run), run))))
    return [run for run in ordered if stage.held in run]
