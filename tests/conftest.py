"""What every test shares: one thread per process, and a word for each test that cannot run here."""

import os
import sys
from collections.abc import Callable

# Before torch is first imported: tests fork ranks, and ranks of one thread do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test reads or writes the user's own cache; those of the cache name a folder of their own.
os.environ["HAIRPIN_CACHE"] = "off"

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, saying why."""
    for marker, why_not in _OBSTACLES.items():
        reason = why_not() if item.get_closest_marker(marker) else None
        if reason is not None:
            pytest.skip(reason)


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, torch sees none"


def _why_no_root() -> str | None:
    if sys.platform != "linux":
        return f"needs Linux network namespaces, this is {sys.platform}"
    return None if os.geteuid() == 0 else "needs root to make network namespaces"


_OBSTACLES: dict[str, Callable[[], str | None]] = {"gpu": _why_no_gpu, "root": _why_no_root}
