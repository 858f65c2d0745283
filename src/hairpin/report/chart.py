"""Charts as SVG that takes its colours from the page around it, so that dark mode works."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hairpin.errors import MissingExtraError

# Colours nothing else uses, replaced in the finished SVG by the page's own.
_COLOURS = {"#010203": "var(--ink)", "#040506": "var(--rule)", "#070809": "var(--accent)"}
INK, RULE, _ACCENT = _COLOURS


def loss_chart(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The loss over the steps, each step faint and their running mean strong, as inline SVG.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise MissingExtraError(
            "the report needs matplotlib: pip install 'hairpin[report]'"
        ) from error
    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=_ACCENT, alpha=0.3, linewidth=0.8)
    axes.plot(steps, running_mean(losses, window=max(1, len(losses) // 50)), color=_ACCENT, lw=2)
    axes.set_yscale("log")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(color=RULE, linewidth=0.6, axis="y")
    axes.margins(x=0.01)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    return to_svg(figure)


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def to_svg(figure: Any) -> str:
    """A figure as an SVG element for the middle of a page: text as text, colours by name."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hairpin"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: [^;\"]*", "font: 11px system-ui, sans-serif", text)
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    return text
