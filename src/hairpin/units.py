"""Quantities as people write and read them: bytes, seconds, counts."""

import re

from hairpin.errors import UnitError

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_BYTES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_RATE_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def parse_bytes(text: int | str) -> int:
    """Bytes in a number or in text such as ``"40GiB"`` or ``"512 MB"``.

    Raises:
        UnitError: the text is not a number and a unit of bytes, or the amount is not positive.
    """
    if isinstance(text, int):
        amount = text
    else:
        match = _BYTES.fullmatch(text)
        if match is None or match[2].lower() not in _BYTE_UNITS:
            raise UnitError(
                f"cannot read {text!r} as an amount of memory; write a number and one of "
                "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, for example '40GiB'"
            )
        amount = int(float(match[1]) * _BYTE_UNITS[match[2].lower()])
    if amount <= 0:
        raise UnitError(f"an amount of memory must be more than 0 bytes, got {text!r}")
    return amount


def parse_rate(text: str) -> float | None:
    """Bits per second in text such as ``"50mbit"``; None for ``"unlimited"``.

    Raises:
        UnitError: the text is not a rate.
    """
    if text.strip().lower() == "unlimited":
        return None
    match = _BYTES.fullmatch(text)
    if match is None or match[2].lower() not in _RATE_UNITS or float(match[1]) <= 0:
        raise UnitError(
            f"cannot read {text!r} as a rate; write 'unlimited' or a number above 0 and one of "
            "bit, kbit, mbit, gbit, for example '200mbit'"
        )
    return float(match[1]) * _RATE_UNITS[match[2].lower()]


def format_bytes(count: float) -> str:
    """``1536`` -> ``"1.50 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_time(time_s: float) -> str:
    """``0.0042`` -> ``"4.20 ms"``."""
    if time_s < 1e-3:
        return f"{time_s * 1e6:.1f} us"
    if time_s < 1:
        return f"{time_s * 1e3:.2f} ms"
    if time_s < 120:
        return f"{time_s:.2f} s"
    return f"{int(time_s // 60)} min {int(time_s % 60):02d} s"
