"""``hairpin fold``: structures of proteins and complexes from alignments and parameters."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli import train
from hairpin.cli.output import command_line, print_json, print_text, say
from hairpin.errors import HairpinError, RecipeError, WeightsError

if TYPE_CHECKING:
    import torch

    from hairpin.planning.axial.attach import AxialSplit
    from hairpin.planning.axial.plan import AxialPlan
    from hairpin.run.fold import FoldModel, Prediction
    from hairpin.run.fold_inputs import FoldTarget
    from hairpin.run.trace import Recording

_TIMEOUT_S = 3600.0  # that the others wait while the first rank writes and relaxes
_OF_RANKS = ("auto", "cpu", "cuda")  # devices to name where there are several ranks
_SOME_FAILED = 1  # exit code where targets of a folder failed


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks for, the same for every target."""

    alignments: Sequence[Path]
    templates: Path | None
    hits: Path | None
    params: Sequence[Path]
    random_weights: str | None
    seed: int
    recycles: int | None
    tolerance: float | None
    memory: str | None
    device: str
    relax: bool
    ranks: int
    product: str
    passing: str
    trace: bool

    @property
    def split(self) -> "AxialPlan":
        """How to split a model over the ranks."""
        from hairpin.planning.axial.plan import AxialPlan

        kinds: dict[str, Any] = {"product": self.product, "passing": self.passing}
        return AxialPlan(degree=self.ranks, **kinds)

    def times(self, model: "FoldModel") -> int:
        """Recycles to run a model with."""
        return model.config.recycles if self.recycles is None else self.recycles


@dataclass(frozen=True)
class Result:
    """What became of a target."""

    name: str
    folder: Path
    predictions: "Sequence[Prediction]" = ()
    files: Sequence[Path] = ()
    error: str = ""


def fold(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="A FASTA file, several sequences being one complex; or a folder."
        ),
    ],
    *,
    msa: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|FOLDER", help="An alignment, .a3m or .sto; may be repeated."),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Structures to use as templates.")
    ] = None,
    hits: Annotated[
        Path | None, typer.Option(metavar="FILE.hhr", help="How HHsearch aligns the templates.")
    ] = None,
    params: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.npz", help="Parameters of a model; may be repeated."),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Rehearse with random parameters: tiny, model_1_ptm."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for everything; fold_NAME if left out."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of MSA sampling and masking.")] = 0,
    recycles: Annotated[
        int | None, typer.Option(min=0, help="Recycles; the model's own number if left out.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Stop recycling when distances change by less, in Angstrom."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most that activations may take: 8GiB."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")
    ] = "auto",
    ranks: train.Ranks = None,
    product: train.Product = "gather",
    passing: train.Passing = "gather",
    relax: Annotated[
        bool, typer.Option("--relax", help="Also minimise the best structure with OpenMM.")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also write when modules ran and transfers, for Perfetto."),
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what memory and time it would take.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print paths and scores as JSON.")] = False,
) -> None:
    """Fold proteins: structures, scores, plots and a page, from alignments and parameters."""
    wishes = Wishes(
        alignments=msa or (),
        templates=templates,
        hits=hits,
        params=params or (),
        random_weights=random_weights,
        seed=seed,
        recycles=recycles,
        tolerance=tolerance,
        memory=memory,
        device=device,
        relax=relax,
        ranks=train.rank_count(ranks),
        product=product,
        passing=passing,
        trace=trace,
    )
    if estimate:
        if not _among_others():
            _estimate(target, wishes, json=json)
        return
    _check(wishes)
    if wishes.ranks > 1 and wishes.memory is None and not target.is_dir():
        _check_room(target, wishes)
    out = out or Path(f"fold_{target.stem or 'targets'}")
    work = _fold_folder if target.is_dir() else _fold_alone
    results = train.on_folding_ranks(_on_rank, wishes.ranks, work, target, out, wishes)
    if results is not None:  # None under torchrun, on all ranks but the first
        _tell(results, folder=target.is_dir(), json=json)


def _check(wishes: Wishes) -> None:
    """Refuse before anything is read what would be refused after minutes."""
    from hairpin.report.fold.plots import require_matplotlib
    from hairpin.units import parse_bytes

    if wishes.memory is not None:
        parse_bytes(wishes.memory)
    _check_ranks(wishes)
    if wishes.params and wishes.random_weights:
        raise RecipeError("--params and --random-weights exclude each other; give one of them")
    if not wishes.params and not wishes.random_weights:
        from hairpin.run.fold import DOWNLOAD

        raise WeightsError(f"no parameters were given: {DOWNLOAD}")
    missing = [path for path in wishes.params if not path.is_file()]
    if missing:
        from hairpin.run.fold import DOWNLOAD

        raise WeightsError(f"{missing[0]}: there is no such file; {DOWNLOAD}")
    names = [path.stem for path in wishes.params]
    if len(set(names)) < len(names):
        raise RecipeError("two of the files given with --params have one name; rename one")
    require_matplotlib()


