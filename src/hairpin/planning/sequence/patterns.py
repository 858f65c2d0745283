"""Which of transformers' mask patterns a plan's own mask says too; all others are refused.

transformers describes a mask by a function of four indices. Those of its own are known by their
names, and what they hold is read off their closures.
"""

from collections.abc import Callable
from typing import Any

_HOME = "transformers.masking_utils"
_PLAIN = {"causal_mask_function", "bidirectional_mask_function"}
_WINDOWS = {f"sliding_window{kind}_overlay.<locals>.inner_mask" for kind in ("", "_bidirectional")}
_ALL_OF = "and_masks.<locals>.and_mask"
# Positions that do not follow each other, as those of a part, are taken for packed sequences.
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_OF_PACKED = "remap_positions_for_packed_sequence.<locals>.inner_mask"


def unknown_pattern(function: Callable[..., Any], window: int | None) -> str | None:
    """The name of what is neither causal, bidirectional nor a window; None if there is nothing.

    Args:
        window: of the model's config, which its attentions say too.
    """
    name = function.__qualname__
    if function.__module__ != _HOME:
        return f"{function.__module__}.{name}"
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    held = dict(zip(function.__code__.co_freevars, cells, strict=True))
    if name in _PLAIN or (name in _WINDOWS and held["sliding_window"] == window):
        return None
    if name == _OF_PACKED:
        return unknown_pattern(held["mask_function"], window)
    if name != _ALL_OF:
        return name
    parts = held["mask_functions"]
    if any(part.__qualname__ == _OF_PACKED for part in parts):
        parts = [part for part in parts if part.__qualname__ != _PACKED]
    found = (unknown_pattern(part, window) for part in parts)
    return next((unknown for unknown in found if unknown is not None), None)
