"""Triton where it is installed; elsewhere names that let the files of kernels be read."""

from collections.abc import Callable
from typing import Any

__all__ = ["jit", "next_power_of_2", "tl", "triton", "turns"]

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
except ImportError:
    triton = tl = None

    def jit(kernel: Any) -> Any:
        """``kernel`` itself: nothing starts it where there is no Triton."""
        return kernel


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()


def turns(n: int, block: int) -> int:
    """How many blocks hold ``n``."""
    return -(-n // block)
