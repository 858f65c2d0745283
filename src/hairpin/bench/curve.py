"""The curve of a benchmark: how many times faster, against bandwidth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hairpin.errors import MissingExtraError, OutputError

_LABELS = {"ulysses": "Ulysses", "ring": "ring attention", "megatron": "Megatron-SP"}


def draw_speedups(result: Mapping[str, Any], path: Path) -> Path:
    """Draw the speed-ups of an ``sp2d`` result into a PNG, slowest link first.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: ``path`` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'the curve needs matplotlib: pip install "hairpin[report]"'
        ) from error

    runs = sorted(result["runs"], key=lambda run: run["rate_bits_per_s"] or float("inf"))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(runs))
    for name, label in _LABELS.items():
        speedups = [run["speedup"][name] for run in runs]
        (line,) = axes.plot(places, speedups, marker="o", linewidth=2)
        axes.annotate(
            f"over {label}",
            (0, speedups[0]),
            xytext=(6, 7),
            textcoords="offset points",
            color=line.get_color(),
        )
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_xticks(places, labels=[run["rate"] for run in runs])
    axes.set_xlabel("bandwidth of each rank's link, both ways")
    axes.set_ylabel("times faster (time of the other / time of DSP)")
    axes.set_title(_title(result["settings"]), fontsize=10)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=144)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another folder"
        ) from error
    return path


def _title(settings: Mapping[str, Any]) -> str:
    size = settings["size"]
    gradients = ", parameter gradients averaged" if settings["sync_gradients"] else ""
    return (
        f"Forward and backward of a 2-D transformer: {size['t']} frames x {size['s']} patches x "
        f"{size['c']} channels, {settings['ranks']} ranks{gradients}"
    )
