"""The plots that people expect of a structure prediction, as matplotlib figures.

Each function draws onto axes it is given, so that one figure may hold several.
Dims: s sequences of the alignment, r, i, j residues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hairpin.errors import MissingExtraError, OutputError
from hairpin.report.chart import INK, RULE, to_svg

Floats = NDArray[np.floating[Any]]

BANDS = (
    (90.0, 100.0, "#0053d6", "very high"),
    (70.0, 90.0, "#65cbf3", "confident"),
    (50.0, 70.0, "#ffdb13", "low"),
    (0.0, 50.0, "#ff7d45", "very low"),
)
"""pLDDT from, to, colour and name of the four bands of confidence."""

_LINES = ("#8c6cff", "#12a594", "#e0457b", "#7d8da1", "#ef7f1a")
_MOST_ROWS = 1200  # of an alignment that are drawn
_MOST_PIXELS = 1500  # along a matrix
_GAP = ord("-")
_MAX_PAE = 30.0
_ALARM = "#a61b1b"


@dataclass(frozen=True)
class Inks:
    """Colours of text and of lines between things."""

    ink: str = "#22272e"
    rule: str = "#c9d1d9"


PRINTED = Inks()
ON_PAGE = Inks(INK, RULE)  # become the page's own, light or dark


def require_matplotlib() -> None:
    """Raise before anything is computed if nothing could be drawn.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the plots need matplotlib: pip install 'hairpin[fold]'") from error


# --------------------------------------------------------------------------------------- figures


def figure_of(
    draw: Callable[[Any, Inks], None], inks: Inks = PRINTED, *, size: tuple[float, float]
) -> Any:
    """A figure of ``size`` inches with one plot."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, inks)
    if axes.get_aspect() != "auto":  # a square in a page that is not: lay out around the square
        figure.set_layout_engine("compressed")
    return figure


def svg_of(draw: Callable[[Any, Inks], None], *, size: tuple[float, float]) -> str:
    """A plot as SVG for a page, in the page's own colours."""
    from matplotlib import rc_context

    with rc_context({"savefig.dpi": 200}):
        return to_svg(figure_of(draw, ON_PAGE, size=size))


def save_png(
    draw: Callable[[Any, Inks], None], path: Path, *, size: tuple[float, float], warning: str = ""
) -> Path:
    """A plot as a PNG file, with a warning above it where one is given.

    Raises:
        MissingExtraError: matplotlib is absent.
        OutputError: the file cannot be written.
    """
    figure = figure_of(draw, size=size)
    if warning:
        figure.suptitle("\n".join(wrap(warning, int(11 * size[0]))), fontsize=9, color=_ALARM)
    try:
        figure.savefig(path, dpi=160, facecolor="white")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another folder"
        ) from error
    return path


# ----------------------------------------------------------------------------------------- plots


def draw_coverage(
    axes: Any, inks: Inks, letters: NDArray[np.uint8], lengths: Sequence[int]
) -> None:
    """The alignment's rows, most alike on top, by their identity; how many cover each residue.

    Args:
        letters: ``[s, r]``, ASCII; the first row is the target.
        lengths: residues of each chain.
    """
    aligned = letters != _GAP
    rows, columns = letters.shape
    identity = _identity(letters, lengths)
    order = np.argsort(identity, kind="stable")
    shown = order[np.unique(np.linspace(0, rows - 1, min(rows, _MOST_ROWS)).astype(int))]
    picture = np.where(aligned[shown], identity[shown, None], np.nan)
    image = axes.imshow(
        picture,
        extent=(0.5, columns + 0.5, 0, rows),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="viridis_r",
        vmin=0,
        vmax=1,
    )
    axes.plot(np.arange(1, columns + 1), aligned.sum(axis=0), **_over_a_picture())
    _label(axes, inks, "residue", "sequences")
    _boundaries(axes, inks, lengths, both=False)
    axes.set_xlim(0.5, columns + 0.5)
    axes.set_ylim(0, rows * 1.02)
    _colour_bar(axes, image, inks, "identity to the target")


