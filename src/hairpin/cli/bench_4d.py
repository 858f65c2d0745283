"""``hairpin bench 4d``: what it asks, and its tables."""

from typing import Annotated, Any

import typer

from hairpin.cli import bench_options as options
from hairpin.cli.bench_run import prepare, run_bench
from hairpin.cli.output import Json, new_table, print_result, print_text, stdout
from hairpin.units import format_bytes, format_time


def four_d(
    *,
    ranks: options.SeveralRanks = 4,
    layouts: Annotated[
        str | None,
        typer.Option(
            help="Such as ddp4,fsdp2 sp2,sp2 tp2: by commas, outermost first; all if left out."
        ),
    ] = None,
    hosts: options.Hosts = None,
    rates: options.RatesOfHosts = "200mbit,1gbit",
    inner_rate: options.InnerRate = "unlimited",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step, over all ranks.")] = 8,
    method: Annotated[
        str, typer.Option(help="How attention crosses the ranks of a row: ring, ulysses, ...")
    ] = "ring",
    virtual_gflops: options.VirtualGflops = 10.0,
    rounds: options.Rounds = 2,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Train one small language model over the same ranks in several ways, and compare them.

    Data (ddp, fsdp), stages (pp), sequence (sp), weights (tp), and two or more of them at once.
    Losses, calls and memory are checked and counted with real kernels; in the timed steps matrix
    products and attention sleep as long as a device of the given speed would compute.
    """
    prepare(out)
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
        virtual_flops_per_s=options.flops_per_s(virtual_gflops),
    )
    name = "4d" if hosts is None else f"4d-{hosts}-hosts"
    result = run_bench(bench.measure, settings, out=out, name=name)
    print_result(result, _print, json=json)


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
    headings = ("layout", "calls", "held all the time", "beyond that at most", "loss off by")
    table = new_table("counted, of the rank with most", headings, left=("layout",))
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
    hosts = any(row["host_bytes"] for row in run["layouts"])
    headings = ("layout", "time", "of the best", "sent by a rank", "leaves a host")
    shown = headings if hosts else headings[:-1]
    table = new_table(f"a step at {run['rate']}", shown, left=("layout",))
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
