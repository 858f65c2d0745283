"""``hairpin bench 4d``: what it asks, and its tables."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hairpin.cli.bench import (
    _RESULTS,
    Json,
    Rounds,
    _make,
    _quiet_torch,
    _save,
    _warn_of_load,
)
from hairpin.cli.output import print_json, print_text, say, stdout
from hairpin.units import format_bytes, format_time


def four_d(
    *,
    ranks: Annotated[int, typer.Option(min=2, help="Local ranks to start.")] = 4,
    layouts: Annotated[
        str | None,
        typer.Option(
            help="Such as ddp4,fsdp2 sp2,sp2 tp2: by commas, outermost first; all if left out."
        ),
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(min=1, help="Hosts whose ranks share one link; a link per rank if left out."),
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Bandwidths of each rank's link, or each host's, by commas.")
    ] = "200mbit,1gbit",
    inner_rate: Annotated[
        str, typer.Option(help="Bandwidth of each rank's link inside a host.")
    ] = "unlimited",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step, over all ranks.")] = 8,
    method: Annotated[
        str, typer.Option(help="How attention crosses the ranks of a row: ring, ulysses, ...")
    ] = "ring",
    virtual_gflops: Annotated[
        float,
        typer.Option(min=0.0, help="Speed of the device that is played; 0: real kernels."),
    ] = 10.0,
    rounds: Rounds = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = _RESULTS,
    json: Json = False,
) -> None:
    """Train one small language model over the same ranks in several ways, and compare them.

    Data (ddp, fsdp), stages (pp), sequence (sp), weights (tp), and two or more of them at once.
    Losses, calls and memory are checked and counted with real kernels; in the timed steps matrix
    products and attention sleep as long as a device of the given speed would compute.
    """
    _quiet_torch()
    _make(out)
    _warn_of_load()
    from hairpin.bench import four_d as bench

    settings = bench.Settings(
        ranks=ranks,
        layouts=() if layouts is None else tuple(layouts.split(",")),
        hosts=hosts,
        rates=tuple(rates.split(",")),
        inner_rate=inner_rate,
        length=length,
        batch_size=batch_size,
        method=method,
        rounds=rounds,
        virtual_flops_per_s=virtual_gflops * 1e9 or None,
    )
    result = bench.measure(settings, say=say)
    _save(result, out, "4d" if hosts is None else f"4d-{hosts}-hosts")
    if json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    stdout().print(_counted_table(result))
    for layout, reason in result["refused"].items():
        print_text(f"{layout}: {reason}")
    for run in result["runs"]:
        stdout().print(_timed_table(run))
    worst = max(row["worst_loss_error"] for row in result["layouts"])
    print_text(f"losses of two steps differ from one process's by at most {worst:.0e} of them")
    print_text(f"{result['compute']}; {result['wire']}")


def _counted_table(result: dict[str, Any]) -> Any:
    """Of the rank that has most of each."""
    from rich.table import Table

    table = Table(box=None, title="counted, of the rank with most")
    for heading in ("layout", "calls", "held all the time", "beyond that at most", "loss off by"):
        table.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for row in result["layouts"]:
        table.add_row(
            row["layout"],
            str(max(sum(calls.values()) for calls in row["calls"])),
            format_bytes(max(row["held_bytes"])),
            format_bytes(max(row["peak_bytes"])),
            f"{row['worst_loss_error']:.0e}",
        )
    return table


def _timed_table(run: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, title=f"a step at {run['rate']}")
    hosts = any(row["host_bytes"] for row in run["layouts"])
    headings = ("layout", "time", "of the best", "sent by a rank", "leaves a host")
    for heading in headings if hosts else headings[:-1]:
        table.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    for row in sorted(run["layouts"], key=lambda row: float(row["time_s"])):
        table.add_row(
            row["layout"],
            format_time(row["time_s"]),
            f"{row['over_best']:.2f} x",
            _most(row["wire_bytes"]),
            *([_most(row["host_bytes"])] if hosts else []),
        )
    return table


def _most(counts: list[float] | None) -> str:
    return "not counted" if counts is None else format_bytes(round(max(counts)))
