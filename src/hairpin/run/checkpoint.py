"""Checkpoints: model, optimizer, moving average and step, whole or not there at all.

A checkpoint is a folder: the files of torch.distributed.checkpoint and, written last,
``checkpoint.json`` with the step, the recipe, and size and digest of every file. It is written
under another name and renamed when it is on the disk, so a run killed at any moment leaves only
whole ones. It can be read by another number of ranks than wrote it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from hairpin.errors import CheckpointError, OutputError
from hairpin.run import metrics

FORMAT = 1
INFO_FILE = "checkpoint.json"
FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"
_WRITING = ".writing-"
_SHOWN_KEYS = 5
_EXPORTED_ROWS = 300


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        recipe: the settings of the run, as plain data.
        ranks: the number of ranks that wrote it.
        files: bytes and SHA-256 digest of each file, by name.
    """

    step: int
    recipe: dict[str, Any]
    ranks: int
    files: dict[str, dict[str, Any]]
    format: int = FORMAT


@dataclass
class TrainState:
    """What a checkpoint holds: a model, its optimizer, and the moving average of its weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]


def require_writable(folder: str | Path) -> Path:
    """Make the folder if need be and try to write in it.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; "
            "choose another folder with --out, or mend its permissions"
        ) from error
    return folder


def save(
    folder: str | Path,
    state: TrainState,
    *,
    step: int,
    recipe: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Write the checkpoint of a step below ``folder`` and drop all but the newest ``keep``.

    Every rank calls it; when it returns the checkpoint is on the disk.

    Raises:
        OutputError: it could not be written; checkpoints already there are as they were.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_WRITING}{final.name}"
    first = not dist.is_initialized() or dist.get_rank() == 0
    problem = None
    try:
        if first:
            _drop_unfinished(folder)
            folder.mkdir(parents=True, exist_ok=True)
        _write(_tensors(state), temporary)
        if first:
            _finish(temporary, final, step=step, recipe=recipe)
            _keep_newest(folder, keep, newest=final)
    except (OSError, dcp.api.CheckpointException) as error:
        problem = _why(error)
    problem = _of_first_rank(problem)
    if problem is not None:
        raise OutputError(
            f"cannot write the checkpoint of step {step} to {final}: {problem}; "
            "make room or choose another folder, then resume from the last checkpoint"
        )
    return final


def find(path: str | Path, *, fallback: bool = False) -> Path:
    """The newest whole checkpoint in a run's folder, or ``path`` itself where it is one.

    Args:
        fallback: go on to an older checkpoint where the newest is damaged.

    Raises:
        CheckpointError: there is none, or the newest is damaged and ``fallback`` was not given.
    """
    path = Path(path)
    if (path / INFO_FILE).exists():
        read_info(path)
        return path
    found = [*_finished(path), *_finished(path / FOLDER)]
    if not found:
        raise CheckpointError(
            f"there is no checkpoint in {path}; give the folder of a run (it holds {FOLDER}/) or "
            f"of one checkpoint (it holds {INFO_FILE})"
        )
    for index, candidate in enumerate(found):
        try:
            read_info(candidate)
        except CheckpointError as error:
            older = found[index + 1 :]
            if fallback and older:
                continue
            hint = f"; {older[0].name} is older: --fallback goes on from it" if older else ""
            raise CheckpointError(f"{error}{hint}") from error
        return candidate
    raise AssertionError("the last candidate returns or raises")


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says of itself, after checking that every file is as it was written.

    Raises:
        CheckpointError: naming the file that is missing, cut short or changed.
    """
    file = path / INFO_FILE
    try:
        info = CheckpointInfo(**json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}; is {path} a checkpoint?"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; use another checkpoint") from error
    if info.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {info.format!r}, this Hairpin reads format {FORMAT}; "
            "use the version that wrote it"
        )
    for name, written in info.files.items():
        _require_intact(path / name, written)
    return info


def load(path: Path, state: TrainState, *, part: bool = False) -> None:
    """Fill ``state`` from a checkpoint, whatever number of ranks wrote it.

    Args:
        part: ``state`` is of a part of the model, such as a stage of a pipeline.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    read_info(path)
    if not part:
        require_model(path, state.model)
    tensors = _tensors(state)
    _read(tensors, path)
    groups = get_state_dict(state.model, state.optimizer)[1]["param_groups"]
    set_state_dict(
        state.model,
        state.optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict={"state": tensors["optimizer"], "param_groups": groups},
    )
    for name, average in state.ema.items():
        average.copy_(tensors["ema"][name])