def draw_plddt(
    axes: Any, inks: Inks, lines: Sequence[tuple[str, Floats]], lengths: Sequence[int]
) -> None:
    """pLDDT along the chain over the four bands of confidence; the first line is the strongest.

    Args:
        lines: name and ``[r]``, 0 to 100, of each model, best first.
    """
    residues = sum(lengths)
    for low, high, colour, name in BANDS:
        axes.axhspan(low, high, color=colour, alpha=0.16, lw=0)
        axes.annotate(
            name,
            (1, (low + high) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=inks.ink,
            fontsize=9,
        )
    at = np.arange(1, residues + 1)
    for number, (name, values) in enumerate(lines):
        strength = {"lw": 1.8, "zorder": 4} if number == 0 else {"lw": 1.1, "zorder": 3}
        colour = inks.ink if number == 0 else _LINES[number % len(_LINES)]
        axes.plot(at, values, color=colour, label=name, **strength)
    _label(axes, inks, "residue", "pLDDT")
    _boundaries(axes, inks, lengths, both=False)
    axes.set_xlim(1, max(residues, 2))
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 70, 90, 100])
    if len(lines) > 1:
        legend = axes.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=inks.ink)
        legend.set_zorder(6)


def draw_pae(axes: Any, inks: Inks, pae: Floats, lengths: Sequence[int]) -> None:
    """Predicted aligned error ``[i, j]`` in Angstrom: dark is sure. Chains are set apart."""
    _matrix(axes, inks, pae, lengths, cmap="Greens_r", top=_MAX_PAE, unit="expected error (Å)")
    _label(axes, inks, "scored residue", "aligned residue")


def draw_distances(axes: Any, inks: Inks, distances: Floats, lengths: Sequence[int]) -> None:
    """Expected distance ``[i, j]`` in Angstrom by the distogram, where it ends and beyond alike."""
    _matrix(axes, inks, distances, lengths, cmap="magma", top=22.0, unit="expected distance (Å)")
    _label(axes, inks, "residue", "residue")


# ---------------------------------------------------------------------------------------- pieces


def _over_a_picture() -> dict[str, Any]:
    """How a line looks that is to be seen on any colour: dark with a light rim."""
    from matplotlib.patheffects import withStroke

    rim = withStroke(linewidth=3.2, foreground="#ffffff")
    return {"color": PRINTED.ink, "lw": 1.4, "path_effects": [rim]}


def _identity(letters: NDArray[np.uint8], lengths: Sequence[int]) -> Floats:
    """Part of the letters that are the target's, of the chains that a row has anything of."""
    same, columns = np.zeros(len(letters)), np.zeros(len(letters))
    for block in np.split(letters, np.cumsum(lengths)[:-1], axis=1):
        there = (block != _GAP).any(axis=1)
        same += (block == block[0]).sum(axis=1)
        columns += there * block.shape[1]
    found: Floats = same / np.maximum(columns, 1)
    return found


def _matrix(
    axes: Any,
    inks: Inks,
    values: Floats,
    lengths: Sequence[int],
    *,
    cmap: str,
    top: float,
    unit: str,
) -> None:
    n = len(values)
    step = -(-n // _MOST_PIXELS)
    image = axes.imshow(
        values[::step, ::step],
        extent=(0.5, n + 0.5, n + 0.5, 0.5),
        cmap=cmap,
        vmin=0,
        vmax=top,
        interpolation="nearest",
    )
    _boundaries(axes, inks, lengths, both=True)
    axes.set_xlim(0.5, n + 0.5)
    axes.set_ylim(n + 0.5, 0.5)
    _colour_bar(axes, image, inks, unit)


def _boundaries(axes: Any, inks: Inks, lengths: Sequence[int], *, both: bool) -> None:
    for edge in np.cumsum(lengths)[:-1] + 0.5:
        axes.axvline(edge, color=inks.ink, lw=1.0, ls=(0, (4, 2)))
        if both:
            axes.axhline(edge, color=inks.ink, lw=1.0, ls=(0, (4, 2)))


def _label(axes: Any, inks: Inks, x: str, y: str) -> None:
    axes.set_xlabel(x, color=inks.ink)
    axes.set_ylabel(y, color=inks.ink)
    axes.tick_params(colors=inks.ink, length=0, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for spine in axes.spines.values():
        spine.set_color(inks.rule)


def _colour_bar(axes: Any, image: Any, inks: Inks, unit: str) -> None:
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(unit, color=inks.ink, fontsize=9)
    bar.ax.tick_params(colors=inks.ink, length=0, labelsize=9)
    bar.outline.set_edgecolor(inks.rule)
