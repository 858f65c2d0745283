"""The picture of a budget: bytes alive along one step, before and after, and what they are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from hairpin.errors import MissingExtraError, OutputError
from hairpin.graph.meter import Timeline
from hairpin.run.timeline import BACKWARD
from hairpin.units import format_bytes

_BEFORE, _AFTER, _BUDGET, _INK, _FAINT = "#8d99a6", "#1f6fb2", "#c0392b", "#22272e", "#c9d1d9"
_FONT, _SMALL = 11, 9.5
_NAMED = 5  # storages listed for each peak
_CHARACTER = 0.009  # width of one along the axis, of the axis


@dataclass(frozen=True)
class Section:
    """A stretch of a run inside one module: moments ``start`` to ``end``, end not included."""

    name: str
    start: int
    end: int


def draw_memory(
    before: Timeline,
    path: Path,
    *,
    model: str,
    after: Timeline | None = None,
    budget_bytes: int = 0,
) -> Path:
    """Draw the bytes alive along one step into a PNG, with what is live at each peak by name.

    Both runs lie on one axis: a module begins and ends at the same place in both, as wide as it has
    allocations in the run before.

    Args:
        model: name for the title and for what the model itself holds outside its submodules.
        after: the same step under a plan.
        budget_bytes: drawn as a line unless 0.

    Raises:
        MissingExtraError: matplotlib is absent.
        OutputError: ``path`` cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [before] if after is None else [before, after]
    lines = max(len(name_held(run, model)) for run in runs)
    figure = Figure(figsize=(10, 4.4 + 0.24 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(2, len(runs), height_ratios=[4.0, 0.3 + 0.24 * lines])
    axes = figure.add_subplot(rows[0, :])
    unit = _unit(before.peak_bytes)
    _draw_runs(axes, runs, unit)
    if budget_bytes:
        _draw_budget(axes, budget_bytes, unit)
    _finish(axes, f"{model}: memory along one step", unit)
    for column, run in enumerate(runs):
        heading = "as it is" if column == 0 else "under the plan"
        colour = _BEFORE if column == 0 else _AFTER
        _list_peak(figure.add_subplot(rows[1, column]), run, model, heading, colour)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # a suffix that matplotlib does not know is the latter
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot write the picture to {path}: {reason}; name a .png file in a folder you may "
            "write to"
        ) from error
    return path


def require_matplotlib() -> None:
    """Raise before anything is measured if the picture could not be drawn.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "the picture needs matplotlib: pip install 'hairpin[report]'"
        ) from error


# -------------------------------------------------------------------------------- where a run is


def sections(run: Timeline) -> list[Section]:
    """A run in stretches, by the entry of a stack (``h.0``) or outermost module that runs.

    What the model does between them belongs to ``""``.
    """
    found = []
    start = 0
    for name, moments in groupby(run.moments, key=lambda moment: _section(moment.label)):
        end = start + len(list(moments))
        found.append(Section(name, start, end))
        start = end
    return found


def _section(label: str) -> str:
    """``transformer.h.0.attn (backward)`` -> ``transformer.h.0 (backward)``."""
    path, backward, _ = label.partition(BACKWARD)
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:1]) + backward


def places(before: Timeline, after: Timeline) -> list[float]:
    """Where each moment of ``after`` lies on the axis of ``before``.

    Sections that both runs go through begin and end together; what is between is stretched evenly.
    """
    anchors = [(0, 0), *_common(sections(before), sections(after))]
    anchors.append((len(before.moments), len(after.moments)))
    found: list[float] = []
    for (x0, i0), (x1, i1) in pairwise(anchors):
        found += [x0 + (x1 - x0) * (i - i0) / (i1 - i0) for i in range(i0, i1)]
    return found


def _common(before: Sequence[Section], after: Sequence[Section]) -> Iterator[tuple[int, int]]:
    """Pairs of places, of equal beginnings and ends, in order."""
    left, last = list(after), (0, 0)
    for section in before:
        match = next((i for i, other in enumerate(left) if other.name == section.name), None)
        if match is None or not section.name:
            continue
        for pair in ((section.start, left[match].start), (section.end, left[match].end)):
            if pair[0] >= last[0] and pair[1] > last[1]:
                yield (last := pair)
        del left[: match + 1]


# ------------------------------------------------------------------------------------ the drawing


def _unit(peak_bytes: int) -> tuple[str, int]:
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if peak_bytes >= size:
            return name, size
    return "bytes", 1


def _draw_runs(axes: Any, runs: Sequence[Timeline], unit: tuple[str, int]) -> None:
    before = runs[0]
    width = len(before.moments)
    for number, run in enumerate(runs):
        x = list(range(width)) if number == 0 else places(before, run)
        y = [moment.live_bytes / unit[1] for moment in run.moments]
        colour = _BEFORE if number == 0 else _AFTER
        alpha = 0.30 if number == 0 else 0.22
        axes.fill_between([*x, width], [*y, y[-1]], step="post", color=colour, alpha=alpha, lw=0)
        axes.step([*x, width], [*y, y[-1]], where="post", color=colour, linewidth=1.4)
        _mark_peak(axes, run, x, unit, colour)
    axes.set_xlim(0, width)
    _name_sections(axes, sections(before))


def _mark_peak(
    axes: Any, run: Timeline, x: Sequence[float], unit: tuple[str, int], colour: str
) -> None:
    at = max(range(len(run.moments)), key=lambda i: run.moments[i].live_bytes)
    y = run.peak_bytes / unit[1]
    axes.plot([x[at]], [y], "o", color=colour, markersize=5, zorder=5)
    right = x[at] > 0.8 * max(x[-1], 1)
    axes.annotate(
        format_bytes(run.peak_bytes),
        (x[at], y),
        xytext=(-8 if right else 8, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=colour,
        fontsize=_FONT,
        fontweight="bold",
    )


def _draw_budget(axes: Any, budget_bytes: int, unit: tuple[str, int]) -> None:
    y = budget_bytes / unit[1]
    axes.axhline(y, color=_BUDGET, linewidth=1.2, linestyle=(0, (5, 3)), zorder=4)
    axes.annotate(
        f"budget\n{format_bytes(budget_bytes)}",
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=_BUDGET,
        fontsize=_FONT,
    )


def _name_sections(axes: Any, found: Sequence[Section]) -> None:
    """Names of the sections where they lie, as many as stand clear of one another."""
    width = found[-1].end if found else 1
    middles, names, right = [], [], 0.0
    for section in found:
        if not section.name:
            continue
        axes.axvline(section.start, color=_FAINT, linewidth=0.7, zorder=0)
        name = section.name.replace(BACKWARD, "\nbackward")
        middle = (section.start + section.end) / 2
        half = (len(name.partition("\n")[0]) / 2 + 1) * _CHARACTER * width
        if middle - half >= right:
            right = middle + half
            middles.append(middle)
            names.append(name)
    axes.set_xticks(middles, labels=names, fontsize=_SMALL)


def _finish(axes: Any, title: str, unit: tuple[str, int]) -> None:
    axes.set_title(title, loc="left", fontsize=_FONT + 2, color=_INK, pad=12)
    axes.set_ylabel(f"alive, {unit[0]}", fontsize=_FONT, color=_INK)
    axes.set_xlabel("module that runs, in order", fontsize=_FONT, color=_INK)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.tick_params(length=0, colors=_INK, labelsize=_SMALL)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


# ------------------------------------------------------------------------------- what sets a peak


def name_held(run: Timeline, model: str, *, most: int = _NAMED) -> list[tuple[str, str, str]]:
    """What is alive at the peak, largest first: bytes, module, operation with shape.

    Equal storages share a line; the smaller ones that are left out share the last.
    """
    alike = Counter((h.nbytes, h.label, h.op, h.shape) for h in run.at_peak if h.nbytes)
    ranked = sorted(alike.items(), key=lambda item: -item[0][0] * item[1])
    lines = [
        (
            format_bytes(nbytes * count),
            label or model,
            f"{_what(op, shape)}{f'  x {count}' if count > 1 else ''}",
        )
        for (nbytes, label, op, shape), count in ranked[:most]
    ]
    rest = ranked[most:]
    if rest:
        total = sum(held[0] * count for held, count in rest)
        lines.append((format_bytes(total), "", f"in {sum(n for _, n in rest)} more"))
    return lines


def _what(op: str, shape: Sequence[int]) -> str:
    name = op.removeprefix("aten.")
    return name if op.endswith("workspace") else f"{name} {list(shape)}"


def _list_peak(axes: Any, run: Timeline, model: str, heading: str, colour: str) -> None:
    axes.set_axis_off()
    lines = name_held(run, model)
    step = 1 / (len(lines) + 1.2)
    place = {"transform": axes.transAxes, "va": "top", "fontsize": _SMALL, "color": _INK}
    axes.text(
        0,
        1,
        f"alive at the peak {heading}",
        **(place | {"color": colour, "fontweight": "bold", "fontsize": _FONT}),
    )
    for row, (size, module, what) in enumerate(lines, start=1):
        y = 1 - (row + 0.2) * step
        axes.text(0.16, y, size, ha="right", **place)
        axes.text(0.19, y, f"{module}  {what}" if module else what, **place)