def _check_ranks(wishes: Wishes) -> None:
    """Refuse what so many ranks cannot do."""
    _check_way(wishes)
    if wishes.ranks == 1:
        return
    if wishes.device not in _OF_RANKS:
        raise RecipeError(
            f"--device {wishes.device}: each of {wishes.ranks} ranks takes a device of its own; "
            f"write {', '.join(_OF_RANKS)}"
        )
    if wishes.device == "cuda":
        _check_gpus(wishes.ranks)


def _check_way(wishes: Wishes) -> None:
    """Refuse a way to meet that does not exist, or that one rank alone has no use for."""
    train.require_way(wishes.product, wishes.passing)
    if wishes.ranks > 1:
        return
    for name, way in (("product", wishes.product), ("passing", wishes.passing)):
        if way != "gather":
            raise RecipeError(
                f"--{name} {way}: one rank alone splits nothing; take --ranks of 2 or more (under "
                f"torchrun, --nproc-per-node), or leave --{name} out"
            )


def _check_gpus(ranks: int) -> None:
    """Refuse fewer GPUs than ranks on this machine; under torchrun there may be others."""
    import torch

    from hairpin.comm.mesh import local_ranks
    from hairpin.run.launch import launched

    here, found = local_ranks() if launched() else ranks, torch.cuda.device_count()
    if found < here:
        raise RecipeError(
            f"--device cuda: {here} ranks need as many GPUs, and torch sees {found} on this "
            "machine; start fewer ranks on it, or take auto or cpu"
        )


def _check_room(fasta: Path, wishes: Wishes) -> None:
    """Refuse what ranks on this machine's processor have no memory for.

    Before they start: the system would end them without a word. One rank alone looks for itself.
    """
    import torch

    from hairpin.run.fold_estimate import require_room_for_ranks
    from hairpin.run.launch import launched

    gpus = wishes.device != "cpu" and torch.cuda.device_count() >= wishes.ranks
    if launched() or gpus:
        return
    require_room_for_ranks(
        fasta,
        wishes.alignments,
        wishes.split,
        params=wishes.params,
        preset=wishes.random_weights,
        recycles=wishes.recycles,
    )


# ------------------------------------------------------------------------------------------ ranks


@dataclass
class Crew:
    """The ranks that fold together, as one of them sees it.

    Attributes:
        split: how the model is split over them.
        device: this rank's.
        folding: whether a model runs now: an error then has the other ranks wait in vain.
    """

    split: "AxialSplit"
    device: "torch.device"
    folding: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.split.mesh.global_rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.split.plan.ranks > 1

    def say(self, text: str) -> None:
        """Tell the person, once."""
        if self.first:
            say(text)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """An error inside it is raised on every rank, so that all go on, or end, alike.

        A rank raises its own; one that has none says what the others have.
        """
        from hairpin.comm.agree import require_agreement
        from hairpin.errors import DisagreementError

        error = None
        try:
            yield
        except HairpinError as found:
            error = found
        mesh = self.split.mesh
        try:
            require_agreement(f"{what}: {'ready' if error is None else error}", mesh, "sp")
        except DisagreementError:
            if error is None:
                raise
        if error is not None:
            raise error

    @contextmanager
    def fold(self) -> Iterator[None]:
        """While a model runs."""
        self.folding = True
        yield
        self.folding = False


def _on_rank(
    work: Callable[[Path, Path, Wishes, Crew], list[Result]],
    target: Path,
    out: Path,
    wishes: Wishes,
) -> list[Result] | None:
    """One rank's part; the first has the results."""
    from hairpin.comm.mesh import init_mesh
    from hairpin.planning.axial.attach import AxialSplit
    from hairpin.run.device import device_of

    several = wishes.ranks > 1
    kind = wishes.device if several and wishes.device != "auto" else None
    mesh = init_mesh(sp=wishes.ranks, timeout_s=_TIMEOUT_S, device_type=kind)
    device = device_of(mesh) if several else pick_device(wishes.device)
    crew = Crew(AxialSplit(wishes.split, mesh), device)
    results = work(target, out, wishes, crew)
    return results if crew.first else None


def _fold_alone(fasta: Path, out: Path, wishes: Wishes, crew: Crew) -> list[Result]:
    return [_fold_one(fasta, out, Models(wishes), crew)]


