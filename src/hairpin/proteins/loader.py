"""Training examples from a folder of proteins, each a function of the seed and its number alone.

It holds a folder for each protein: its structure, named like the folder (``1abc/1abc.cif``), its
alignments (``.a3m``, ``.sto``), and if wanted a folder ``templates`` with structures and the HHR
file of the hits. Jumper et al. 2021, Suppl. Sec. 1.2 and 1.10.
"""

import ctypes
import signal
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hairpin.proteins import templates
from hairpin.proteins.alignments import read_alignment
from hairpin.proteins.labels import label_features
from hairpin.proteins.pipeline import Batch, Target, monomer_target
from hairpin.proteins.sizes import Sizes
from hairpin.proteins.structures import Structure, read_structure
from hairpin.proteins.text import problem

_PR_SET_PDEATHSIG = 1
_ORDER, _RECYCLES, _DRAW = 1, 2, 3  # what random numbers are for
_STRUCTURES = (".cif", ".cif.gz", ".pdb", ".pdb.gz")
_ALIGNMENTS = (".a3m", ".a3m.gz", ".sto", ".sto.gz")


@dataclass(frozen=True)
class Protein:
    """Where one protein's files are.

    Attributes:
        name: the name of its folder.
        structure: its structure.
        alignments: its alignments, in the order of their names.
        templates: the folder of its templates, None if there is none.
    """

    name: str
    structure: Path
    alignments: tuple[Path, ...]
    templates: Path | None = None


class Example(NamedTuple):
    """What a training step takes on one rank.

    Attributes:
        number: of the example.
        name: the protein.
        batches: a batch for each recycle and one for the last run, cropped alike.
    """

    number: int
    name: str
    batches: list[Batch]


