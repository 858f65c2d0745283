"""The ``hairpin`` command: its table of commands, and how errors become one line and an exit code.

Nothing here or at the top of a command's module imports torch, so that ``--help`` answers at once.
"""

import os
import sys
from typing import Annotated

import typer

import hairpin
from hairpin.cli import (
    bench,
    bench_4d,
    bench_attention,
    bench_axial,
    bench_linear,
    doctor,
    fold,
    plan,
    profile,
    sample,
    score,
    show,
    train,
    train_fold,
    train_sequence,
    verify,
)
from hairpin.cli.output import print_text, say
from hairpin.errors import CommError, HairpinError, RankFailed

USER_ERROR = 2  # exit code of every error a user can mend
RANK_ERROR = 1  # exit code where a rank is gone, which need not be the user's fault
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="hairpin",
    help="Split long, multi-dimensional transformers over devices without rewriting the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train.app.command("fold")(train_fold.fold)
train.app.command("llm")(train_sequence.llm)
train.app.command("linear-llm")(train_sequence.linear_llm)
train.app.command("vit")(train_sequence.vit)
app.add_typer(train.app, name="train")
app.command("sample")(sample.sample)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("show")(show.show)
app.command("fold")(fold.fold)
app.command("score")(score.score)
app.command("profile")(profile.profile)
bench.app.command("attention")(bench_attention.attention)
bench.app.command("axial")(bench_axial.axial)
bench.app.command("linear")(bench_linear.linear)
bench.app.command("4d")(bench_4d.four_d)
app.add_typer(bench.app, name="bench")
app.add_typer(verify.app, name="verify")


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer hands it over by position
    if wanted:
        print_text(hairpin.__version__)
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of the command itself; ``--version`` is done before this is called."""
    del version


def main() -> None:
    """Run the command line; a user's error is one message on stderr and exit code 2."""
    try:
        app(prog_name="hairpin")
    except HairpinError as error:
        if os.environ.get("HAIRPIN_DEBUG"):
            raise
        say(f"hairpin: {error}")
        sys.exit(RANK_ERROR if isinstance(error, CommError | RankFailed) else USER_ERROR)
    except KeyboardInterrupt:
        say("hairpin: interrupted")
        sys.exit(INTERRUPTED)
