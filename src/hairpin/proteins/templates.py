"""Templates: structures of related proteins, laid over the target residue by residue.

Jumper et al. 2021, Suppl. Sec. 1.2.3 (search) and 1.2.9 (features, Table 1). Hits come from an
HHR file; without one, every structure of a folder is aligned to the target.

Dims: t templates, r residues of the target, 37 atoms as in `ATOM_TYPES`. Positions in Angstrom.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins.hhr import Hit, read_hhr
from hairpin.proteins.msa import numbers_of_letters
from hairpin.proteins.residues import ATOM_TYPES, RESTYPES
from hairpin.proteins.structures import (
    Chain,
    Structure,
    gap_between_neighbours,
    read_structure,
    require_gemmi,
)
from hairpin.proteins.text import problem

Floats = NDArray[np.float32]

MAX_HITS = 20
"""Templates that are kept of all hits; the model is given the first few of them."""

_MIN_ALIGNED = 0.1  # part of the target that must be aligned
_MAX_SAME = 0.95  # a template that is a piece of the target longer than this part is the target
_MIN_LENGTH = 10
_MIN_ATOMS = 5  # as many as alanine has
_MIN_IDENTITY = 0.9  # between the hit's sequence and the structure's, when they are realigned
_MAX_CA_STEP = 150.0  # Angstrom between neighbours; more means a broken file
_STRUCTURE_FILE = re.compile(r"\.(cif|mmcif|pdb|ent)(\.gz)?$", re.IGNORECASE)
_ENTRY = re.compile(r"(?:^|[_.-]|pdb)([0-9][a-z0-9]{3})(?=$|[_.-])")
_CB, _CA = ATOM_TYPES.index("CB"), ATOM_TYPES.index("CA")
_GLYCINE = RESTYPES.index("G")


@dataclass(frozen=True, eq=False)
class Template:
    """One template in the target's numbering.

    Attributes:
        name: entry and chain, such as "3u8v_A".
        sequence: its letter at each residue of the target, ``-`` where nothing is aligned.
        positions: ``[r, 37, 3]``, float32.
        mask: 1 where the atom was seen, ``[r, 37]``, float32.
        sum_probs: how good the alignment is; of an own alignment, how many letters agree.
    """

    name: str
    sequence: str
    positions: Floats
    mask: Floats
    sum_probs: float


@dataclass(frozen=True)
class Search:
    """What became of the hits.

    Attributes:
        templates: those that can be used, the best first.
        skipped: name and reason of each that cannot.
    """

    templates: tuple[Template, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


# -------------------------------------------------------------------------------------- the search


def search(
    target: str,
    folder: Path | str,
    hhr: Path | str | None = None,
    *,
    before: date | None = None,
    missing: Literal["error", "skip"] = "error",
    max_hits: int = MAX_HITS,
) -> Search:
    """Templates by `from_hits` where there is an HHR file, else by `from_folder`.

    Args:
        target: the target's sequence.
        folder: holds the structures, and the HHR file unless one is given.
        hhr: the HHR file.
        before: use no template released later.
        missing: what to do when the structure of a hit is not in the folder.
        max_hits: stop after that many templates.

    Raises:
        FoldInputError: there are several HHR files, or as those two do.
        MissingExtraError: gemmi is not installed.
    """
    if hhr is None:
        found = sorted(Path(folder).glob("*.hhr"))
        if len(found) > 1:
            raise problem(
                folder, None, f"{len(found)} HHR files: {', '.join(path.name for path in found)}",
                "say which one is of this target",
            )  # fmt: skip
        if not found:
            return from_folder(target, folder, before=before, max_hits=max_hits)
        hhr = found[0]
    return from_hits(
        target, read_hhr(hhr), folder, source=hhr, before=before, missing=missing, max_hits=max_hits
    )


def from_hits(
    target: str,
    hits: Sequence[Hit],
    folder: Path | str,
    *,
    source: Path | str = "the HHR file",
    before: date | None = None,
    missing: Literal["error", "skip"] = "error",
    max_hits: int = MAX_HITS,
) -> Search:
    """Templates of the hits, those with the highest ``sum_probs`` first, `MAX_HITS` at most.

    A hit is skipped when it aligns a tenth of the target or less, is shorter than 10 residues, is
    (nearly) the target itself, was released after ``before``, or shows fewer than 5 atoms there.

    Args:
        target: the target's sequence.
        hits: as `read_hhr` gives them.
        folder: holds their structures; a file's name holds the entry: 3u8v.cif, pdb3u8v.ent.gz.
        source: the file of the hits, for messages.
        before: use no template released later; one without a date is skipped then.
        missing: what to do when a structure file is not in the folder.
        max_hits: stop after that many templates.

    Raises:
        FoldInputError: a structure file is missing or damaged, or a hit is of another target.
        MissingExtraError: gemmi is not installed.
    """
    files = structure_files(folder)
    templates: list[Template] = []
    skipped: list[tuple[str, str]] = []
    for hit in sorted(hits, key=lambda hit: -hit.sum_probs):
        if len(templates) == max_hits:
            break
        name = f"{hit.entry}_{hit.chain}"
        reason = unfit(target, hit)
        if reason is None and hit.entry not in files:
            reason = f"no structure of {hit.entry} in {folder}"
            if missing == "error":
                raise problem(
                    source, hit.line, f"hit {hit.index}, {hit.name.split()[0]}: {reason}",
                    f"put {hit.entry}.cif there, or skip missing templates",
                )  # fmt: skip
        if reason is None:
            found = _of_hit(target, hit, read_structure(files[hit.entry]), source, before)
            if isinstance(found, Template):
                templates.append(found)
                continue
            reason = found
        skipped.append((name if hit.entry else hit.name, reason))
    return Search(tuple(templates), tuple(skipped))


def from_folder(
    target: str, folder: Path | str, *, before: date | None = None, max_hits: int = MAX_HITS
) -> Search:
    """Templates of every protein chain in a folder, aligned here, the most alike first.

    The alignment is global with BLOSUM62; ``sum_probs`` is the number of identical residues. A
    chain is used however unlike it is, and the target itself too: the folder was chosen by hand.

    Raises:
        FoldInputError: a structure file is damaged, or there is none in the folder.
        MissingExtraError: gemmi is not installed.
    """
    paths = _structure_paths(folder)
    if not paths:
        raise problem(folder, None, "no structure file in it", "put .cif or .pdb files there")
    templates: list[Template] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        structure = read_structure(path)
        for chain in structure.chains.values():
            name = f"{structure.entry.lower()}_{chain.name}"
            pairs = aligned_pairs(target, chain.sequence)
            reason = _too_late(structure, before) or _too_little(len(target), len(pairs))
            found = reason or _laid_over(target, chain, name, pairs, _same(target, chain, pairs))
            if isinstance(found, Template):
                templates.append(found)
            else:
                skipped.append((name, found))
    templates.sort(key=lambda template: -template.sum_probs)
    return Search(tuple(templates[:max_hits]), tuple(skipped))


def unfit(target: str, hit: Hit) -> str | None:
    """Why a hit is not used, judged by its alignment alone; None if it may be."""
    if not hit.entry:
        return "its name does not begin with an entry and a chain, such as 3U8V_A"
    sequence = hit.sequence
    if too_little := _too_little(len(target), hit.aligned_columns):
        return too_little
    if sequence in target and len(sequence) / len(target) > _MAX_SAME:
        return "it is the target itself"
    if len(sequence) < _MIN_LENGTH:
        return f"it has {len(sequence)} residues, fewer than {_MIN_LENGTH}"
    return None


def structure_files(folder: Path | str) -> Mapping[str, Path]:
    """PDB entry in small letters -> structure file, of every file that has an entry in its name."""
    found: dict[str, Path] = {}
    for path in _structure_paths(folder):
        stem = _STRUCTURE_FILE.sub("", path.name).lower()
        for entry in _ENTRY.findall(stem):
            found.setdefault(entry, path)
    return found


def aligned_pairs(first: str, second: str) -> dict[int, int]:
    """Residue of one sequence -> residue of the other, by global alignment with BLOSUM62.

    Raises:
        MissingExtraError: gemmi is not installed.
    """
    require_gemmi("aligning sequences needs")
    import gemmi

    kind = gemmi.ResidueKind.AA
    names = [gemmi.expand_one_letter_sequence(text, kind) for text in (first, second)]
    scoring = gemmi.AlignmentScoring("b")
    result = gemmi.align_string_sequences(names[0], names[1], [], scoring)
    return _pairs(result.add_gaps(first, 1), result.add_gaps(second, 2))


# -------------------------------------------------------------------------------------- one hit


def _of_hit(
    target: str, hit: Hit, structure: Structure, source: Path | str, before: date | None
) -> Template | str:
    """The template, or why there is none."""
    if reason := _too_late(structure, before):
        return reason
    _check_target(target, hit, source)
    place = _find(hit, structure)
    if place is None:
        return f"chain {hit.chain} of {structure.path} has another sequence"
    chain, where = place
    pairs = {i: where[j] for i, j in hit.pairs().items() if j in where}
    return _laid_over(target, chain, f"{hit.entry}_{hit.chain}", pairs, hit.sum_probs)


def _check_target(target: str, hit: Hit, source: Path | str) -> None:
    part = hit.target.replace("-", "")
    here = target[hit.target_start : hit.target_start + len(part)]
    # HHsearch may write another letter where the target has none of the twenty.
    agrees = all(a == b or a not in RESTYPES for a, b in zip(here, part, strict=False))
    if len(here) < len(part) or not agrees:
        raise problem(
            source, hit.line,
            f"hit {hit.index} aligns {part[:20]!r} as residue {hit.target_start + 1} on, the "
            f"target has {here[:20]!r} there",
            "give the HHR file of this target",
        )  # fmt: skip


def _find(hit: Hit, structure: Structure) -> tuple[Chain, dict[int, int]] | None:
    """The chain of the hit, and residue of the hit -> residue of the chain.

    First the chain of that name, then any with the same piece of sequence, then with unknown
    residues taken for any; at last the sequences are aligned, if they are nearly the same.
    """
    piece = hit.sequence
    named = [structure.chains[hit.chain]] if hit.chain in structure.chains else []
    others = list(structure.chains.values())
    for chain in [*named, *others]:
        if (start := chain.sequence.find(piece)) >= 0:
            return chain, {j: start + j for j in range(len(piece))}
    pattern = re.compile("".join("." if letter == "X" else f"[{letter}X]" for letter in piece))
    for chain in others:
        if match := pattern.search(chain.sequence):
            return chain, {j: match.start() + j for j in range(len(piece))}
    alone = named or (others if len(others) == 1 else [])
    return _realigned(piece, alone[0]) if alone else None


def _realigned(piece: str, chain: Chain) -> tuple[Chain, dict[int, int]] | None:
    pairs = aligned_pairs(piece, chain.sequence)
    same = sum(piece[i] == chain.sequence[j] for i, j in pairs.items())
    good = same >= _MIN_IDENTITY * min(len(piece), len(chain.sequence))
    return (chain, pairs) if good else None


def _laid_over(
    target: str, chain: Chain, name: str, pairs: Mapping[int, int], sum_probs: float
) -> Template | str:
    """The chain's atoms in the target's numbering, or why not."""
    if (step := gap_between_neighbours(chain)) > _MAX_CA_STEP:
        return f"neighbours in chain {chain.name} are {step:.0f} Angstrom apart"
    positions = np.zeros((len(target), 37, 3), dtype=np.float32)
    mask = np.zeros((len(target), 37), dtype=np.float32)
    letters = ["-"] * len(target)
    for i, j in pairs.items():
        positions[i], mask[i], letters[i] = chain.positions[j], chain.mask[j], chain.sequence[j]
    if mask.sum() < _MIN_ATOMS:
        return f"{int(mask.sum())} atoms were seen there, fewer than {_MIN_ATOMS}"
    return Template(name, "".join(letters), positions, mask, sum_probs)


def _too_late(structure: Structure, before: date | None) -> str | None:
    if before is None or (structure.released is not None and structure.released <= before):
        return None
    return f"it was released on {structure.released or 'an unknown day'}, not by {before}"


def _too_little(length: int, aligned: int) -> str | None:
    if aligned / length > _MIN_ALIGNED:
        return None
    return f"{aligned} of the target's {length} residues are aligned, a tenth or less"


def _same(target: str, chain: Chain, pairs: Mapping[int, int]) -> float:
    return float(sum(target[i] == chain.sequence[j] for i, j in pairs.items()))


def _pairs(first: str, second: str) -> dict[int, int]:
    """Places of the letters that stand above each other in two rows with gaps."""
    a = np.array([letter != "-" for letter in first])
    b = np.array([letter != "-" for letter in second])
    both = a & b
    return dict(
        zip((np.cumsum(a) - 1)[both].tolist(), (np.cumsum(b) - 1)[both].tolist(), strict=True)
    )


def _structure_paths(folder: Path | str) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise problem(folder, None, "there is no such folder", "check the name")
    return sorted(path for path in folder.iterdir() if _STRUCTURE_FILE.search(path.name))


# ------------------------------------------------------------------------------------- features


def draw(rng: np.random.Generator, templates: Sequence[Template], most: int) -> list[Template]:
    """Templates for one training example: any number of them up to ``most``, at random.

    Jumper et al. 2021, Suppl. Sec. 1.2.3: min(uniform from 0 to all, most) of them.
    """
    number = min(int(rng.integers(0, len(templates) + 1)), most)
    return [templates[i] for i in rng.permutation(len(templates))[:number]]


def features(templates: Sequence[Template], residues: int, rows: int) -> dict[str, NDArray[Any]]:
    """The first ``rows`` templates under DeepMind's names, padded with masked ones.

    Returns:
        ``template_aatype[t, r]`` (21 where nothing is aligned), ``template_all_atom_positions``
        ``[t, r, 37, 3]``, ``template_all_atom_masks[t, r, 37]``, ``template_mask[t]``,
        ``template_sum_probs[t, 1]``, ``template_pseudo_beta[t, r, 3]`` and its mask ``[t, r]``.
    """
    used = templates[:rows]
    aatype = np.zeros((rows, residues), dtype=np.int64)
    positions = np.zeros((rows, residues, 37, 3), dtype=np.float32)
    masks = np.zeros((rows, residues, 37), dtype=np.float32)
    sum_probs = np.zeros((rows, 1), dtype=np.float32)
    numbers = numbers_of_letters()
    for t, template in enumerate(used):
        aatype[t] = numbers[np.frombuffer(template.sequence.encode(), dtype=np.uint8)]
        positions[t], masks[t], sum_probs[t] = template.positions, template.mask, template.sum_probs
    beta, beta_mask = pseudo_beta(aatype, positions, masks)
    return {
        "template_aatype": aatype,
        "template_all_atom_positions": positions,
        "template_all_atom_masks": masks,
        "template_mask": (np.arange(rows) < len(used)).astype(np.float32),
        "template_sum_probs": sum_probs,
        "template_pseudo_beta": beta,
        "template_pseudo_beta_mask": beta_mask,
    }


def pseudo_beta(
    aatype: NDArray[np.int64], positions: Floats, mask: Floats
) -> tuple[Floats, Floats]:
    """CB, or CA of glycine: positions ``[..., r, 3]`` and mask ``[..., r]``."""
    glycine = aatype == _GLYCINE
    beta = np.where(glycine[..., None], positions[..., _CA, :], positions[..., _CB, :])
    return beta, np.where(glycine, mask[..., _CA], mask[..., _CB])