def find_proteins(folder: Path | str, names: Sequence[str] = ()) -> tuple[Protein, ...]:
    """The proteins in a folder by name, or those named; folders without a structure are left out.

    Raises:
        FoldInputError: there is no such folder, a protein that was named has no structure or no
            alignment, or there is no protein at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise problem(folder, None, "there is no such folder", "check the name")
    wanted = names or sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [protein for name in wanted if (protein := _protein(folder / name, must=bool(names)))]
    if not found:
        raise problem(
            folder, None, "no protein in it",
            "make a folder for each, such as 1abc with 1abc.cif and an alignment in it",
        )  # fmt: skip
    return tuple(found)


class Proteins(Dataset[Example]):
    """Numbered training examples without end; each protein once before any comes again.

    Which protein, crop, MSA rows, masks, templates, number of recycles and whether the FAPE is
    clamped follow from the seed and the number alone, so training can go on from any step. The
    ranks of one step have the same number of recycles (Suppl. Sec. 1.10).

    Args:
        proteins: as `find_proteins` gives them.
        sizes: how much the model sees; ``recycles`` is the most, each number as likely.
        seed: of everything drawn.
        ranks: data-parallel ranks, each of which takes one example a step.
        clamped: part of the examples whose FAPE is clamped (Suppl. Sec. 1.9.2).
        keep: proteins whose files stay in memory.
    """

    def __init__(
        self,
        proteins: Sequence[Protein],
        *,
        sizes: Sizes,
        seed: int = 0,
        ranks: int = 1,
        clamped: float = 0.9,
        keep: int = 64,
    ) -> None:
        self.proteins = tuple(proteins)
        self.sizes = sizes
        self.seed = seed
        self.ranks = ranks
        self.clamped = clamped
        self.keep = keep
        self._read: OrderedDict[int, Target] = OrderedDict()

    def __getitem__(self, number: int) -> Example:
        """The example of that number, from 0.

        Raises:
            FoldInputError: a file of the protein cannot be used.
        """
        index = self.index_of(number)
        of_step = np.random.default_rng([self.seed, _RECYCLES, number // self.ranks])
        recycles = int(of_step.integers(0, self.sizes.recycles + 1))
        rng = np.random.default_rng([self.seed, _DRAW, number])
        clamped = torch.tensor(float(rng.random() < self.clamped))
        target = self.target(index)
        target = replace(
            target, templates=tuple(templates.draw(rng, target.templates, self.sizes.max_templates))
        )
        sizes = replace(self.sizes, recycles=recycles)
        batches = target.batches(sizes, int(rng.integers(2**63)))
        for batch in batches:
            batch["use_clamped_fape"] = clamped
        return Example(number, self.proteins[index].name, batches)

    def index_of(self, number: int) -> int:
        """Which protein the example of that number is of."""
        epoch, place = divmod(number, len(self.proteins))
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.proteins))
        return int(order[place])

    def target(self, index: int) -> Target:
        """A protein with its alignments, templates and labels, read once."""
        if index in self._read:
            self._read.move_to_end(index)
        else:
            self._read[index] = read_protein(self.proteins[index])
            if len(self._read) > self.keep:
                self._read.popitem(last=False)
        return self._read[index]

    def whole(self, index: int, *, recycles: int, seed: int = 0) -> list[Batch]:
        """A protein uncropped with its best templates, the same each time: for validation."""
        sizes = replace(self.sizes, crop_size=None, recycles=recycles)
        return self.target(index).batches(sizes, seed)


def read_protein(protein: Protein) -> Target:
    """A protein with its alignments merged, its templates and the labels of its structure.

    The target is the first row of the first alignment; its chain is the one of that sequence, or
    else the most like it.

    Raises:
        FoldInputError: a file cannot be used, or no chain has the target's sequence.
        MissingExtraError: gemmi is not installed.
    """
    first, *others = protein.alignments
    alignments = [read_alignment(first)]
    sequence = alignments[0].target
    alignments += [read_alignment(path, sequence) for path in others]
    found = (
        templates.search(sequence, protein.templates, missing="skip").templates
        if protein.templates
        else ()
    )
    structure = read_structure(protein.structure)
    chain = _likest_chain(sequence, structure)
    labels = label_features(sequence, structure, structure.chain(chain))
    return monomer_target(sequence, alignments, found, labels=labels)


def load(
    data: Proteins,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    workers: int = 2,
    ahead: int = 2,
) -> DataLoader[Example]:
    """The examples of steps ``start`` to ``stop``, made ahead of time by other processes.

    Args:
        data: the examples.
        start: the first step, such as the one that a checkpoint was taken before.
        stop: the step after the last.
        rank: this data-parallel rank; step n takes example ``n * data.ranks + rank``.
        workers: processes; 0 makes each example when it is asked for.
        ahead: examples that each process has ready.

    Raises:
        FoldInputError: on iteration, when a file cannot be used.
    """
    numbers = range(start * data.ranks + rank, stop * data.ranks, data.ranks)
    return load_numbers(data, numbers, workers=workers, ahead=ahead)


def load_numbers(
    data: Proteins, numbers: Sequence[int], *, workers: int = 2, ahead: int = 2
) -> DataLoader[Example]:
    """The examples of these numbers, made ahead of time by other processes.

    Args:
        workers: processes; 0 makes each example when it is asked for.
        ahead: examples that each process has ready.

    Raises:
        FoldInputError: on iteration, when a file cannot be used.
    """
    return DataLoader(
        data,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=_end_quietly,
    )


def _end_quietly(_: int) -> None:
    """In a worker: let the process that reads from it be the one that says why a run ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all; the reader ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # what it inherited would keep a dead reader's connections open
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    told = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, EOFError | OSError):  # the reader hung up
            told(kind, error, trace)

    sys.excepthook = tell


def _protein(folder: Path, *, must: bool) -> Protein | None:
    """The protein of one folder; None if it has no structure and need not have one."""
    structures = [folder / f"{folder.name}{ending}" for ending in _STRUCTURES]
    structure = next((path for path in structures if path.is_file()), None)
    if structure is None:
        if must:
            raise problem(folder, None, "no structure in it", f"put {structures[0].name} there")
        return None
    alignments = sorted(path for path in folder.iterdir() if path.name.endswith(_ALIGNMENTS))
    if not alignments:
        raise problem(folder, None, "no alignment in it", "put an .a3m or .sto file there")
    extra = folder / "templates"
    return Protein(folder.name, structure, tuple(alignments), extra if extra.is_dir() else None)


def _likest_chain(sequence: str, structure: Structure) -> str:
    same = [name for name, chain in structure.chains.items() if chain.sequence == sequence]
    if same:
        return same[0]
    likeness = {}
    for name, chain in structure.chains.items():
        pairs = templates.aligned_pairs(sequence, chain.sequence)
        likeness[name] = sum(sequence[i] == chain.sequence[j] for i, j in pairs.items())
    return max(likeness, key=lambda name: likeness[name])
