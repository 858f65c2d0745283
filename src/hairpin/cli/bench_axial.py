"""``hairpin bench axial``: what it asks, and its tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hairpin.cli import bench_options as options
from hairpin.cli.bench_run import prepare, run_bench
from hairpin.cli.output import Json, new_table, print_result, print_text, stdout
from hairpin.units import format_bytes, format_time

_LEAST = 15  # characters of the names of ways

Parts = Annotated[
    str | None,
    typer.Option(help="Of bytes, memory, time, triangles, scaling, by commas; all if left out."),
]
Manners = Annotated[
    str | None,
    typer.Option(
        help="Product, passing, pieces of timed blocks, such as ring ring,channels gather 4."
    ),
]
Cases = Annotated[
    str,
    typer.Option(
        help="Whose memory is counted: sequences x residues : ranks / ranks ..., by commas."
    ),
]
FlopsPerByte = Annotated[
    float,
    typer.Option(
        min=0.01, help="Of the device that is played: products' operations per byte touched."
    ),
]


def axial(
    *,
    parts: Parts = None,
    ranks: Annotated[int, typer.Option(min=2, help="Of timed runs and measured memory.")] = 4,
    counted: Annotated[
        str, typer.Option(help="Numbers of ranks whose bytes are counted, by commas.")
    ] = "2,4",
    rate: Annotated[str, typer.Option(help="Bandwidth of each rank's link in timed runs.")] = (
        "200mbit"
    ),
    sequences: options.Count = 64,
    residues: options.Count = 128,
    manners: Manners = None,
    rehearsed: Cases = "64x128:2/4/8/16,512x2048:64/512",
    flops_per_byte: FlopsPerByte = 12.5,
    published: Annotated[
        Path, typer.Option(help="The table of published figures that scaling is compared with.")
    ] = Path("../shared/data/published_results.csv"),
    rounds: options.Rounds = 3,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Measure an Evoformer block over several ranks: bytes, memory, time, and training to 512.

    All manners of dynamic axial parallelism, FastFold's order and tensor parallelism, forward and
    backward. In timed runs kernels sleep as long as a device would compute whose speed is chosen so
    that computing takes as long as transferring.
    """
    prepare(out)
    from hairpin.bench import axial as bench
    from hairpin.bench.axial_ways import Size

    settings = bench.Settings(
        parts=options.chosen(parts, bench.PARTS),
        ranks=ranks,
        counted=options.lengths(counted),
        rate=rate,
        size=Size(sequences, residues),
        rehearsed=_rehearsed(rehearsed),
        rounds=rounds,
        flops_per_byte=flops_per_byte,
        published=str(published),
        **({} if manners is None else {"timed": _manners(manners)}),
    )
    everything = set(settings.parts) == set(bench.PARTS)
    name = "axial" if everything else f"axial-{'-'.join(settings.parts)}"
    result = run_bench(bench.measure, settings, out=out, name=name)
    print_result(result, _print, json=json)


def _manners(text: str) -> tuple[Any, ...]:
    from hairpin.planning.axial.choose import Manner
    from hairpin.planning.axial.plan import AxialPlan

    found = []
    for words in text.split(","):
        product, passing, *pieces = words.split() if len(words.split()) > 1 else (words, "gather")
        count = int(pieces[0]) if pieces and pieces[0].isdigit() else 1
        asked: Any = {"product": product, "passing": passing, "pieces": count}
        AxialPlan(**asked)  # refuses what there is not
        found.append(Manner(**asked))
    return tuple(found)


def _rehearsed(text: str) -> tuple[tuple[Any, Sequence[int]], ...]:
    from hairpin.bench.axial_ways import Size

    found = []
    for case in text.split(","):
        lengths, _, ranks = case.partition(":")
        sequences, _, residues = lengths.partition("x")
        try:
            sizes = Size(int(sequences), int(residues))
            found.append((sizes, tuple(int(n) for n in ranks.split("/"))))
        except ValueError:
            raise typer.BadParameter(
                f"{case!r} is not of the form 64x128:2/4, sequences x residues : ranks",
                param_hint="--rehearsed",
            ) from None
    return tuple(found)


