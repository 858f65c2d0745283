"""A run's metrics: one JSON object a line, one line a step, without doubles after a resume."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hairpin.errors import DataError


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step did.

    Attributes:
        step: optimizer steps done with this one; the first is 1.
        loss: mean over all clips of the step, before the update.
        lr: learning rate of the update.
        grad_norm: norm of all gradients before clipping.
        samples_per_s: clips of all ranks per second.
        bytes_sent: payload bytes each rank sent in this step, by rank.
        peak_memory_bytes: most bytes each rank held so far, by rank; see `run.memory`.
        time_s: seconds the step took.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_s: float
    bytes_sent: list[int]
    peak_memory_bytes: list[int]
    time_s: float


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out.

    Raises:
        DataError: another line is not JSON.
    """
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is not JSON: {error}; remove it") from error
    return rows


def thinned(rows: Sequence[Mapping[str, Any]], *, most: int) -> str:
    """About `most` of the rows, evenly chosen and the last among them, with four digits each."""
    stride = max(1, -(-len(rows) // most))
    kept = rows[(len(rows) - 1) % stride :: stride] if rows else []
    return "".join(json.dumps({k: _short(v) for k, v in row.items()}) + "\n" for row in kept)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


class MetricsLog:
    """Appends rows to a metrics file."""

    def __init__(self, path: Path, *, after_step: int = 0, history: Path | None = None) -> None:
        """Keep the rows up to ``after_step``, of the file itself or else of ``history``."""
        source = path if path.exists() else history
        rows = read(source) if source is not None and after_step else []
        _replace(path, [row for row in rows if row["step"] <= after_step])
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: StepMetrics) -> None:
        """Add a row; it is in the file when this returns."""
        self._stream.write(json.dumps(asdict(row)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _replace(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
