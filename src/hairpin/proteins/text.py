"""Text files as lists of lines: plain or gzip, with Unix, Windows or old Macintosh line ends."""

import gzip
import zlib
from pathlib import Path

from hairpin.errors import FoldInputError, OutputError

_GZIP = b"\x1f\x8b"


def read_lines(path: Path | str) -> list[str]:
    """The lines of a text file without their ends; a gzip file is known by its first bytes.

    Raises:
        FoldInputError: the file is missing, a folder, unreadable, empty, cut short or not text.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise problem(
            path, line, f"byte {data[error.start]:#04x} is not text", "give a plain text file"
        ) from error
    if not text.strip():
        raise problem(path, None, "the file is empty", "write it again, or leave it out")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another folder"
        ) from error


def read_bytes(path: Path | str) -> bytes:
    """The bytes of a file, unpacked where it is gzip.

    Raises:
        FoldInputError: the file is missing, a folder, unreadable or a gzip file cut short.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise problem(path, None, "there is no such file", "check the name") from error
    except IsADirectoryError as error:
        raise problem(path, None, "this is a folder", "name a file in it") from error
    except OSError as error:
        raise problem(path, None, f"cannot be read: {error.strerror}", "check the file") from error
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise problem(
            path, None, f"the gzip file is cut short or damaged ({error})", "copy it again"
        ) from error


def problem(path: Path | str, line: int | None, what: str, fix: str) -> FoldInputError:
    """An error that names the file, the line where there is one, what is wrong and the fix."""
    place = f"{path}" if line is None else f"{path}, line {line}"
    return FoldInputError(f"{place}: {what}; {fix}")


def shorten(text: str, length: int = 40) -> str:
    """Text to quote in a message, cut where it is long."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