def _fold_folder(folder: Path, out: Path, wishes: Wishes, crew: Crew) -> list[Result]:
    """Fold every FASTA file of a folder; those that fail do not stop the others."""
    from hairpin.run.checkpoint import require_writable
    from hairpin.run.fold_inputs import targets_in

    models, results = Models(wishes), []
    paths = targets_in(folder)
    require_writable(out)
    for number, fasta in enumerate(paths, start=1):
        crew.say(f"{number}/{len(paths)}: {fasta.name}")
        try:
            results.append(_fold_one(fasta, out / fasta.stem, models, crew))
        except HairpinError as error:
            if crew.several and crew.folding:
                raise  # the ranks no longer do the same
            crew.say(f"{fasta.name}: {error}")
            results.append(Result(fasta.stem, out / fasta.stem, error=str(error)))
    return results


# ------------------------------------------------------------------------------------------- folds


@dataclass
class Models:
    """The models asked for, each built once."""

    wishes: Wishes
    _built: "dict[Any, FoldModel]" = field(default_factory=dict)

    def of(self, target: "FoldTarget") -> "list[FoldModel]":
        """Those to fold a target with."""
        from hairpin.run.fold import model_from_file, random_model

        wishes = self.wishes
        changes = {} if wishes.tolerance is None else {"recycle_tolerance": wishes.tolerance}
        if wishes.random_weights is not None:
            several = len(target.chains) > 1
            if several not in self._built:
                self._built[several] = random_model(
                    wishes.random_weights, seed=wishes.seed, multimer=several, **changes
                )
            return [self._built[several]]
        for path in wishes.params:
            if path not in self._built:
                self._built[path] = model_from_file(path, **changes)
        return [self._built[path] for path in wishes.params]


def _fold_one(fasta: Path, out: Path, models: Models, crew: Crew) -> Result:
    """Fold one target into a folder.

    Raises:
        HairpinError: anything about it is wrong.
    """
    from hairpin.run.fold import ranked, write_structures
    from hairpin.run.trace import Recording

    with crew.together(fasta.name):
        target, used = _prepared(fasta, out, models, crew)
    predictions: list[Prediction] = []
    files: list[Path] = []
    for model, split in used:
        recording = Recording() if models.wishes.trace else None
        predictions.append(
            _predicted(model, split, target, models.wishes, crew, recording=recording)
        )
        with crew.together(f"{fasta.name}, files of {model.name}"):
            if crew.first:
                files += write_structures(predictions[-1], out)
        if crew.first and recording is not None:
            files += _traced(recording, out / f"{model.name}_trace.json")
    best_first = ranked(predictions)
    if crew.first:
        files += _write_rest(target, best_first, out)
        if models.wishes.relax:
            files += _relaxed(best_first[0], out)
    return Result(target.name, out, best_first, files)


def _prepared(
    fasta: Path, out: Path, models: Models, crew: Crew
) -> "tuple[FoldTarget, list[tuple[FoldModel, AxialSplit]]]":
    """The target and the models to fold it with, and how each is split.

    Refuses what would fail later.
    """
    from hairpin.run.checkpoint import require_writable
    from hairpin.run.fold import require_fit, split_within
    from hairpin.run.fold_estimate import require_room
    from hairpin.run.fold_inputs import read_fold_target

    wishes = models.wishes
    target = read_fold_target(
        fasta, wishes.alignments, templates=wishes.templates, hits=wishes.hits
    )
    for note in target.notes:
        crew.say(f"{target.name}: {note}")
    require_writable(out)
    used = []
    for model in models.of(target):
        require_fit(model.config, target)
        split, times = crew.split, wishes.times(model)
        if crew.several and wishes.memory is not None:
            split = split_within(model, target, split, wishes.memory, recycles=times)
        elif wishes.memory is None and not crew.several:
            require_room(model.config, target, crew.device, recycles=times)
        used.append((model, split))
    return target, used


def _predicted(
    model: "FoldModel",
    split: "AxialSplit",
    target: "FoldTarget",
    wishes: Wishes,
    crew: Crew,
    *,
    recording: "Recording | None",
) -> "Prediction":
    """One model's prediction, the same on every rank; the first shows how it goes."""
    from hairpin.run.fold import predict
    from hairpin.run.fold_progress import FoldProgress

    times = wishes.times(model)
    if model.rehearsal:
        crew.say(model.rehearsal)
    bar = FoldProgress(f"{target.name}, {model.name}", times + 1)
    with crew.fold(), bar if crew.first else nullcontext():
        return predict(
            model,
            target,
            seed=wishes.seed,
            recycles=times,
            memory=None if crew.several else wishes.memory,  # the split keeps to it already
            split=split,
            device=crew.device,
            recording=recording,
            on_block=bar if crew.first else None,
            progress=bar.say if crew.first else None,
        )


