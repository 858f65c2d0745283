"""Relaxing a predicted structure: hydrogens added and energy minimised near where it is.

As AlphaFold does (Jumper et al. 2021, Suppl. Sec. 1.8.6): Amber ff99SB in vacuum, heavy atoms held
by springs of 10 kcal/mol/A^2.
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hairpin.errors import FoldInputError, MissingExtraError
from hairpin.proteins.text import write_text

_SPRING = 10.0  # kcal/mol/A^2
_TOLERANCE = 2.39  # kcal/mol, of an energy change at which to stop
_OXT_BOND = 1.25  # Angstrom
_HYDROGEN = 1.5  # mass, above which an atom is heavy


@dataclass(frozen=True)
class Relaxation:
    """What the minimisation did.

    Attributes:
        before, after: potential energy without springs, in kcal/mol.
        moved: root mean square displacement of the heavy atoms, in Angstrom.
    """

    before: float
    after: float
    moved: float

    def __str__(self) -> str:
        return (
            f"energy {self.before:,.0f} to {self.after:,.0f} kcal/mol, heavy atoms moved by "
            f"{self.moved:.2f} Angstrom"
        )


def relax_file(source: Path, target: Path, *, remark: str = "") -> Relaxation:
    """Minimise the energy of a PDB file's structure into another, which keeps its B-factors.

    Args:
        remark: for REMARK 1 of the new file.

    Raises:
        MissingExtraError: openmm is absent.
        FoldInputError: Amber has no parameters for the structure, such as for unknown residues.
        OutputError: the file cannot be written.
    """
    try:
        import openmm  # noqa: F401
        from openmm import app
    except ImportError as error:
        raise MissingExtraError(
            "relaxing needs OpenMM: pip install 'hairpin[relax]', or leave out --relax"
        ) from error
    given = app.PDBFile(str(source))
    field = app.ForceField("amber99sb.xml")
    modeller = app.Modeller(given.topology, given.positions)
    try:
        _add_terminal_oxygens(modeller)
        modeller.addHydrogens(field)
        system = field.createSystem(modeller.topology, constraints=app.HBonds)
    except ValueError as error:
        raise FoldInputError(f"{source}: Amber ff99SB cannot describe it: {error}") from error
    report, positions = _minimised(modeller, system)
    if not np.isfinite(report.after):
        raise FoldInputError(
            f"{source}: its atoms overlap so much that the energy is not finite; it cannot be "
            "relaxed"
        )
    _write(target, modeller.topology, positions, _b_factors(source), remark)
    return report


def _minimised(modeller: Any, system: Any) -> tuple[Relaxation, Any]:
    import openmm
    from openmm import unit

    heavy = [a.index for a in modeller.topology.atoms() if a.element.mass._value > _HYDROGEN]
    spring = openmm.CustomExternalForce("0.5 * k * ((x - x0)^2 + (y - y0)^2 + (z - z0)^2)")
    strength = _SPRING * unit.kilocalories_per_mole / unit.angstroms**2
    spring.addGlobalParameter("k", strength)
    for name in ("x0", "y0", "z0"):
        spring.addPerParticleParameter(name)
    begin = modeller.positions
    for index in heavy:
        spring.addParticle(index, begin[index].value_in_unit(unit.nanometers))
    for force in system.getForces():
        force.setForceGroup(0)
    spring.setForceGroup(1)
    system.addForce(spring)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001 * unit.picoseconds))
    context.setPositions(begin)
    before = _energy(context)
    openmm.LocalEnergyMinimizer.minimize(
        context, tolerance=_TOLERANCE * unit.kilocalories_per_mole / unit.nanometers
    )
    after = context.getState(getPositions=True).getPositions(asNumpy=True)
    start = np.array(begin.value_in_unit(unit.angstroms))[heavy]
    end = np.array(after.value_in_unit(unit.angstroms))[heavy]
    moved = float(np.sqrt(((start - end) ** 2).sum(axis=-1).mean()))
    return Relaxation(before, _energy(context), moved), after


def _energy(context: Any) -> float:
    from openmm import unit

    state = context.getState(getEnergy=True, groups={0})
    return float(state.getPotentialEnergy().value_in_unit(unit.kilocalories_per_mole))


def _add_terminal_oxygens(modeller: Any) -> None:
    """Give every chain's last residue the oxygen OXT, which a model does not predict."""
    from openmm import Vec3, app, unit

    places = np.array(modeller.positions.value_in_unit(unit.angstroms))
    new, positions = app.Topology(), []
    for chain in modeller.topology.chains():
        copy = new.addChain(chain.id)
        residues = list(chain.residues())
        for residue in residues:
            into = new.addResidue(residue.name, copy, residue.id, residue.insertionCode)
            atoms = {atom.name: places[atom.index] for atom in residue.atoms()}
            if residue is residues[-1] and {"CA", "C", "O"} <= atoms.keys():
                atoms.setdefault("OXT", terminal_oxygen(atoms["CA"], atoms["C"], atoms["O"]))
            for name, place in atoms.items():
                new.addAtom(name, app.Element.getBySymbol(name[0]), into)
                positions.append(Vec3(*(place / 10)))
    new.createStandardBonds()
    new.createDisulfideBonds(positions * unit.nanometers)
    modeller.topology, modeller.positions = new, positions * unit.nanometers


def terminal_oxygen(
    ca: NDArray[np.float64], c: NDArray[np.float64], o: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where OXT lies, in Angstrom: in the plane of CA, C and O, as far from both bonds."""
    back, side = (ca - c) / np.linalg.norm(ca - c), (o - c) / np.linalg.norm(o - c)
    away = -(back + side)
    place: NDArray[np.float64] = c + _OXT_BOND * away / np.linalg.norm(away)
    return place


def _b_factors(source: Path) -> dict[tuple[str, str], str]:
    """Columns 61 to 66 by chain and residue number."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return {(li[20:22].strip(), li[22:27].strip()): li[60:66] for li in lines if li[:4] == "ATOM"}


def _write(
    target: Path, topology: Any, positions: Any, factors: dict[tuple[str, str], str], remark: str
) -> None:
    from io import StringIO

    from openmm import app

    text = StringIO()
    app.PDBFile.writeFile(topology, positions, text, keepIds=True)
    lines = [f"REMARK   1 {part}" for part in wrap(remark, 69)]
    for line in text.getvalue().splitlines():
        key = (line[20:22].strip(), line[22:27].strip())
        known = line[:4] == "ATOM" and key in factors
        lines.append(line[:60] + factors[key] + line[66:] if known else line)
    write_text(target, "\n".join(lines) + "\n")
