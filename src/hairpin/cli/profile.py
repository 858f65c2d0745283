"""``hairpin profile``: what one step of a model costs on this machine, and what it holds."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli.load import ObjectNameError, load_callable
from hairpin.cli.output import print_json, print_text, say

if TYPE_CHECKING:
    from hairpin.graph.meter import Timeline


def profile(
    build: Annotated[
        str,
        typer.Argument(metavar="PKG.MOD:BUILD", help="A function returning (model, inputs)."),
    ],
    *,
    backward: Annotated[bool, typer.Option("--backward", help="Run a backward too.")] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.toml", help="Attach this plan before measuring.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw memory along the step.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure peak memory, time and bytes moved of one step, and name what is live at the peak."""
    quiet_profiler()
    from dataclasses import asdict

    import hairpin as hp
    from hairpin.report.memory import draw_memory, require_matplotlib
    from hairpin.run.timeline import memory_timeline

    if picture is not None:
        require_matplotlib()
    carried = None if plan is None else hp.Plan.load(plan)
    model, inputs = _built(build)
    whole = None
    if carried is not None:
        whole = memory_timeline(model, inputs, backward=backward) if picture is not None else None
        hp.parallelize(model, carried)
    report = hp.profile(model, inputs, backward=backward)
    run = memory_timeline(model, inputs, backward=backward)
    certified = None if carried is None or not carried.memory_bytes else carried.peak_bytes
    if picture is not None:
        name = type(model).__name__
        before, after = (run, None) if whole is None else (whole, run)
        budget_bytes = 0 if carried is None else carried.memory_bytes
        draw_memory(before, picture, model=name, after=after, budget_bytes=budget_bytes)
        say(f"wrote {picture}")
    if json:
        at_peak = [asdict(held) for held in run.at_peak if held.nbytes]
        print_json({**asdict(report), "certified_bytes": certified, "at_peak": at_peak})
    else:
        print_text("\n".join([str(report), *_certified(certified), "", *_at_peak(run, model)]))


def quiet_profiler() -> None:
    """Keep what torch's profiler says of its own stages off stderr; before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _built(build: str) -> tuple[Any, Any]:
    built = load_callable(build)()
    if not isinstance(built, tuple) or len(built) < 2:
        raise ObjectNameError(
            f"{build!r} returned one {type(built).__name__}; let it return (model, inputs)"
        )
    return built[0], built[1]


def _certified(certified: int | None) -> list[str]:
    from hairpin.units import format_bytes

    return [] if certified is None else [f"{'certified':<12} {format_bytes(certified)} by the plan"]


def _at_peak(run: "Timeline", model: Any) -> list[str]:
    """What is live at the peak as lines of a table."""
    from hairpin.report.memory import name_held

    rows = name_held(run, type(model).__name__)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
    lines = [f"  {size:>{widths[0]}}  {module:<{widths[1]}}  {what}" for size, module, what in rows]
    return ["live at the peak:", *lines]
