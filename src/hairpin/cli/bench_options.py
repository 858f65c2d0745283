"""Options that several benchmarks take, and how lists in them are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path("benchmarks/results")

Ranks = Annotated[int, typer.Option(min=1, help="Local ranks to start.")]
SeveralRanks = Annotated[int, typer.Option(min=2, help="Local ranks to start.")]
Hosts = Annotated[
    int | None,
    typer.Option(min=1, help="Hosts whose ranks share one link; a link per rank if left out."),
]
Rates = Annotated[str, typer.Option(help="Bandwidths of each rank's link, by commas.")]
RatesOfHosts = Annotated[
    str, typer.Option(help="Bandwidths of each rank's link, or each host's, by commas.")
]
InnerRate = Annotated[str, typer.Option(help="Bandwidth of each rank's link inside a host.")]
Count = Annotated[int, typer.Option(min=1)]
HeadDim = Annotated[int, typer.Option(min=1, help="Channels of a head.")]
VirtualGflops = Annotated[
    float, typer.Option(min=0.0, help="Speed of the device that is played; 0: real kernels.")
]
Which = Annotated[
    str | None, typer.Option(help="Which to measure, separated by commas; all if left out.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Samples of each step; the median counts.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON.")]


def chosen(text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """Names of what there is; all of them where the option is left out."""
    if text is None:
        return tuple(known)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"there is no part {name!r}; write some of {', '.join(known)}, separated by commas"
            )
    return names


def lengths(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(
            f"cannot read the lengths {text!r}; write whole numbers from 1 on, separated by "
            "commas, for example 256,512"
        )
    return tuple(int(word) for word in words)


def flops_per_s(virtual_gflops: float) -> float | None:
    """Speed of the device that is played; None: real kernels."""
    return virtual_gflops * 1e9 or None
