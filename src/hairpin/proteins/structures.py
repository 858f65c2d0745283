"""Structures from mmCIF and PDB files, as arrays of atoms by residue of the chain's sequence.

Dims: r residues of the chain's whole sequence, whether seen or not; 37 atoms as in `ATOM_TYPES`.
Positions are in Angstrom.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hairpin.errors import MissingExtraError
from hairpin.proteins.residues import ATOM_TYPES, RESTYPES, THREE_TO_ONE
from hairpin.proteins.text import problem, read_bytes

if TYPE_CHECKING:
    import gemmi

Floats = NDArray[np.float32]

_RESOLUTIONS = (
    "_refine.ls_d_res_high", "_em_3d_reconstruction.resolution", "_reflns.d_resolution_high"
)  # fmt: skip
_ATOM = {name: i for i, name in enumerate(ATOM_TYPES)}
_CD, _NH1, _NH2 = (ATOM_TYPES.index(name) for name in ("CD", "NH1", "NH2"))


@dataclass(frozen=True, eq=False)
class Chain:
    """One protein chain of a structure.

    Attributes:
        name: its name by the authors, which is the one in the PDB and in HHR files.
        label: its name in the mmCIF file's own numbering.
        sequence: one letter a residue; modified residues as their parents, others X.
        positions: ``[r, 37, 3]``, float32; zeros where there is no atom.
        mask: 1 where the atom was seen, ``[r, 37]``, float32.
        b_factors: ``[r, 37]``, float32; the pLDDT in predicted structures.
        numbers: the authors' number of each residue, ``[r]``, int64; -9999 where none was seen.
    """

    name: str
    label: str
    sequence: str
    positions: Floats
    mask: Floats
    b_factors: Floats
    numbers: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Structure:
    """The first model of a structure file.

    Attributes:
        path: the file.
        entry: the PDB entry, such as "3U8V".
        released: the day it was first released, None if not given.
        resolution: in Angstrom, None if not given.
        method: such as "X-RAY DIFFRACTION", "" if not given.
        chains: its protein chains by name, in the file's order.
    """

    path: str
    entry: str
    released: date | None
    resolution: float | None
    method: str
    chains: Mapping[str, Chain]

    def chain(self, name: str) -> Chain:
        """A chain by its authors' name, else by its label.

        Raises:
            FoldInputError: there is no such protein chain.
        """
        if name in self.chains:
            return self.chains[name]
        labels = {chain.label: chain for chain in self.chains.values()}
        if name in labels:
            return labels[name]
        raise problem(
            self.path, None, f"no protein chain {name!r}",
            f"the chains are {', '.join(self.chains) or 'none'}",
        )  # fmt: skip


def read_structure(path: Path | str) -> Structure:
    """The protein chains of an mmCIF or PDB file, gzip or not.

    Of atoms with several places the one with the highest occupancy counts, the first of equals.
    Selenomethionine is read as methionine, and arginine's NH1 is the one nearer to CD. A PDB file
    without SEQRES records has the residues that were seen.

    Raises:
        FoldInputError: the file cannot be read, is damaged, or has no protein in it.
        MissingExtraError: gemmi is not installed.
    """
    structure, block = _parsed(path)
    if not len(structure):
        raise problem(path, None, "no atoms in it", "give a file with coordinates")
    chains: dict[str, Chain] = {}
    for name, entity, part in _protein_parts(structure):
        chains.setdefault(name, _chain(name, entity, part))
    if not chains:
        raise problem(path, None, "no protein chain in it", "give a structure of a protein")
    info = structure.info
    return Structure(
        path=str(path),
        entry=Path(path).name.split(".")[0] if structure.name == "string" else structure.name,
        released=None if block is None else _release_date(block),
        resolution=structure.resolution or _resolution(block),
        method=dict(info).get("_exptl.method", ""),
        chains=chains,
    )


def gap_between_neighbours(chain: Chain) -> float:
    """The longest distance between CA atoms of neighbouring residues that were both seen."""
    ca = _ATOM["CA"]
    seen = (chain.mask[1:, ca] > 0) & (chain.mask[:-1, ca] > 0)
    steps = np.linalg.norm(np.diff(chain.positions[:, ca], axis=0), axis=-1)
    return float(steps[seen].max(initial=0.0))


# --------------------------------------------------------------------------------------- reading


def require_gemmi(what: str = "structure files need") -> None:
    """Raise before any work is done if gemmi is not there.

    Raises:
        MissingExtraError: with ``what`` needs it, and how to get it.
    """
    try:
        import gemmi  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{what} gemmi: pip install 'hairpin[fold]'") from error


def _parsed(path: Path | str) -> tuple["gemmi.Structure", "gemmi.cif.Block | None"]:
    """The file through gemmi, its entities known, and the mmCIF block if it is one."""
    require_gemmi()
    text = read_bytes(path).decode("ascii", "replace").replace("\ufffd", "?")  # PDB counts bytes
    if not text.strip():
        raise problem(path, None, "the file is empty", "download it again")
    try:
        return _parsed_pdb(text) if _is_pdb(path, text) else _parsed_mmcif(text)
    except (RuntimeError, ValueError, IndexError) as error:
        raise problem(
            path, None, f"is no mmCIF or PDB file that can be read ({error})", "download it again"
        ) from error


def _parsed_pdb(text: str) -> tuple["gemmi.Structure", None]:
    import gemmi

    structure = gemmi.read_pdb_string(text)
    structure.setup_entities()
    structure.assign_label_seq_id(force=False)
    return structure, None


def _parsed_mmcif(text: str) -> tuple["gemmi.Structure", "gemmi.cif.Block"]:
    import gemmi

    block = gemmi.cif.read_string(text).sole_block()
    structure = gemmi.make_structure_from_block(block)
    structure.setup_entities()
    return structure, block


def _is_pdb(path: Path | str, text: str) -> bool:
    endings = {ending.lower() for ending in Path(path).suffixes}
    if endings & {".pdb", ".ent"}:
        return True
    return not endings & {".cif", ".mmcif"} and "data_" not in text[:2000]


def _resolution(block: "gemmi.cif.Block | None") -> float | None:
    """The first of the refinement's, the reconstruction's and the data's that is given."""
    if block is None:
        return None
    texts = [text for tag in _RESOLUTIONS for text in block.find_values(tag)]
    return next((float(text) for text in texts if text.replace(".", "", 1).isdigit()), None)