def load_average(path: Path, model: nn.Module) -> None:
    """Fill a model with the moving average of the weights, for sampling.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    read_info(path)
    require_model(path, model)
    _read({"ema": {name: p.detach() for name, p in model.named_parameters()}}, path)


def require_model(path: Path, model: nn.Module) -> None:
    """Raise unless the checkpoint holds exactly this model's tensors.

    Raises:
        CheckpointError: naming tensors that are missing, surplus or of another shape.
    """
    state = cast(Mapping[str, Tensor], get_model_state_dict(model))
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    held = {
        name.removeprefix("model."): tuple(meta.size)
        for name, meta in _metadata(path).items()
        if name.startswith("model.") and isinstance(meta, TensorStorageMetadata)
    }
    shapes = [
        f"{name} (saved {list(held[name])}, model {list(wanted[name])})"
        for name in wanted
        if name in held and held[name] != wanted[name]
    ]
    faults = [
        _listed("lacks", [name for name in wanted if name not in held]),
        _listed("has besides", [name for name in held if name not in wanted]),
        _listed("has of another shape", shapes),
    ]
    if any(faults):
        raise CheckpointError(
            f"{path} belongs to another model than this {type(model).__name__}: it "
            f"{'; it '.join(fault for fault in faults if fault)}; "
            "use the recipe that the checkpoint was made with"
        )


def export(source: Path, target: Path, *, moments: torch.dtype = torch.bfloat16) -> Path:
    """A copy of a checkpoint, small enough to pass on, that a run can go on from.

    The optimizer's moments are rounded to ``moments``; weights and their average stay exact. The
    run's metrics up to this step go with it, thinned. One process calls it.

    Raises:
        CheckpointError: the source is damaged.
        OutputError: the target is there already or cannot be written.
    """
    info = read_info(source)
    if target.exists():
        raise OutputError(f"{target} is there already; remove it or name another folder")
    require_writable(target.parent)
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in _metadata(source).items()
        if isinstance(meta, TensorStorageMetadata)
    }
    _read(tensors, source)
    for name, tensor in tensors.items():
        if name.startswith("optimizer.") and tensor.ndim > 0:
            tensors[name] = tensor.to(moments)
    temporary = target.parent / f"{_WRITING}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    _write(tensors, temporary)
    history = history_of(source)
    if history is not None:
        rows = [row for row in metrics.read(history) if row["step"] <= info.step]
        (temporary / METRICS_FILE).write_text(metrics.thinned(rows, most=_EXPORTED_ROWS))
    _finish(temporary, target, step=info.step, recipe=info.recipe)
    return target


def history_of(path: Path) -> Path | None:
    """The metrics file that belongs to a checkpoint: its own, or that of its run."""
    for file in (path / METRICS_FILE, path.parent.parent / METRICS_FILE):
        if file.exists():
            return file
    return None


def _of_first_rank(problem: str | None) -> str | None:
    """What the first rank says, on every rank, when it has got so far."""
    words = [problem]
    if dist.is_initialized():
        dist.broadcast_object_list(words)
    return words[0]


def _tensors(state: TrainState) -> dict[str, Any]:
    """Everything that is saved, under names that do not depend on the number of ranks."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer["state"], "ema": dict(state.ema)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves alone: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write(tensors: Mapping[str, Any], folder: Path) -> None:
    with _quiet():
        dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))


def _read(tensors: Mapping[str, Any], folder: Path) -> None:
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=FileSystemReader(folder))
    except dcp.api.CheckpointException as error:
        raise CheckpointError(
            f"{folder} cannot be read: {_why(error)}; use another checkpoint"
        ) from error


def _metadata(path: Path) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], FileSystemReader(path).read_metadata().state_dict_metadata)


def _finish(temporary: Path, final: Path, *, step: int, recipe: Mapping[str, Any]) -> None:
    """Describe the files, put everything on the disk, and only then give the folder its name."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(temporary.iterdir())
    }
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    info = CheckpointInfo(step=step, recipe=dict(recipe), ranks=ranks, files=files)
    (temporary / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    for file in (*temporary.iterdir(), temporary):
        _sync(file)
    if final.exists():  # the run was resumed before this step: the old one makes room
        old = final.parent / f"{_WRITING}old-{final.name}"
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_intact(file: Path, written: Mapping[str, Any]) -> None:
    try:
        size_bytes = file.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{file} is missing, so this checkpoint is not whole; use another checkpoint"
        ) from error
    if size_bytes != written["bytes"]:
        raise CheckpointError(
            f"{file} has {size_bytes} bytes instead of {written['bytes']}, so it was cut short or "
            "changed; use another checkpoint"
        )
    if _digest(file) != written["sha256"]:
        raise CheckpointError(
            f"{file} was changed since it was written (its SHA-256 digest differs); "
            "use another checkpoint"
        )


def _finished(folder: Path) -> list[Path]:
    """Finished checkpoints directly in a folder, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _keep_newest(folder: Path, keep: int, *, newest: Path) -> None:
    """Drop old checkpoints, and later ones: those of a run that was taken back to before them."""
    later = [path for path in _finished(folder) if path.name > newest.name]
    earlier = [path for path in _finished(folder) if path.name <= newest.name]
    for path in (*later, *earlier[max(1, keep) :]):
        condemned = folder / f"{_WRITING}old-{path.name}"
        path.rename(condemned)  # at once: it must never be found half gone
        shutil.rmtree(condemned)


def _drop_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path)


def _listed(verb: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return f"{verb} {', '.join(names[:_SHOWN_KEYS])}{more}"


def _why(error: BaseException) -> str:
    """The reason in one line; torch hides it in a dict of failures by rank."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
        return str(getattr(cause, "strerror", None) or cause)
    return str(getattr(error, "strerror", None) or error)
