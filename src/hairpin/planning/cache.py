"""A folder that keeps what takes long to work out: plans, and the speeds of this machine.

``HAIRPIN_CACHE`` names it, or switches it off with ``0`` or ``off``; else it is ``hairpin`` in the
user's cache folder. Files are written whole or not at all; one that cannot be read counts as
absent, and a folder that cannot be written to is left alone.
"""

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "HAIRPIN_CACHE"
_OFF = frozenset({"0", "off", "no", "false"})


@dataclass(frozen=True)
class Cache:
    """One folder of small text files."""

    folder: Path

    def read(self, name: str) -> str | None:
        """A file's text; None where it is absent or cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, name: str, text: str) -> None:
        """Write a file, replacing an old one at once; do nothing where that is not allowed."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=f".{name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(path).replace(self.folder / name)
        except BaseException:
            with suppress(OSError):
                Path(path).unlink()
            raise

    def drop(self, name: str) -> None:
        """Take a file away, if it is there."""
        with suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)


def cache_folder() -> Cache | None:
    """The cache that the environment asks for; None where it is switched off."""
    asked = os.environ.get(VARIABLE, "")
    if asked.strip().lower() in _OFF:
        return None
    if asked:
        return Cache(Path(asked).expanduser())
    home = _user_cache()
    return None if home is None else Cache(home / "hairpin")


def _user_cache() -> Path | None:
    """Where this system keeps a user's caches; None where there is no home."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    return home / ".cache"


def digest_of(text: str) -> str:
    """A short name for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