def _print(result: dict[str, Any]) -> None:
    for run in result.get("bytes", ()):
        _show(_bytes_table(run))
    if "memory" in result:
        _show(_memory_table(result["memory"]))
        _show(_measured_table(result["memory_measured"]))
    runs = [("an Evoformer block", result["time"])] if "time" in result else []
    runs += [(f"triangle {part}", run) for part, run in result.get("triangles", {}).items()]
    for title, run in runs:
        _show(_time_table(title, run))
        print_text(
            f"played at {run['flops_per_s'] / 1e9:.3g} GFLOP/s, {run['touched_per_s'] / 1e9:.3g} "
            f"GB/s touched; predicted times are off by {run['median_time_error']:.0%} in the "
            f"median and {run['worst_time_error']:.0%} at worst"
        )
        print_text(
            "/ work: time over the least work; at once: every transfer awaited where it starts; "
            "none: no transfers; hidden: of all transfers; hideable: of what the plan could hide\n"
        )
    if "scaling" in result:
        _print_scaling(result["scaling"])
    print_text(result["wire"])


def _show(table: Any) -> None:
    stdout().print(table)
    print_text("")


def _bytes_table(run: dict[str, Any]) -> Any:
    published = format_bytes(run["published_forward_bytes"])
    title = f"sent by a rank of {run['ranks']}; published scheme, padded, forward: {published}"
    headings = ("", "forward", "of published", "wire / plan", "backward", "wire / plan")
    table = new_table(title, headings, least=_LEAST)
    for row in run["methods"]:
        forward, backward = row["forward"], row["backward"]
        table.add_row(
            row["method"],
            _sent(forward),
            f"{forward['over_published']:.3f}",
            _ratio(forward["wire_over_plan"]),
            _sent(backward),
            _ratio(backward["wire_over_plan"]),
        )
    return table


def _sent(part: dict[str, Any]) -> str:
    exact = "" if part["exact"] else " NOT as planned"
    return format_bytes(max(part["payload_bytes"])) + exact


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _memory_table(rows: Sequence[dict[str, Any]]) -> Any:
    title = "most that a rank holds beyond inputs and parameters; over an N-th of one rank's"
    headings = ("", "size", "ranks", "forward", "x N", "with backward", "x N")
    table = new_table(title, headings, least=_LEAST)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['sequences']} x {row['residues']}",
            str(row["ranks"]),
            format_bytes(row["forward_bytes"]),
            f"{row['forward_over_part']:.2f}",
            format_bytes(row["step_bytes"]),
            f"{row['step_over_part']:.2f}",
        )
    return table


def _measured_table(rows: Sequence[dict[str, Any]]) -> Any:
    title = "measured by ranks that compute, over what was counted; the rank that is worst"
    table = new_table(title, ("", "forward", "with backward"), least=_LEAST)
    for row in rows:
        ratios = []
        for name in ("forward", "step"):
            pairs = zip(row[name]["measured_bytes"], row[name]["planned_bytes"], strict=True)
            ratios.append(max((m / p for m, p in pairs), key=lambda ratio: abs(ratio - 1)))
        table.add_row(row["method"], *(f"{ratio:.4f}" for ratio in ratios))
    return table


def _time_table(title: str, run: dict[str, Any]) -> Any:
    headings = ("", "time", "/ work", "at once", "none", "predicted", "hidden", "hideable")
    table = new_table(f"{title}, forward and backward", headings, least=_LEAST)
    for row in run["methods"]:
        table.add_row(
            row["method"],
            format_time(row["time_s"]),
            f"{row['over_work']:.2f} x",
            format_time(row["at_once_s"]),
            format_time(row["none_s"]),
            format_time(row["predicted_s"]),
            _percent(row["hidden"]),
            _percent(row["hidden_of_hideable"]),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _print_scaling(scaling: dict[str, Any]) -> None:
    if not scaling["rows"]:
        return
    headings = ("", "ranks, dap", "published", "predicted", "off by", "calibrated", "off by")
    table = new_table("published, and predicted", headings, least=_LEAST - 3)
    for row in scaling["rows"]:
        table.add_row(
            f"{row['system']}, {row['what']}",
            f"{row['devices']}, {row['dap']}",
            f"{row['published']:g} {row['unit']}",
            f"{row['uncalibrated']:.3g}",
            f"{row['uncalibrated_error']:+.0%}",
            f"{row['calibrated']:.3g}",
            "on this" if row.get("calibrated_on") else f"{row['calibrated_error']:+.0%}",
        )
    _show(table)
    for line in (*scaling["assumptions"], *scaling["not_predicted"]):
        print_text(f"- {line}")
