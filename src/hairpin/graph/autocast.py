"""The setting of torch.autocast: a graph has the dtypes of the one it was traced under."""

import torch

_KINDS = ("cpu", "cuda", "xpu", "mps")


def autocast_now() -> str:
    """Devices for which autocast is on, with its dtype, such as ``"cpu bfloat16"``; else empty."""
    return ", ".join(
        f"{kind} {torch.get_autocast_dtype(kind)}".replace("torch.", "")
        for kind in _KINDS
        if torch.is_autocast_enabled(kind)
    )
