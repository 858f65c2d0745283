"""``hairpin verify fold``: our AlphaFold against DeepMind's own numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hairpin.cli import train
from hairpin.cli.output import print_json, print_text, say

if TYPE_CHECKING:
    from hairpin.run.verify import Check, Verdict

_FAILED = 1

app = typer.Typer(help="Compare a model with an independent truth.", no_args_is_help=True)


@app.callback()
def verify() -> None:
    """Compare a model with an independent truth."""


@app.command("fold")
def fold(
    *,
    oracle: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.npz", help="Compare with this file; all shipped if left out."),
    ] = None,
    recycles: Annotated[
        int | None, typer.Option(min=0, help="How often the oracle recycled, if no name says so.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the oracle's structure module.")
    ] = None,
    ranks: train.Ranks = None,
    product: train.Product = "gather",
    passing: train.Passing = "gather",
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run DeepMind's own inputs and parameters through our AlphaFold and compare every output."""
    from dataclasses import asdict

    from hairpin.run.verify import shipped, verify_on_ranks

    count = train.rank_count(ranks)
    train.require_way(product, passing)
    how = {"product": product, "passing": passing, "recycles": recycles, "layers": layers}
    files = oracle or shipped()
    verdicts = train.on_folding_ranks(verify_on_ranks, count, files, sp=count, **how)
    if verdicts is None:  # under torchrun, on all ranks but the first
        return
    if json:
        print_json([{**asdict(v), "passed": v.passed, "checks": _plain(v)} for v in verdicts])
    else:
        print_text("\n".join(line for verdict in verdicts for line in _lines(verdict)))
    failed = [verdict.file for verdict in verdicts if not verdict.passed]
    if failed:
        say(f"FAIL: {', '.join(failed)}")
        raise typer.Exit(_FAILED)


def _plain(verdict: "Verdict") -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [{**asdict(check), "passed": check.passed} for check in verdict.checks]


def _lines(verdict: "Verdict") -> list[str]:
    """One line for every output; gradients that pass are one line together."""
    gradients = [check for check in verdict.checks if check.name.startswith("grad/")]
    others = [check for check in verdict.checks if not check.name.startswith("grad/")]
    shown = others + [check for check in gradients if not check.passed]
    width = max((len(check.name) for check in shown), default=0)
    over = f", over {verdict.ranks} ranks" if verdict.ranks > 1 else ""
    recycles = f"{verdict.recycles} recycles"
    head = f"{verdict.file}: {verdict.model}, {recycles}{over}, {verdict.time_s:.1f} s"
    lines = [head, *(_line(check, width) for check in shown)]
    if gradients:
        good = [check for check in gradients if check.passed]
        worst = max((check.error for check in good if not check.note), default=0.0)
        lines.append(
            f"  {len(good)} of {len(gradients)} gradients pass, at worst {worst:.1e} of the largest"
        )
    return [*lines, f"  {'PASS' if verdict.passed else 'FAIL'}", ""]


def _line(check: "Check", width: int) -> str:
    word = "PASS" if check.passed else "FAIL"
    note = f"  {check.note}" if check.note else ""
    return f"  {check.name:<{width}}  {check.error:.1e}  {word}{note}"
