"""``hairpin bench``: benchmarks as tables, JSON and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hairpin.cli import bench_options as options
from hairpin.cli.bench_run import prepare, run_bench
from hairpin.cli.output import Json, new_table, print_result, print_text, say, stdout
from hairpin.units import format_bytes, format_time

app = typer.Typer(
    help="Measure bytes and time: of links of limited bandwidth (as root), and of memory budgets.",
    no_args_is_help=True,
)


@app.command("sp2d")
def sp2d(
    *,
    ranks: options.Ranks = 4,
    rates: options.Rates = "unlimited,1gbit,400mbit,200mbit,100mbit,50mbit",
    rounds: options.Rounds = 9,
    frames: options.Count = 64,
    patches: options.Count = 64,
    channels: options.Count = 64,
    heads: Annotated[int, typer.Option(min=1, help="A divisor of the channels.")] = 4,
    sync_gradients: Annotated[
        bool,
        typer.Option("--sync-gradients", help="Average parameter gradients in every step."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the curve.")] = options.RESULTS,
    json: Json = False,
) -> None:
    """Time DSP, Ulysses, ring and Megatron-SP on one 2-D transformer against bandwidth."""
    prepare(out)
    from hairpin.bench.curve import draw_speedups
    from hairpin.bench.sp2d import Settings, measure
    from hairpin.bench.transformer import Size

    settings = Settings(
        ranks=ranks,
        rates=tuple(rates.split(",")),
        size=Size(t=frames, s=patches, c=channels, heads=heads),
        rounds=rounds,
        sync_gradients=sync_gradients,
    )
    name = "sp2d-sync" if sync_gradients else "sp2d"
    result = run_bench(measure, settings, out=out, name=name)
    if len(result["runs"]) > 1:
        say(f"wrote {draw_speedups(result, out / f'{name}.png')}")
    print_result(result, _print_sp2d, json=json)


@app.command("switch")
def switch(
    *,
    ranks: options.SeveralRanks = 4,
    rate: Annotated[str, typer.Option(help="Bandwidth of each rank's link.")] = "200mbit",
    size: Annotated[str, typer.Option(help="Size of the whole tensor.")] = "32MB",
    rounds: options.Rounds = 7,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Count a switch on the wire, hide it behind work, and compare it with torch's own."""
    prepare(out)
    from hairpin.bench.switching import Settings, measure
    from hairpin.units import parse_bytes

    settings = Settings(ranks=ranks, rate=rate, whole_bytes=parse_bytes(size), rounds=rounds)
    result = run_bench(measure, settings, out=out, name="switch")
    print_result(result, _print_switch, json=json)


