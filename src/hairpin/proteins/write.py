"""A predicted structure as PDB and ModelCIF files, pLDDT in the B-factor column.

PDB: wwPDB format 3.3; atom serials above 99,999 and residue numbers above 9,999 in hybrid-36.
mmCIF: the dictionary PDBx/mmCIF with ModelCIF's quality metrics.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import TYPE_CHECKING, Any

import numpy as np

from hairpin.errors import OutputError
from hairpin.proteins.residues import ATOM_TYPES, ONE_TO_THREE, atom37_exists, restype
from hairpin.proteins.structures import Chain, require_gemmi
from hairpin.proteins.text import write_text

if TYPE_CHECKING:
    import gemmi

_CA = ATOM_TYPES.index("CA")
_NAMES_OF_ONE = ascii_uppercase + ascii_lowercase + digits
_MOST_IN_PDB = len(_NAMES_OF_ONE) * (len(_NAMES_OF_ONE) + 1)
_LINE = 69  # characters of a remark


def chain_names() -> Iterator[str]:
    """A, B, ..., Z, a, ..., 9, then AA, AB and so on, for as long as one asks."""
    for length in count(1):
        yield from ("".join(letters) for letters in product(_NAMES_OF_ONE, repeat=length))


def predicted_chain(
    name: str, sequence: str, positions: Any, plddt: Any, *, first_number: int = 1
) -> Chain:
    """A model's atoms as a chain: every atom that a residue has is known.

    Args:
        positions: ``[r, 37, 3]``, in Angstrom; ``plddt``: ``[r]``, 0 to 100, for the B-factors.
    """
    kinds = np.array([restype(letter) for letter in sequence])
    mask = atom37_exists()[kinds].astype(np.float32)
    return Chain(
        name=name,
        label=name,
        sequence=sequence,
        positions=np.asarray(positions, dtype=np.float32) * mask[..., None],
        mask=mask,
        b_factors=np.asarray(plddt, dtype=np.float32)[:, None] * mask,
        numbers=np.arange(first_number, first_number + len(sequence)),
    )


def write_pdb(path: str | Path, chains: Sequence[Chain], *, remarks: Sequence[str] = ()) -> None:
    """Write chains as a PDB file.

    Chain names of two letters stand in columns 21 and 22, which most programs read.

    Args:
        remarks: lines for REMARK 1, wrapped.

    Raises:
        MissingExtraError: gemmi is absent.
        OutputError: the file cannot be written, or a chain's name is too long for the format.
    """
    require_gemmi()
    long = [chain.name for chain in chains if len(chain.name) > 2]
    if long:
        raise OutputError(
            f"a PDB file has room for chain names of one or two letters ({_MOST_IN_PDB} chains), "
            f"not for {long[0]!r}; write mmCIF"
        )
    structure = _structure(chains, title=Path(path).stem)
    lines = [line for remark in remarks for line in _wrapped(remark)]
    structure.raw_remarks = [f"REMARK   1 {line}" for line in lines]
    write_text(path, structure.make_pdb_string())


def write_mmcif(
    path: str | Path,
    chains: Sequence[Chain],
    *,
    remarks: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write chains as an mmCIF file with ModelCIF's quality metrics.

    pLDDT stands in the B-factor column and, per residue, in ``_ma_qa_metric_local``.

    Args:
        remarks: text for ``_struct.pdbx_model_details``.
        metrics: figures of the whole model, such as ``{"pTM": 0.8}``.

    Raises:
        MissingExtraError: gemmi is absent.
        OutputError: the file cannot be written.
    """
    require_gemmi()
    structure = _structure(chains, title=Path(path).stem)
    document = structure.make_mmcif_document()
    block = document.sole_block()
    if remarks:
        block.set_pair("_struct.pdbx_model_details", _quoted(" ".join(remarks)))
    _add_model_list(block, structure.name)
    _add_metrics(block, chains, metrics or {})
    write_text(path, document.as_string())


def _structure(chains: Sequence[Chain], *, title: str) -> "gemmi.Structure":
    import gemmi

    structure = gemmi.Structure()
    structure.name = title
    structure.info["_struct.title"] = f"Predicted structure of {title}"
    model = gemmi.Model(1)
    serial = count(1)
    for chain in chains:
        model.add_chain(_gemmi_chain(chain, serial))
    structure.add_model(model)
    structure.entities = gemmi.EntityList(_entities(chains))
    return structure


