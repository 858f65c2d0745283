"""``hairpin bench linear``: what it asks, and its tables."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hairpin.cli.bench import (
    _RESULTS,
    Json,
    Rounds,
    _chosen,
    _lengths,
    _make,
    _quiet_torch,
    _save,
    _warn_of_load,
)
from hairpin.cli.output import print_json, print_text, say, stdout
from hairpin.units import format_bytes, format_time


def linear(
    *,
    parts: Annotated[
        str | None, typer.Option(help="Of speed and longest, by commas; both if left out.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of local ranks, by commas.")] = "4,8",
    rates: Annotated[
        str, typer.Option(help="Bandwidths of each rank's link, by commas.")
    ] = "200mbit,1gbit",
    lengths: Annotated[str, typer.Option(help="Of the whole sequence, by commas.")] = "1024,2048",
    heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Attention layers in a row.")] = 8,
    virtual_gflops: Annotated[
        float,
        typer.Option(min=0.0, help="Speed of the device that is played; 0: real kernels."),
    ] = 4.0,
    budget: Annotated[
        str, typer.Option(help="Bytes per rank that the longest sequence is looked for in.")
    ] = "16MiB",
    longest_ranks: Annotated[
        str, typer.Option(help="Numbers of ranks that share the longest sequence, by commas.")
    ] = "1,2,4,8",
    groups: Annotated[
        int | None,
        typer.Option(min=1, help="Key/value heads of the longest's ring; all if left out."),
    ] = None,
    rounds: Rounds = 3,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = _RESULTS,
    json: Json = False,
) -> None:
    """Time linear attention's schedules against work alone and LASP's order; find longest lengths.

    Kernels sleep as long as a device of the given speed would compute, unless that is 0: with
    fewer cores than ranks, real work would delay the transfers it should hide.
    """
    _quiet_torch()
    _make(out)
    _warn_of_load()
    from hairpin.bench import linear as bench
    from hairpin.bench.longest import Longest
    from hairpin.units import parse_bytes

    settings = bench.Settings(
        parts=bench.PARTS if parts is None else _chosen(parts, bench.PARTS),
        ranks=_lengths(ranks),
        rates=tuple(rates.split(",")),
        lengths=_lengths(lengths),
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        rounds=rounds,
        virtual_flops_per_s=virtual_gflops * 1e9 or None,
        longest=Longest(
            budget_bytes=parse_bytes(budget),
            ranks=_lengths(longest_ranks),
            heads=heads,
            groups=groups or heads,
            head_dim=head_dim,
        ),
    )
    result = bench.measure(settings, say=say)
    _save(result, out, "linear" if "speed" in settings.parts else "linear-longest")
    if json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    for run in result.get("runs", ()):
        for case in run["cases"]:
            title = f"{run['ranks']} ranks, {run['rate']}, length {case['length']}"
            stdout().print(_speed_table(title, case))
            print_text("")
    if "runs" in result:
        print_text(f"{result['compute']}; {result['wire']}")
        print_text(
            "/ alone: time over the work's alone; bytes: sent per layer, forward, by the rank that "
            "sends most; / formula: bytes on the wire over the formula's, the worse direction\n"
        )
    if "longest" in result:
        stdout().print(_longest_table(result))


def _speed_table(title: str, case: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, title=title)
    headings = ("forward", "backward", "/ alone", "bytes", "/ formula", "transfers")
    table.add_column("", min_width=13)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in case["methods"]:
        table.add_row(*_speed_row(row))
    return table


def _speed_row(row: dict[str, Any]) -> tuple[str, ...]:
    forward, backward = row["forward"], row["backward"]
    wrong = row["error"] is not None and row["error"] > 1e-3
    sent = max(forward["payload_bytes"]) / row["layers"]
    exact = "" if row["payload_as_formula"] else " NOT exact"
    wire = row["wire_over_formula"]
    return (
        row["method"] + (f" (error {row['error']:.0e})" if wrong else ""),
        format_time(forward["time_s"]),
        format_time(backward["time_s"]),
        f"{row['over_alone']:.2f} x",
        format_bytes(round(sent)) + exact,
        "" if wire is None else f"{wire:.3f}",
        f"{forward['collectives']} + {backward['collectives']}",
    )


def _longest_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    longest = result["longest"]
    budget = format_bytes(longest["budget_bytes"])
    table = Table(box=None, title=f"longest sequence, {budget} on each rank")
    for heading in ("", "ranks", "length", "turns", "held", "growth", "of linear"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for row in longest["rows"]:
        table.add_row(
            row["method"],
            str(row["ranks"]),
            str(row["length"]),
            str(row["turns"]),
            format_bytes(row["peak_bytes"]),
            f"{row['growth']:.2f} x",
            f"{row['linear']:.2f}",
        )
    return table
