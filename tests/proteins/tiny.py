"""Small files of each format, written by the tests."""

from hairpin.proteins.residues import ONE_TO_THREE

BACKBONE = {
    "N": (-1.2, 0.8, 0.0),
    "CA": (0.0, 0.0, 0.0),
    "C": (1.2, 0.8, 0.0),
    "O": (1.2, 2.0, 0.0),
}
SIDE = {"CB": (0.0, -0.9, 1.2)}


def names_of(sequence):
    return [ONE_TO_THREE[letter] for letter in sequence]


def atoms_of(residues, *, unseen=(), offset=0.0):
    """(name of residue, its number, name of atom, altloc, occupancy, x, y, z) along a line."""
    rows = []
    for i, residue in enumerate(residues):
        atoms = BACKBONE if residue == "GLY" else BACKBONE | SIDE
        if i not in unseen:
            rows += [
                (residue, i + 1, atom, ".", 1.0, round(x + 3.8 * i, 3), round(y + offset, 3), z)
                for atom, (x, y, z) in atoms.items()
            ]
    return rows


def mmcif(chains, *, entry="1ABC", released="2010-05-06", resolution="1.80", extra_atoms=()):
    """mmCIF text. ``chains`` maps a chain's name to (names of residues, atoms)."""
    lines = [
        f"data_{entry}", f"_entry.id {entry}", "_exptl.method 'X-RAY DIFFRACTION'",
        f"_exptl.entry_id {entry}", f"_refine.entry_id {entry}",
        f"_refine.ls_d_res_high {resolution}",
    ]  # fmt: skip
    if released:
        history = "_pdbx_audit_revision_history"
        lines += ["loop_", f"{history}.ordinal", f"{history}.revision_date"]
        lines += ["1 2015-01-01", f"2 {released}"]
    lines += ["loop_", "_entity.id", "_entity.type"]
    lines += [f"{i} polymer" for i, _ in enumerate(chains, 1)]
    lines += ["loop_", "_entity_poly.entity_id", "_entity_poly.type"]
    lines += [f"{i} polypeptide(L)" for i, _ in enumerate(chains, 1)]
    lines += ["loop_", "_struct_asym.id", "_struct_asym.entity_id"]
    lines += [f"{label(i)} {i}" for i, _ in enumerate(chains, 1)]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num",
              "_entity_poly_seq.mon_id"]  # fmt: skip
    for i, (residues, _) in enumerate(chains.values(), 1):
        lines += [f"{i} {n} {residue}" for n, residue in enumerate(residues, 1)]
    fields = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id "
        "label_entity_id label_seq_id Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv "
        "auth_seq_id auth_asym_id pdbx_PDB_model_num"
    )
    lines += ["loop_", *(f"_atom_site.{field}" for field in fields.split())]
    serial = 0
    for i, (name, (_, atoms)) in enumerate(chains.items(), 1):
        for residue, number, atom, alt, occupancy, x, y, z in atoms:
            serial += 1
            lines.append(
                f"ATOM {serial} {atom[:1]} {atom} {alt} {residue} {label(i)} {i} {number} "
                f"{x} {y} {z} {occupancy} 20.0 {number + 100} {name} 1"
            )
    return "\n".join([*lines, "#", ""])


def label(number):
    return "ABCDEFGH"[number - 1] + "x"


def simple(sequence="ACDEFGHIKLMN", *, chain="A", **options):
    """mmCIF text of one chain with a backbone for every residue."""
    residues = names_of(sequence)
    return mmcif({chain: (residues, atoms_of(residues))}, **options)


def hhr(target, hits):
    """HHR text. ``hits``: (name, sum_probs, first of target, target row, first, template row)."""
    lines = ["Query         query", f"Match_columns {len(target)}", ""]
    for number, (name, sum_probs, i, row, j, other) in enumerate(hits, 1):
        pairs = sum(a != "-" and b != "-" for a, b in zip(row, other, strict=True))
        lines += [
            f"No {number}", f">{name} some protein",
            f"Probab=99.0  E-value=1e-5  Aligned_cols={pairs}  Sum_probs={sum_probs}",
            "",
        ]  # fmt: skip
        for start in range(0, len(row), 80):
            a, b = row[start : start + 80], other[start : start + 80]
            before = len(row[:start].replace("-", "")), len(other[:start].replace("-", ""))
            n, m = len(a.replace("-", "")), len(b.replace("-", ""))
            lines += [
                "Q ss_pred             hhhhhhhhhh",
                f"Q query         {i + before[0]:4} {a} {i + before[0] + n - 1:4} ({len(target)})",
                f"Q Consensus     {i + before[0]:4} {a.lower()} {i + before[0] + n - 1:4} (99)",
                "                     ||||",
                f"T Consensus     {j + before[1]:4} {b.lower()} {j + before[1] + m - 1:4} (99)",
                f"T {name:13} {j + before[1]:4} {b} {j + before[1] + m - 1:4} (99)",
                "Confidence            9999", "",
            ]  # fmt: skip
    return "\n".join(lines)
