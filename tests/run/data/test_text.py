"""Text as rows of bytes: whole, in order, the same for any ranks, split by file."""

import math
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hairpin.errors import DataError
from hairpin.run.data import rank_indices
from hairpin.run.data.text import (
    Documents,
    EpochOrder,
    Text,
    is_validation,
    source_files,
    standard_library,
    unigram_entropy,
)

TEXTS = [b"abc", b"", b"defghij", b"kl"]  # 4 + 1 + 8 + 3 = 16 tokens with their starts


@pytest.fixture
def documents() -> Documents:
    return Documents.of(TEXTS)


def lengths_by_hand(documents: Documents, first: int, length: int) -> list[int]:
    """Token by token: a new document begins at each byte 0."""
    found = [0]
    for spot in range(first, first + length):
        begins = documents.tokens[spot % len(documents.tokens)] == 0
        if begins and found[-1] > 0:
            found.append(0)
        found[-1] += 1
    return found


def test_documents_stand_end_to_end_each_after_its_start(documents):
    assert bytes(documents.tokens) == b"\0abc\0\0defghij\0kl"
    assert documents.starts == (0, 4, 5, 13)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 15, 16])
def test_rows_hold_the_whole_text_and_the_next_token_of_each(documents, length):
    text = Text(documents, length)
    rows = text.rows(range(len(text)))
    whole = rows.tokens.flatten().tolist()
    assert len(whole) >= 16 > len(whole) - length
    assert whole == [documents.tokens[i % 16] for i in range(len(whole))]
    assert rows.labels.flatten().tolist() == [*whole[1:], documents.tokens[len(whole) % 16]]
    assert rows.tokens.dtype == rows.labels.dtype == torch.int64
    assert rows.positions.tolist() == [list(range(length))] * len(text)


@pytest.mark.parametrize("length", [1, 3, 5, 7, 15, 16])
def test_lengths_of_documents_are_where_the_starts_are(documents, length):
    for place in range(4 * 16 // length):
        ours = documents.lengths(place * length, length)
        assert sum(ours) == length
        assert list(ours) == lengths_by_hand(documents, place * length, length)
    assert Text(documents, length).rows([1]).documents == (documents.lengths(length, length),)


def test_an_epoch_has_each_row_once_and_the_next_another_order():
    order = EpochOrder(20, seed=3)
    epochs = [[order[20 * epoch + i] for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    assert [order[i] for i in range(20)] == epochs[0]  # going back is the same again
    assert [EpochOrder(20, seed=4)[i] for i in range(20)] != epochs[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_together_have_the_rows_of_one(documents, ranks):
    text = Text(documents, 4, seed=1)
    whole = text.batch(range(7, 14)).tokens
    shares = [rank_indices(1, batch_size=7, rank=r, ranks=ranks) for r in range(ranks)]
    assert torch.equal(torch.cat([text.batch(share).tokens for share in shares]), whole)


def test_no_row_has_the_right_shape(documents):
    batch = Text(documents, 4).batch([])
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (0, 4)


def test_what_cannot_be_cut_is_refused(documents):
    for length in (0, 17):
        with pytest.raises(DataError, match=f"length={length} cannot be cut from 16 tokens"):
            Text(documents, length)
    with pytest.raises(DataError, match="there is no text"):
        Documents.of([])
    with pytest.raises(DataError, match="document 1 has a byte 0"):
        Documents.of([b"a", b"b\0"])


def test_entropy_is_that_of_the_frequencies():
    documents = Documents.of([b"\1"])
    assert unigram_entropy(documents) == pytest.approx(math.log(2))
    assert unigram_entropy(Documents.of([b""])) == 0


def test_files_are_shared_out_by_name(tmp_path):
    for name in ("b.py", "a/c.py", "a/b.py", "site-packages/x.py", "a/tests/y.py", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for name, _ in source_files(tmp_path)] == ["a/b.py", "a/c.py", "b.py"]
    kept = [name for name in (f"m{i}.py" for i in range(1000)) if is_validation(name)]
    assert 60 < len(kept) < 140
    with pytest.raises(DataError, match="has no Python source for validation"):
        standard_library("validation", tmp_path / "a")


def test_the_standard_library_is_there_and_in_one_part_only():
    folder = Path(sysconfig.get_path("stdlib"))
    train, validation = standard_library("train"), standard_library("validation")
    assert len(train.tokens) > 4 * len(validation.tokens) > 10**6
    assert len(train.starts) + len(validation.starts) <= len(source_files(folder))
    text = bytes(train.tokens if not is_validation("json/decoder.py") else validation.tokens)
    assert b"\0" + (folder / "json/decoder.py").read_bytes() + b"\0" in text
    assert 3 < unigram_entropy(validation) < 3.5
