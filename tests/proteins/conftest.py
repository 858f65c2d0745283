"""The folder of real proteins, which lies beside the project and not in it."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "proteins"


@pytest.fixture
def real():
    """Path of the folder of real proteins."""
    if not FOLDER.is_dir():
        pytest.skip("needs ../shared/data/proteins beside the project, which is not there")
    return FOLDER


@pytest.fixture
def write(tmp_path):
    """A function that writes a file, text or bytes, and gives its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file