def _write_rest(
    target: "FoldTarget", predictions: "Sequence[Prediction]", folder: Path
) -> list[Path]:
    """Scores, plots and the page."""
    import json

    from hairpin.proteins.text import write_text
    from hairpin.report.fold.page import FoldPage, write_page, write_plots
    from hairpin.run.fold import scores_of
    from hairpin.run.fold_inputs import coverage_letters

    scores = folder / "scores.json"
    write_text(scores, json.dumps(scores_of(target, predictions)))
    page = FoldPage(
        name=target.name,
        predictions=predictions,
        structures=[(folder / f"{p.model}.pdb").read_text(encoding="utf-8") for p in predictions],
        letters=coverage_letters(target),
        command=command_line(),
        notes=target.notes,
    )
    plots = write_plots(page, folder)
    write_page(folder / "index.html", page)
    return [scores, *plots, folder / "index.html"]


def _traced(recording: "Recording", file: Path) -> list[Path]:
    """The trace's file, or a line that says why there is none: the fold is there without it."""
    try:
        recording.write(file)
    except HairpinError as error:
        say(f"the fold is not traced: {error}")
        return []
    return [file]


def _relaxed(prediction: "Prediction", folder: Path) -> list[Path]:
    """The best structure minimised, or a line that says why not."""
    from hairpin.run.relax import relax_file

    source, target = folder / f"{prediction.model}.pdb", folder / f"{prediction.model}_relaxed.pdb"
    try:
        report = relax_file(source, target, remark=prediction.rehearsal)
    except HairpinError as error:
        say(f"{source.name} is not relaxed: {error}")
        return []
    say(f"{target.name}: {report}")
    return [target]


def _tell(results: Sequence[Result], *, folder: bool, json: bool) -> None:
    """Print how it went."""
    if not folder:
        (result,) = results
        if json:
            print_json(_as_data(result))
        else:
            print_text("\n".join(_summary(result)))
        return
    if json:
        print_json([_as_data(result) for result in results])
    else:
        print_text(_table(results))
    failed = sum(bool(result.error) for result in results)
    if failed:
        say(f"{failed} of {len(results)} targets failed")
        raise typer.Exit(_SOME_FAILED)


def _table(results: Sequence[Result]) -> str:
    from hairpin.units import format_time

    rows = [("target", "residues", "model", "pLDDT", "pTM", "ipTM", "time", "result")]
    for result in results:
        if result.error:
            reason = result.error.splitlines()[0]
            rows.append((result.name, "", "", "", "", "", "", f"failed: {reason}"))
            continue
        best = result.predictions[0]
        spent_s = sum(p.time_s for p in result.predictions)
        rows.append(
            (
                result.name,
                str(sum(best.lengths)),
                best.model,
                f"{best.mean_plddt:.1f}",
                _figure(best.ptm),
                _figure(best.iptm),
                format_time(spent_s),
                str(result.folder / "index.html"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:<{w}}" for text, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _as_data(result: Result) -> dict[str, Any]:
    if result.error:
        return {"target": result.name, "error": result.error}
    return {
        "target": result.name,
        "rehearsal": result.predictions[0].rehearsal or None,
        "files": [str(path) for path in result.files],
        "models": [
            {
                "model": p.model,
                "ranking_score": p.ranking,
                "mean_plddt": p.mean_plddt,
                "ptm": p.ptm,
                "iptm": p.iptm,
                "recycles": p.recycles,
                "time_s": p.time_s,
                "peak_bytes": p.peak_bytes,
            }
            for p in result.predictions
        ],
    }


def _summary(result: Result) -> list[str]:
    from hairpin.units import format_bytes, format_time

    lines = [result.predictions[0].rehearsal] if result.predictions[0].rehearsal else []
    for rank, p in enumerate(result.predictions, start=1):
        more = "".join(
            f"  {name} {value:.3f}"
            for name, value in (("pTM", p.ptm), ("ipTM", p.iptm))
            if value is not None
        )
        lines.append(
            f"{rank}  {p.model}  pLDDT {p.mean_plddt:.1f}{more}  {p.recycles} recycles  "
            f"{format_time(p.time_s)}  peak {format_bytes(p.peak_bytes)}"
        )
    return [*lines, str(result.folder / "index.html")]


def _estimate(target: Path, wishes: Wishes, *, json: bool) -> None:
    from dataclasses import asdict

    from hairpin.run.fold_estimate import estimate_fold, table

    _check_way(wishes)
    found = estimate_fold(
        target,
        wishes.alignments,
        params=wishes.params,
        preset=wishes.random_weights,
        recycles=wishes.recycles,
        over=wishes.split,
        memory=wishes.memory,
        progress=say,
    )
    if json:
        print_json(asdict(found))
    else:
        print_text(table(found))


def _among_others() -> bool:
    """Whether torchrun started this process as another rank than the first."""
    return os.environ.get("RANK", "0") != "0"


def pick_device(name: str) -> Any:
    """The device of a name; ``auto`` is a GPU if there is one.

    Raises:
        RecipeError: there is no such device.
    """
    import torch

    from hairpin.run.device import default_device

    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: no such device; write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: this machine has no GPU that torch can use; take cpu")
    return device
