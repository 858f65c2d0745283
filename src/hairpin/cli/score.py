"""``hairpin score``: how near a predicted structure is to another, and what is wrong with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hairpin.cli.output import print_json, print_text

if TYPE_CHECKING:
    from hairpin.proteins.compare import Scores
    from hairpin.proteins.structures import Chain, Structure


def score(
    prediction: Annotated[Path, typer.Argument(metavar="PREDICTION", help="A PDB or mmCIF file.")],
    structure: Annotated[
        Path, typer.Argument(metavar="STRUCTURE", help="What it should be: a PDB or mmCIF file.")
    ],
    *,
    chain: Annotated[
        str | None,
        typer.Option(metavar="A[:B]", help="Chain of the prediction, and of the structure."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a prediction against a structure: lDDT, C-alpha RMSD, TM-score, GDT-TS, violations."""
    from dataclasses import asdict

    from hairpin.proteins.compare import compare
    from hairpin.proteins.structures import read_structure

    ours, theirs = read_structure(prediction), read_structure(structure)
    own, _, other = (chain or "").partition(":")
    found = compare(_chosen(ours, own), _chosen(theirs, other))
    if json:
        print_json(asdict(found))
    else:
        print_text(_table(found))


def _chosen(structure: "Structure", name: str) -> "list[Chain]":
    """The chain of a name; all of them where none is named."""
    return [structure.chain(name)] if name else list(structure.chains.values())


def _table(found: "Scores") -> str:
    chains = ", ".join(f"{ours} on {theirs}" for theirs, ours in found.chains.items())
    bad = found.violations
    plddt = "B-factors are not pLDDT" if found.plddt is None else f"{found.plddt:.2f}, mean"
    rows = [
        ("chains", f"{chains} (prediction on structure)"),
        (
            "residues",
            (
                f"{found.matched} matched of {found.residues} in the structure, "
                f"{found.predicted_residues} predicted; {found.identity:.1%} identical"
            ),
        ),
        ("lDDT", f"{found.lddt:.4f} all atoms, {found.lddt_ca:.4f} C-alpha"),
        ("RMSD", f"{found.ca_rmsd:.3f} Angstrom, C-alpha, superposed"),
        (
            "TM-score",
            (
                f"{found.tm_score:.4f} by the structure's length, "
                f"{found.tm_score_predicted:.4f} by the prediction's"
            ),
        ),
        ("GDT-TS", f"{found.gdt_ts:.4f} by the structure's length"),
        ("pLDDT", plddt),
        (
            "violations",
            (
                f"{bad.residues} residues: {bad.clashes} clashes, {bad.bonds} peptide bonds, "
                f"{bad.angles} angles there, {bad.within_residues} within residues"
            ),
        ),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)
