"""``hairpin bench``: benchmarks on emulated links, as tables, JSON and curves."""

import json as json_text
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hairpin.cli.output import print_json, print_text, say, stdout
from hairpin.errors import OutputError
from hairpin.units import format_bytes, format_time

_RESULTS = Path("benchmarks/results")

app = typer.Typer(
    help="Measure bytes and time on links of limited bandwidth (needs root for the limits).",
    no_args_is_help=True,
)

Ranks = Annotated[int, typer.Option(min=1, help="Local ranks to start.")]
Rounds = Annotated[int, typer.Option(min=1, help="Samples of each step; the median counts.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON and the curve.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("sp2d")
def sp2d(
    *,
    ranks: Ranks = 4,
    rates: Annotated[
        str, typer.Option(help="Bandwidths of each rank's link, separated by commas.")
    ] = "unlimited,1gbit,400mbit,200mbit,100mbit,50mbit",
    rounds: Rounds = 9,
    frames: Annotated[int, typer.Option(min=1)] = 64,
    patches: Annotated[int, typer.Option(min=1)] = 64,
    channels: Annotated[int, typer.Option(min=1)] = 64,
    heads: Annotated[int, typer.Option(min=1, help="A divisor of the channels.")] = 4,
    sync_gradients: Annotated[
        bool,
        typer.Option("--sync-gradients", help="Average parameter gradients in every step."),
    ] = False,
    out: Out = _RESULTS,
    json: Json = False,
) -> None:
    """Time DSP, Ulysses, ring and Megatron-SP on one 2-D transformer against bandwidth."""
    _quiet_torch()
    _make(out)
    _warn_of_load()
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
    result = measure(settings, say=say)
    name = "sp2d-sync" if sync_gradients else "sp2d"
    path = _save(result, out, name)
    if len(result["runs"]) > 1:
        say(f"wrote {draw_speedups(result, path.with_suffix('.png'))}")
    if json:
        print_json(result)
    else:
        _print_sp2d(result)


@app.command("switch")
def switch(
    *,
    ranks: Annotated[int, typer.Option(min=2, help="Local ranks to start.")] = 4,
    rate: Annotated[str, typer.Option(help="Bandwidth of each rank's link.")] = "200mbit",
    size: Annotated[str, typer.Option(help="Size of the whole tensor.")] = "32MB",
    rounds: Rounds = 7,
    out: Out = _RESULTS,
    json: Json = False,
) -> None:
    """Count a switch on the wire, hide it behind work, and compare it with torch's own."""
    _quiet_torch()
    _make(out)
    _warn_of_load()
    from hairpin.bench.switching import Settings, measure
    from hairpin.units import parse_bytes

    settings = Settings(ranks=ranks, rate=rate, whole_bytes=parse_bytes(size), rounds=rounds)
    result = measure(settings, say=say)
    _save(result, out, "switch")
    if json:
        print_json(result)
    else:
        _print_switch(result)


def _quiet_torch() -> None:
    """Keep torch's warnings about host names, which mean nothing here, out of the way."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _warn_of_load() -> None:
    from hairpin.bench.measure import foreign_load

    warning = foreign_load()
    if warning is not None:
        say(warning)


def _save(result: dict[str, Any], folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    try:
        path.write_text(json_text.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error
    say(f"wrote {path}")
    return path


def _make(folder: Path) -> None:
    """Make the folder before anything is measured, so that no measurement is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write into {folder}: {error.strerror}; name a folder you may write to with --out"
    )


def _print_sp2d(result: dict[str, Any]) -> None:
    from rich.table import Table

    methods = list(result["expected_bytes"])
    table = Table(box=None, title="time per step (times that of dsp)")
    for heading in ("rate", *methods):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in result["runs"]:
        times = {name: run["methods"][name]["step"]["time_s"] * 1e3 for name in methods}
        slower = {name: f" ({ratio:.2f})" for name, ratio in run["speedup"].items()}
        cells = (f"{times[name]:.0f} ms{slower.get(name, '')}" for name in methods)
        table.add_row(run["rate"], *cells)
    stdout().print(table, _bytes_table(result), sep="\n\n")


def _bytes_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    run, ranks = result["runs"][-1], result["settings"]["ranks"]
    table = Table(box=None, title="bytes sent per rank, mean over ranks")
    headings = ("method", "forward", "by formula", "on the wire", "step, wire", "dsp / it")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
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


def _print_switch(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, title="bytes of one switch, all ranks together")
    for heading in ("shape", "by formula", "payload", "on the wire", "wire / formula", "if padded"):
        table.add_column(heading, justify="right", no_wrap=True)
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
