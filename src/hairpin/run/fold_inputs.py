"""What is to be folded, from files: sequences, their alignments and templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hairpin.errors import FoldInputError
from hairpin.proteins.alignments import Alignment, read_alignment
from hairpin.proteins.fasta import Record, read_fasta
from hairpin.proteins.hhr import read_hhr
from hairpin.proteins.pipeline import ChainInput, monomer_target, multimer_warnings
from hairpin.proteins.templates import Search, Template, from_folder, from_hits
from hairpin.proteins.write import chain_names

FASTA_ENDINGS = (".fasta", ".fa", ".faa", ".fas")
_GAP = ord("-")
_ALIGNMENT_ENDINGS = (".a3m", ".sto", ".stockholm")


@dataclass(frozen=True, eq=False)
class FoldTarget:
    """One protein or complex to fold.

    Attributes:
        name: for the output files.
        names: of the chains, A and on.
        chains: what is known of each chain.
        notes: what a person should know about the inputs.
    """

    name: str
    names: tuple[str, ...]
    chains: tuple[ChainInput, ...]
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Residues of each chain."""
        return tuple(len(chain.sequence) for chain in self.chains)


def targets_in(path: Path) -> list[Path]:
    """The FASTA files of a folder, or the one file.

    Raises:
        FoldInputError: there is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in FASTA_ENDINGS)
    if not found:
        raise FoldInputError(
            f"{path}: no FASTA file in this folder; name them {', '.join(FASTA_ENDINGS)}"
        )
    return found


def read_fold_target(
    fasta: Path,
    alignments: Sequence[Path] = (),
    *,
    templates: Path | None = None,
    hits: Path | None = None,
) -> FoldTarget:
    """Read everything that is given about one target. Several sequences are one complex.

    Args:
        fasta: the sequences; each is a chain.
        alignments: files, or folders that hold ``NAME.a3m``, ``NAME.sto`` or a folder ``NAME`` of
            such files, NAME being the FASTA file's. Each belongs to the chains that are its first
            row.
        templates: folder of structures.
        hits: HHR file that says how they align; left out, they are aligned here.

    Raises:
        FoldInputError: a file is missing or malformed, or an alignment is of no chain.
        MissingExtraError: templates need gemmi, which is absent.
    """
    records = read_fasta(fasta)
    if hits is not None and templates is None:
        raise FoldInputError(
            f"{hits}: hits need the structures they name; give their folder with --templates"
        )
    read = [read_alignment(path) for path in _alignment_files(alignments, fasta.stem)]
    notes: list[str] = []
    known: dict[str, ChainInput] = {}
    for record in records:
        if record.sequence not in known:
            found = _templates(record, templates, hits, notes)
            own = _of_chain(record.sequence, read, alone=len({r.sequence for r in records}) == 1)
            known[record.sequence] = ChainInput(record.sequence, own, templates=found)
    _check_all_used(read, known, records)
    chains = tuple(known[record.sequence] for record in records)
    names = chain_names()
    target = monomer_target(chains[0].sequence, chains[0].alignments)
    notes += target.warnings if len(chains) == 1 else multimer_warnings(chains)
    return FoldTarget(fasta.stem, tuple(next(names) for _ in chains), chains, tuple(notes))


def coverage_letters(target: FoldTarget) -> NDArray[np.uint8] | None:
    """All alignments as ASCII ``[s, r]``, the target first, each chain in its own columns.

    None where there is no alignment.
    """
    first = np.frombuffer("".join(c.sequence for c in target.chains).encode(), dtype=np.uint8)
    rows, start = [first[None]], 0
    for chain in target.chains:
        stop = start + len(chain.sequence)
        for alignment in chain.alignments:
            block = np.full((len(alignment.letters) - 1, len(first)), _GAP, dtype=np.uint8)
            block[:, start:stop] = alignment.letters[1:]
            rows.append(block)
        start = stop
    return np.concatenate(rows) if len(rows) > 1 else None


def _alignment_files(paths: Sequence[Path], name: str) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        folder = path / name
        if folder.is_dir():
            found += sorted(p for p in folder.iterdir() if p.suffix.lower() in _ALIGNMENT_ENDINGS)
        found += [p for e in _ALIGNMENT_ENDINGS if (p := path / f"{name}{e}").is_file()]
    return found


def _of_chain(sequence: str, read: Sequence[Alignment], *, alone: bool) -> tuple[Alignment, ...]:
    """The alignments of a chain; of a single one all, so that the wrong one is complained about."""
    return tuple(a for a in read if alone or a.target == sequence)


def _check_all_used(
    read: Sequence[Alignment], known: dict[str, ChainInput], records: Sequence[Record]
) -> None:
    if len(known) == 1:
        return
    for alignment in read:
        if alignment.target not in known:
            raise FoldInputError(
                f"{alignment.path}: the first row is none of the {len(records)} chains "
                f"({', '.join(record.name for record in records)}); the first row of an alignment "
                "must be the chain it is of, without gaps"
            )


def _templates(
    record: Record, folder: Path | None, hits: Path | None, notes: list[str]
) -> tuple[Template, ...]:
    if folder is None:
        return ()
    if not folder.is_dir():
        raise FoldInputError(f"{folder}: no such folder; give a folder of mmCIF or PDB files")
    search = _search(record.sequence, folder, hits)
    for name, reason in search.skipped[:3]:
        notes.append(f"template {name} is not used: {reason}")
    if len(search.skipped) > 3:
        notes.append(f"{len(search.skipped) - 3} more templates are not used")
    notes.append(f"{len(search.templates)} templates for {record.name}")
    return search.templates


def _search(sequence: str, folder: Path, hits: Path | None) -> Search:
    if hits is None:
        return from_folder(sequence, folder)
    return from_hits(sequence, read_hhr(hits), folder, source=hits, missing="skip")