def _release_date(block: "gemmi.cif.Block") -> date | None:
    days = []
    for text in block.find_values("_pdbx_audit_revision_history.revision_date"):
        try:
            days.append(date.fromisoformat(text.strip("'\" ")))
        except ValueError:
            continue
    return min(days, default=None)


def _protein_parts(
    structure: "gemmi.Structure",
) -> list[tuple[str, "gemmi.Entity", "gemmi.ResidueSpan"]]:
    """(Authors' name, entity, residues) of every protein chain of the first model."""
    import gemmi

    proteins = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    entities = {e.name: e for e in structure.entities if e.polymer_type in proteins}
    owner = {label: entity for entity in entities.values() for label in entity.subchains}
    return [
        (chain.name, owner[part.subchain_id()], part)
        for chain in structure[0]
        for part in chain.subchains()
        if part.subchain_id() in owner
    ]


# ---------------------------------------------------------------------------------------- chains


def _chain(name: str, entity: "gemmi.Entity", part: "gemmi.ResidueSpan") -> Chain:
    import gemmi

    names = [gemmi.Entity.first_mon(item) for item in entity.full_sequence]  # or other residues
    residues = {_place(residue, i): residue for i, residue in enumerate(part.first_conformer())}
    if not names:
        names = [residue.name for residue in residues.values()]
        residues = dict(enumerate(residues.values()))
    chain = Chain(
        name=name,
        label=part.subchain_id(),
        sequence="".join(_letter(name) for name in names),
        positions=np.zeros((len(names), 37, 3), dtype=np.float32),
        mask=np.zeros((len(names), 37), dtype=np.float32),
        b_factors=np.zeros((len(names), 37), dtype=np.float32),
        numbers=np.full(len(names), -9999),
    )
    for place, residue in residues.items():
        if 0 <= place < len(names):
            chain.numbers[place] = residue.seqid.num or 0
            _place_atoms(chain, place, residue)
    return chain


def _place(residue: "gemmi.Residue", seen: int) -> int:
    return seen if residue.label_seq is None else residue.label_seq - 1


def _letter(name: str) -> str:
    """One letter for a residue's name; a modified residue has its parent's."""
    import gemmi

    if name in THREE_TO_ONE:
        return THREE_TO_ONE[name]
    info = gemmi.find_tabulated_residue(name)
    letter = info.one_letter_code.upper()
    return letter if info.is_amino_acid() and letter in RESTYPES else "X"


def _place_atoms(chain: Chain, place: int, residue: "gemmi.Residue") -> None:
    occupancy: dict[int, float] = {}
    for atom in residue:
        name = "SD" if atom.name == "SE" and residue.name == "MSE" else atom.name
        index = _ATOM.get(name)
        if index is None or atom.occ <= occupancy.get(index, -1.0):
            continue
        occupancy[index] = atom.occ
        chain.positions[place, index] = atom.pos.tolist()
        chain.mask[place, index] = 1
        chain.b_factors[place, index] = atom.b_iso
    if residue.name == "ARG":
        _name_arginine(chain, place)


def _name_arginine(chain: Chain, place: int) -> None:
    """NH1 is the one nearer to CD; some files have the two swapped."""
    if not chain.mask[place, [_CD, _NH1, _NH2]].all():
        return
    positions = chain.positions[place]
    first, second = (np.linalg.norm(positions[i] - positions[_CD]) for i in (_NH1, _NH2))
    if first > second:
        positions[[_NH1, _NH2]] = positions[[_NH2, _NH1]]
        chain.b_factors[place, [_NH1, _NH2]] = chain.b_factors[place, [_NH2, _NH1]]