def _entities(chains: Sequence[Chain]) -> "list[gemmi.Entity]":
    """One for each different sequence."""
    import gemmi

    copies: dict[str, list[str]] = {}
    for chain in chains:
        copies.setdefault(_known(chain.sequence), []).append(chain.name)
    entities = []
    for number, (sequence, names) in enumerate(copies.items(), start=1):
        entity = gemmi.Entity(str(number))
        entity.entity_type = gemmi.EntityType.Polymer
        entity.polymer_type = gemmi.PolymerType.PeptideL
        entity.subchains = names
        entity.full_sequence = [ONE_TO_THREE[letter] for letter in sequence]
        entities.append(entity)
    return entities


def _gemmi_chain(chain: Chain, serial: "count[int]") -> "gemmi.Chain":
    import gemmi

    built = gemmi.Chain(chain.name)
    for i, letter in enumerate(_known(chain.sequence)):
        residue = gemmi.Residue()
        residue.name = ONE_TO_THREE[letter]
        residue.seqid = gemmi.SeqId(int(chain.numbers[i]), " ")
        residue.entity_type = gemmi.EntityType.Polymer
        residue.het_flag, residue.subchain = "A", chain.name
        residue.label_seq = i + 1
        for j in np.flatnonzero(chain.mask[i]):
            atom = gemmi.Atom()
            atom.name = ATOM_TYPES[j]
            atom.element = gemmi.Element(atom.name[0])
            atom.pos = gemmi.Position(*chain.positions[i, j].tolist())
            atom.occ, atom.b_iso, atom.serial = 1.0, float(chain.b_factors[i, j]), next(serial)
            residue.add_atom(atom)
        if len(residue):
            built.add_residue(residue)
    return built


def _known(sequence: str) -> str:
    return "".join(letter if letter in ONE_TO_THREE else "X" for letter in sequence)


def _add_model_list(block: Any, name: str) -> None:
    tags = ["ordinal_id", "model_id", "model_name", "model_type"]
    loop = block.init_loop("_ma_model_list.", tags)
    loop.add_row(["1", "1", _quoted(name), _quoted("Ab initio model")])


def _add_metrics(block: Any, chains: Sequence[Chain], metrics: Mapping[str, float]) -> None:
    """What ModelCIF calls quality metrics: pLDDT by residue and on average, and the others."""
    scores = [chain.b_factors[:, _CA] for chain in chains]
    known = [chain.mask[:, _CA] > 0 for chain in chains]
    every = np.concatenate([s[k] for s, k in zip(scores, known, strict=True)])
    mean = float(every.mean()) if len(every) else 0.0
    kinds = block.init_loop("_ma_qa_metric.", ["id", "mode", "name", "type"])
    kinds.add_row(["1", "global", "pLDDT", "pLDDT"])
    kinds.add_row(["2", "local", "pLDDT", "pLDDT"])
    overall = block.init_loop(
        "_ma_qa_metric_global.", ["ordinal_id", "model_id", "metric_id", "metric_value"]
    )
    overall.add_row(["1", "1", "1", f"{mean:.2f}"])
    for number, (name, value) in enumerate(metrics.items(), start=3):
        kinds.add_row([str(number), "global", _quoted(name), _kind_of(name)])
        overall.add_row([str(number - 1), "1", str(number), f"{value:.4f}"])
    tags = ["label_asym_id", "label_comp_id", "label_seq_id"]
    tags += ["metric_id", "metric_value", "model_id", "ordinal_id"]
    local = block.init_loop("_ma_qa_metric_local.", tags)
    ordinal = count(1)
    for place, chain in enumerate(chains):
        for i in np.flatnonzero(known[place]):
            residue = ONE_TO_THREE[_known(chain.sequence[i])]
            where = [chain.name, residue, str(i + 1)]
            local.add_row([*where, "2", f"{scores[place][i]:.2f}", "1", str(next(ordinal))])


def _kind_of(name: str) -> str:
    """ModelCIF's type of a metric."""
    return name if name in {"pTM", "ipTM"} else "other"


def _quoted(text: str) -> str:
    from gemmi import cif

    return str(cif.quote(text))


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, _LINE)
