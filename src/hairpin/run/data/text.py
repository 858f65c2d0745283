"""Text that every Python brings along: the source of its own standard library, byte by byte.

A token is a byte. A document is a file, and byte 0, which no source has, begins it. Documents stand
end to end and are cut into rows of `length` tokens, so that nothing is padded and nothing left out;
the last row goes on with the first document. Every tenth file or so, by the digest of its name, is
kept for validation. The order of the files is that of their names, so one Python version has one
text. All of it is read before the first step (13 MB); a batch is then a copy of some rows.

Dims: b rows, s positions.
"""

import hashlib
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray
from torch import Tensor

from hairpin.errors import DataError

START = 0  # the token that begins a document
VALIDATION_SHARE = 10  # one file in so many
NOT_SOURCE = ("site-packages", "dist-packages", "test", "tests", "__pycache__")
Part = Literal["train", "validation"]


class TokenBatch(NamedTuple):
    """Rows of text.

    Attributes:
        tokens: bytes.
        labels: the token after each one; that after the last is the next row's first.
        positions: the place of each token in its row.
        documents: for each row the lengths of the documents in it, which add up to s. The first
            and the last may be parts of longer ones.
    """

    tokens: Int64[Tensor, "b s"]
    labels: Int64[Tensor, "b s"]
    positions: Int64[Tensor, "b s"]
    documents: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Documents:
    """Texts end to end: all their bytes, and where each begins."""

    tokens: UInt8[ndarray, " n"]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> "Documents":
        """Put texts end to end, byte 0 before each.

        Raises:
            DataError: there is none, or one has a byte 0.
        """
        if not texts:
            raise DataError("there is no text to train on; give at least one document")
        spoilt = [index for index, text in enumerate(texts) if START in text]
        if spoilt:
            raise DataError(
                f"document {spoilt[0]} has a byte 0, which marks the start of a document; leave it "
                f"out"
            )
        joined = b"".join(bytes([START]) + text for text in texts)
        starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
        return cls(np.frombuffer(joined, dtype=np.uint8), tuple(starts.tolist()))

    def lengths(self, first: int, length: int) -> tuple[int, ...]:
        """Lengths of the documents in tokens `first` to `first + length`, counted round the end."""
        cuts, end, lap = [first], first + length, 0
        while lap < end:
            inner = self.starts[bisect_right(self.starts, first - lap) :]
            cuts += [lap + start for start in inner if first < lap + start < end]
            lap += len(self.tokens)
        return tuple(int(n) for n in np.diff([*cuts, end]))


class Text:
    """An endless, numbered collection of rows: row i is the same on any number of ranks."""

    def __init__(self, documents: Documents, length: int, *, seed: int = 0) -> None:
        """Cut documents into rows.

        Args:
            length: tokens of a row.
            seed: keys the order of the rows, another one in each epoch.

        Raises:
            DataError: `length` is below 1, or no text is that long.
        """
        if not 1 <= length <= len(documents.tokens):
            raise DataError(
                f"rows of length={length} cannot be cut from {len(documents.tokens)} tokens; give "
                f"a length from 1 to that"
            )
        self.documents = documents
        self.length = length
        self.order = EpochOrder(-(-len(documents.tokens) // length), seed)

    def __len__(self) -> int:
        """How many rows hold the whole text."""
        return self.order.count

    def batch(self, index: Sequence[int]) -> TokenBatch:
        """The rows with these numbers, in the order of the epochs."""
        return self.rows([self.order[i] for i in index])

    def rows(self, places: Sequence[int]) -> TokenBatch:
        """The rows at these places of the text; the first is 0."""
        n = self.length
        size = len(self.documents.tokens)
        spots = np.asarray(places, dtype=np.int64).reshape(-1, 1) * n + np.arange(n + 1)
        taken = torch.from_numpy(self.documents.tokens[spots % size].astype(np.int64))  # [b, n + 1]
        return TokenBatch(
            tokens=taken[:, :-1],
            labels=taken[:, 1:],
            positions=torch.arange(n).expand(len(taken), n),
            documents=tuple(self.documents.lengths(place * n, n) for place in places),
        )


class EpochOrder:
    """Example numbers 0, 1, ... to examples 0 .. count - 1: each once an epoch, in a new order."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._order = np.arange(count)

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])


def standard_library(part: Part, folder: Path | None = None) -> Documents:
    """The source files of Python's standard library that belong to one part.

    Args:
        folder: another folder to read `*.py` files of.

    Raises:
        DataError: the folder has no source for this part.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts = [
        text
        for name, path in source_files(folder)
        if is_validation(name) == (part == "validation")
        and START not in (text := path.read_bytes())
    ]
    if not texts:
        raise DataError(
            f"{folder} has no Python source for {part}; use a Python that was installed with its "
            f"standard library as .py files"
        )
    return Documents.of(texts)


def source_files(folder: Path) -> list[tuple[str, Path]]:
    """Python files below a folder with their names in it, in the order of the names.

    Without those of installed packages and of tests, which are not the same everywhere.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_SOURCE]  # not gone into
        here = Path(parent)
        found += [here / name for name in files if name.endswith(".py")]
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def is_validation(name: str) -> bool:
    """Whether the file of this name is kept for validation; other files have no say in it."""
    digest = hashlib.sha256(name.encode()).digest()
    return digest[0] % VALIDATION_SHARE == 0


def unigram_entropy(documents: Documents) -> float:
    """Nats per token of a model that knows how often each byte occurs and nothing else."""
    count = np.bincount(documents.tokens, minlength=256)
    share = count[count > 0] / count.sum()
    return float(-(share * np.log(share)).sum())