@app.command("chunk")
def chunk(
    *,
    parts: options.Which = None,
    models: Annotated[
        str | None, typer.Option(help="Titles of models, separated by semicolons; all if left out.")
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Budgets as parts of the model's own peak, separated by commas.")
    ] = "0.5,0.3,0.2",
    rounds: options.Rounds = 5,
    longest_budget: Annotated[
        str, typer.Option(help="Budget that the longest length is looked for in.")
    ] = "2GiB",
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Keep third-party models under budgets of memory, and say what that costs."""
    prepare(out)
    from hairpin.bench import chunking
    from hairpin.units import parse_bytes

    settings = chunking.Settings(
        parts=options.chosen(parts, chunking.PARTS),
        titles=() if models is None else tuple(name.strip() for name in models.split(";")),
        ratios=_ratios(ratios),
        rounds=rounds,
        longest_budget_bytes=parse_bytes(longest_budget),
    )
    result = run_bench(chunking.measure, settings, out=out, name="chunk")
    print_result(result, _print_chunk, json=json)


@app.command("openfold")
def openfold(
    *,
    openfold: Annotated[
        Path, typer.Option(help="Folder of a checkout of github.com/aqlaboratory/openfold.")
    ],
    sizes: Annotated[
        str, typer.Option(help="Sequences x residues of the MSA, separated by commas.")
    ] = "64x128,128x256",
    rounds: options.Rounds = 5,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Time and peak memory of our Evoformer block against OpenFold's, with the same weights."""
    prepare(out)
    from hairpin.bench import openfold as bench

    settings = bench.Settings(openfold=str(openfold), sizes=_sizes(sizes), rounds=rounds)
    result = run_bench(bench.measure, settings, out=out, name="openfold")
    print_result(result, _print_openfold, json=json)


@app.command("kernels")
def kernels(
    *,
    operations: options.Which = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Residues, separated by commas; 32,64,128 on a CPU and 256 to 4096 on CUDA."
        ),
    ] = None,
    rounds: options.Rounds = 5,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Time the kernels and their peak memory against what torch has, with and without backward."""
    prepare(out)
    from hairpin.bench import kernels as bench

    settings = bench.Settings(
        operations=options.chosen(operations, bench.OPERATIONS),
        lengths=() if lengths is None else options.lengths(lengths),
        rounds=rounds,
    )
    result = run_bench(bench.measure, settings, out=out, name="kernels")
    print_result(result, _print_kernels, json=json)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for word in text.split(","):
        sequences, _, residues = word.strip().partition("x")
        if not (sequences.isdecimal() and residues.isdecimal() and int(sequences) * int(residues)):
            raise typer.BadParameter(
                f"cannot read the size {word.strip()!r}; write sequences, x and residues, "
                "separated by commas, for example 64x128,128x256"
            )
        found.append((int(sequences), int(residues)))
    return tuple(found)


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < ratio <= 1 for ratio in found):
        raise typer.BadParameter(
            f"cannot read the ratios {text!r}; write numbers above 0 and up to 1, separated by "
            "commas, for example 0.5,0.2"
        )
    return found


def _print_sp2d(result: dict[str, Any]) -> None:
    methods = list(result["expected_bytes"])
    table = new_table("time per step (times that of dsp)", ("rate", *methods))
    for run in result["runs"]:
        times = {name: run["methods"][name]["step"]["time_s"] * 1e3 for name in methods}
        slower = {name: f" ({ratio:.2f})" for name, ratio in run["speedup"].items()}
        cells = (f"{times[name]:.0f} ms{slower.get(name, '')}" for name in methods)
        table.add_row(run["rate"], *cells)
    stdout().print(table, _bytes_table(result), sep="\n\n")


def _bytes_table(result: dict[str, Any]) -> Any:
    run, ranks = result["runs"][-1], result["settings"]["ranks"]
    headings = ("method", "forward", "by formula", "on the wire", "step, wire", "dsp / it")
    table = new_table("bytes sent per rank, mean over ranks", headings)
    for name, parts in run["methods"].items():
        on_wire = [
            format_bytes(sum(parts[part]["wire_bytes"]) / ranks)
            if parts[part]["wire_bytes"]
            else "not counted"
            for part in ("forward", "step")
        ]
        ratio = run["bytes_ratio"].get(name)
        table.add_row(
            name,
            format_bytes(sum(parts["forward"]["payload_bytes"]) / ranks),
            format_bytes(result["expected_bytes"][name]["forward"]),
            *on_wire,
            "" if ratio is None else f"{ratio['forward']:.3f}",
        )
    return table


def _print_chunk(result: dict[str, Any]) -> None:
    for part, title in (("summary", "all models at each budget"), ("table", "each model")):
        if result.get(part):
            stdout().print(_chunk_table(part, title, result[part]))
    others = [part for part in result["settings"]["parts"] if part != "table"]
    if others:
        print_text(f"{', '.join(others)}: in the JSON")


def _chunk_table(part: str, title: str, rows: Sequence[dict[str, Any]]) -> Any:
    describe = _summary_cells if part == "summary" else _row_cells
    table = new_table(title, describe(rows[0]), left=("model",))
    for row in rows:
        table.add_row(*describe(row).values())
    return table


def _summary_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "budget": f"{row['ratio']:g}",
        "fits": f"{row['feasible']} of {row['rows']}",
        "honoured": str(row["honoured"]),
        "as certified": str(row["exact"]),
        "time, median": _times(row["median_time_ratio"]),
        "worst": _times(row["worst_time_ratio"]),
        "error": _number(row["worst_relative_error"], ".0e"),
    }


def _row_cells(row: dict[str, Any]) -> dict[str, str]:
    fits = row["peak_bytes"] is not None
    floor = row["floor_bytes"]
    least = "no plan" if not floor else f"floor {floor / row['eager_peak_bytes']:.2f}"
    return {
        "model": f"{row['model']} {row['variant']}".strip(),
        "budget": f"{row['ratio']:g}",
        "peak": f"{row['peak_bytes'] / row['eager_peak_bytes']:.3f}" if fits else least,
        "time": _times(row["time_ratio"]),
        "error": _number(row["relative_error"], ".0e"),
        "search": _number(row["search_s"], ".1f", " s"),
    }


def _times(ratio: float | None) -> str:
    return _number(ratio, ".2f", " x")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _print_openfold(result: dict[str, Any]) -> None:
    blocks: dict[str, list[dict[str, Any]]] = {}
    for row in result["table"]:
        title = f"{row['sequences']} x {row['residues']}, {row['direction']}"
        blocks.setdefault(title, []).append(row)
    for title, rows in blocks.items():
        headings = ("block", "peak", "of OpenFold's", "time", "error")
        table = new_table(title, headings, left=("block",))
        for row in rows:
            peak = row["peak_bytes"]
            table.add_row(
                f"{row['whose']}, {row['setting']}",
                "no plan" if peak is None else format_bytes(peak),
                _number(row["peak_ratio"], ".2f"),
                _times(row["time_ratio"]),
                _number(row["relative_error"], ".0e"),
            )
        stdout().print(table)


def _print_switch(result: dict[str, Any]) -> None:
    headings = ("shape", "by formula", "payload", "on the wire", "wire / formula", "if padded")
    table = new_table("bytes of one switch, all ranks together", headings)
    for row in result["shapes"]:
        on_wire, ratio = row["wire_bytes"], row["wire_over_expected"]
        table.add_row(
            f"{row['t']} x {row['s']}",
            str(sum(row["expected_bytes"])),
            str(sum(row["payload_bytes"])),
            "not counted" if on_wire is None else f"{sum(on_wire):.0f}",
            "" if ratio is None else f"{ratio:.4f}",
            f"{row['padded_over_expected']:.2f} x",
        )
    stdout().print(table)
    print_text("\n" + "\n".join(_switch_lines(result)))


def _switch_lines(result: dict[str, Any]) -> list[str]:
    peers, overlap = result["peers"], result["overlap"]
    times = {name: format_time(f["time_s"]) for name, f in peers["figures"].items()}
    spans = {name: format_time(time_s) for name, time_s in overlap["times_s"].items()}
    against = (
        f"all_to_all_single / receive_first {peers['all_to_all_single_over_receive_first']:.2f}, "
        f"dtensor / switch {peers['dtensor_over_switch']:.2f}"
    )
    together = (
        f"transfer {spans['transfer']}, work {spans['work']}, both at once {spans['both']}: "
        f"{overlap['hidden']:.1%} of what can be hidden is hidden"
    )
    return [", ".join(f"{name} {time}" for name, time in times.items()), against, together]


def _print_kernels(result: dict[str, Any]) -> None:
    title = f"on {result['device']}, {result['dtype'].removeprefix('torch.')}"
    headings = ("operation", "R", "backward", "by", "time", "peak")
    table = new_table(title, headings, left=("operation", "by"))
    for row in result["rows"]:
        fits = row["time_s"] is not None
        table.add_row(
            row["operation"],
            str(row["length"]),
            "yes" if row["backward"] else "no",
            row["contender"],
            format_time(row["time_s"]) if fits else "out of memory",
            format_bytes(row["peak_bytes"]) if fits else "",
        )
    stdout().print(table)
    print_text(f"GPU: {result['gpu']}")
