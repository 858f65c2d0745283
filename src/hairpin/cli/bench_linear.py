"""``hairpin bench linear``: what it asks, and its tables."""

from typing import Annotated, Any

import typer

from hairpin.cli import bench_options as options
from hairpin.cli.bench_run import prepare, run_bench
from hairpin.cli.output import Json, new_table, print_result, print_text, stdout
from hairpin.units import format_bytes, format_time


def linear(
    *,
    parts: Annotated[
        str | None, typer.Option(help="Of speed and longest, by commas; both if left out.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of local ranks, by commas.")] = "4,8",
    rates: options.Rates = "200mbit,1gbit",
    lengths: Annotated[str, typer.Option(help="Of the whole sequence, by commas.")] = "1024,2048",
    heads: options.Count = 8,
    head_dim: options.HeadDim = 64,
    layers: Annotated[int, typer.Option(min=1, help="Attention layers in a row.")] = 8,
    virtual_gflops: options.VirtualGflops = 4.0,
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
    rounds: options.Rounds = 3,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Time linear attention's schedules against work alone and LASP's order; find longest lengths.

    Kernels sleep as long as a device of the given speed would compute, unless that is 0: with
    fewer cores than ranks, real work would delay the transfers it should hide.
    """
    prepare(out)
    from hairpin.bench import linear as bench
    from hairpin.bench.longest import Longest
    from hairpin.units import parse_bytes

    settings = bench.Settings(
        parts=options.chosen(parts, bench.PARTS),
        ranks=options.lengths(ranks),
        rates=tuple(rates.split(",")),
        lengths=options.lengths(lengths),
        heads=heads,
        head_dim=head_dim,
        layers=layers,
        rounds=rounds,
        virtual_flops_per_s=options.flops_per_s(virtual_gflops),
        longest=Longest(
            budget_bytes=parse_bytes(budget),
            ranks=options.lengths(longest_ranks),
            heads=heads,
            groups=groups or heads,
            head_dim=head_dim,
        ),
    )
    name = "linear" if "speed" in settings.parts else "linear-longest"
    result = run_bench(bench.measure, settings, out=out, name=name)
    print_result(result, _print, json=json)


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
    headings = ("", "forward", "backward", "/ alone", "bytes", "/ formula", "transfers")
    table = new_table(title, headings, least=13)
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
    longest = result["longest"]
    budget = format_bytes(longest["budget_bytes"])
    headings = ("", "ranks", "length", "turns", "held", "growth", "of linear")
    table = new_table(f"longest sequence, {budget} on each rank", headings)
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
