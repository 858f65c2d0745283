"""The report of a training run: samples, loss curve, plan, bytes and memory, how to repeat it."""

import base64
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from hairpin import __version__
from hairpin.errors import MissingExtraError, OutputError
from hairpin.planning.plan import Plan
from hairpin.report.chart import loss_chart
from hairpin.run.settings import flat
from hairpin.units import format_bytes, format_time

_PACKAGES = ("torch", "numpy", "scikit-learn", "pillow")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows.

    Attributes:
        title: name of the run.
        command: the command line that repeats it.
        recipe: its settings, as plain data.
        metrics: the rows of its metrics file; may be empty.
        plan: how the model was split; None where it was not.
        mesh: degree of each mesh axis.
        film, sheet: a GIF and a PNG of samples; None to leave them out.
        figures: more (name, value) pairs for the top of the page.
        environment: (name, value) pairs, see :func:`environment`.
    """

    title: str
    command: str
    recipe: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    plan: Plan | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)
    film: Path | None = None
    sheet: Path | None = None
    figures: Sequence[tuple[str, str]] = ()
    environment: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class _RankRow:
    """One rank's line in the table of bytes and memory; shares are in percent of the largest."""

    rank: int
    sent: str
    sent_share: float
    peak: str
    peak_share: float


def write_report(path: str | Path, report: Report) -> None:
    """Write the report as one self-contained HTML file.

    Raises:
        MissingExtraError: jinja2 or matplotlib is absent.
        OutputError: the file cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("the report needs jinja2: pip install 'hairpin[report]'") from error
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters.update(bytes=format_bytes, time=format_time)
    source = files("hairpin.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    text = page.from_string(source).render(
        report=report,
        film=_data_uri(report.film, "image/gif"),
        sheet=_data_uri(report.sheet, "image/png"),
        chart=Markup(loss_chart(report.metrics)) if report.metrics else None,  # noqa: S704  # our own SVG
        tiles=_tiles(report),
        rank_rows=_rank_rows(report.metrics),
        recipe=list(flat(report.recipe)),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write the report to {path}: {error.strerror or error}; choose another folder"
        ) from error


def environment() -> list[tuple[str, str]]:
    """Versions and processor of this machine, and nothing that tells whose it is."""
    rows = [("hairpin", __version__), ("Python", platform.python_version())]
    rows += [(name, found) for name in _PACKAGES if (found := _version(name)) != "absent"]
    system = f"{platform.system()} {platform.machine()}"
    return [*rows, ("system", system), ("processor", f"{_processor()}, {os.cpu_count()} cores")]


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The figures at the top: name and value."""
    rows, mesh = report.metrics, report.mesh
    ranks = ", ".join(f"{axis} {n}" for axis, n in mesh.items())
    tiles = [("ranks", ranks)] if ranks else []
    if rows:
        recent = rows[-min(len(rows), 50) :]
        tiles += [
            ("steps", f"{rows[-1]['step']:,}"),
            ("loss, last 50 steps", f"{median(row['loss'] for row in recent):.3f}"),
            ("clips per second", f"{median(row['samples_per_s'] for row in recent):.1f}"),
            ("sent per rank and step", format_bytes(max(rows[-1]["bytes_sent"]))),
            ("peak memory of a rank", format_bytes(max(rows[-1]["peak_memory_bytes"]))),
        ]
    return [*tiles, *report.figures]


def _rank_rows(metrics: Sequence[Mapping[str, Any]]) -> list[_RankRow]:
    if not metrics:
        return []
    sent, peak = metrics[-1]["bytes_sent"], metrics[-1]["peak_memory_bytes"]
    return [
        _RankRow(
            rank=rank,
            sent=format_bytes(sent[rank]),
            sent_share=100 * sent[rank] / max(1, *sent),
            peak=format_bytes(peak[rank]),
            peak_share=100 * peak[rank] / max(1, *peak),
        )
        for rank in range(len(sent))
    ]


def _data_uri(path: Path | None, kind: str) -> str | None:
    if path is None:
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
