"""``hairpin bench attention``: what it asks, and its tables."""

from typing import Annotated, Any

import typer

from hairpin.cli import bench_options as options
from hairpin.cli.bench_run import prepare, run_bench
from hairpin.cli.output import Json, new_table, print_result, print_text, stdout
from hairpin.units import format_time


def attention(
    *,
    ranks: options.Ranks = 4,
    hosts: options.Hosts = None,
    rates: options.RatesOfHosts = "200mbit,1gbit",
    inner_rate: options.InnerRate = "unlimited",
    length: Annotated[int, typer.Option(min=1, help="Of the whole sequence.")] = 4096,
    heads: options.Count = 8,
    groups: Annotated[
        str, typer.Option(help="Numbers of key/value heads, by commas; divisors of the heads.")
    ] = "8,2",
    head_dim: options.HeadDim = 64,
    masks: Annotated[str, typer.Option(help="Of full and causal, by commas.")] = "full,causal",
    schedules: Annotated[
        str, typer.Option(help="How keys may cross the ranks, by commas; rsa is left out.")
    ] = "ring,double_ring,all_gather,hierarchical",
    virtual_gflops: options.VirtualGflops = 20.0,
    peers: Annotated[
        str | None, typer.Option(help="Other libraries, by commas; all if left out, or none.")
    ] = None,
    rounds: options.Rounds = 3,
    out: options.Out = options.RESULTS,
    json: Json = False,
) -> None:
    """Time every way to split attention against bandwidth, its predicted cost and other libraries.

    Kernels sleep as long as a device of the given speed would compute, unless that is 0: with
    fewer cores than ranks, real work would delay the transfers it should hide.
    """
    prepare(out)
    from hairpin.bench import attention as bench
    from hairpin.bench.attention_peers import PEERS

    settings = bench.Settings(
        ranks=ranks,
        hosts=hosts,
        rates=tuple(rates.split(",")),
        inner_rate=inner_rate,
        length=length,
        heads=heads,
        groups=options.lengths(groups),
        head_dim=head_dim,
        masks=options.chosen(masks, tuple(bench.MASKS)),
        schedules=options.chosen(schedules, (*bench.SCHEDULES, "rsa")),  # type: ignore[arg-type]
        virtual_flops_per_s=options.flops_per_s(virtual_gflops),
        peers=_peers(peers, tuple(PEERS)),
        rounds=rounds,
    )
    name = "attention" if hosts is None else f"attention-{hosts}-hosts"
    result = run_bench(bench.measure, settings, out=out, name=name)
    print_result(result, _print, json=json)


def _peers(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names of peers; those with a comma in them are found too."""
    if text is None:
        return known
    if text.strip() == "none":
        return ()
    left, found = text, []
    for name in sorted(known, key=len, reverse=True):
        if name in left:
            left = left.replace(name, "")
            found.append(name)
    if left.strip(" ,"):
        raise typer.BadParameter(
            f"there is no peer {left.strip(' ,')!r}; write none or some of {'; '.join(known)}"
        )
    return tuple(name for name in known if name in found)


def _print(result: dict[str, Any]) -> None:
    for run in result["runs"]:
        for case in run["cases"]:
            title = f"{run['rate']}, {case['groups']} key/value heads, {case['mask']}"
            stdout().print(_case_table(title, case))
            for peer, reason in case["absent"].items():
                print_text(f"{peer}: {reason}")
            pick = case["pick"]
            print_text(
                f"picked: {pick['method']}; best: {pick['best']}, "
                f"{pick['over_best']:.2f} x its time\n"
            )
        if run["overlap"]:
            print_text("\n".join(_overlap_lines(run)) + "\n")
    print_text(_accuracy_line(result["accuracy"]))
    print_text(f"{result['compute']}; {result['wire']}")


def _case_table(title: str, case: dict[str, Any]) -> Any:
    headings = ("", "forward", "backward", "predicted", "wire / formula", "of the pick")
    table = new_table(title, headings)
    picked_s = case["methods"][0]["time_s"]
    for row in sorted(case["methods"], key=lambda row: float(row["time_s"])):
        ratios = [ratio for ratio in row["wire_over_formula"].values() if ratio is not None]
        table.add_row(
            row["method"],
            format_time(row["forward"]["time_s"]),
            format_time(row["backward"]["time_s"]),
            f"{row['predicted_over_measured']:.2f} x",
            f"{max(ratios):.3f}" if ratios else "",
            f"{row['time_s'] / picked_s:.2f} x",
        )
    for row in case["peers"]:
        wrong = "" if row["error"] < 1e-3 else f" (error {row['error']:.0e})"
        table.add_row(
            row["peer"] + wrong,
            format_time(row["forward"]["time_s"]),
            format_time(row["backward"]["time_s"]),
            "",
            "",
            f"{row['over_pick']:.2f} x",
        )
    return table


def _overlap_lines(run: dict[str, Any]) -> list[str]:
    return [
        f"{run['rate']}, ring at balance, {part}: {times['serial_over_ring']:.2f} x faster than "
        f"without overlap, {times['hidden']:.0%} of what can be hidden is hidden"
        for part, times in run["overlap"].items()
        if isinstance(times, dict)
    ]


def _accuracy_line(accuracy: dict[str, Any]) -> str:
    return (
        f"{accuracy['cases']} cases, {accuracy['methods']} methods: predicted times are off by "
        f"{accuracy['median_time_error']:.0%} in the median, {accuracy['worst_time_error']:.0%} at "
        f"worst; the pick takes at most {accuracy['worst_pick_over_best']:.2f} x the best; "
        f"payload {'as' if accuracy['payload_exact'] else 'NOT as'} predicted to the byte"
    )
