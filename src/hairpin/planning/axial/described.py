"""Arguments in a few words, the same on ranks that were given the same."""

import hashlib
from typing import Any

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
_ODD = -7046029254386353131, -4658895280553007687  # of 64 bits, as mixing functions take them
_PARTS, _LEAST = 64, 1 << 10  # of a tensor's words


def described(leaf: Any) -> str:
    """A number, or a tensor's shape, dtype and a digest of its bits."""
    if isinstance(leaf, torch.Generator):
        return f"generator {random_digest(leaf.get_state())}"
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{tuple(leaf.shape)} {leaf.dtype}, digest {_digest(leaf):016x}"


def random_digest(state: Tensor) -> str:
    """The state of a generator."""
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=4).hexdigest()


def _digest(x: Tensor) -> int:
    """A number that a change of any bit changes, or of the order; made where ``x`` is."""
    x = torch.view_as_real(x) if x.is_complex() else x
    words = x.detach().contiguous().view(-1).view(_WORDS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    begun = 0
    for some in words.split(max(len(words) // _PARTS, _LEAST)):  # little memory meanwhile
        place = torch.arange(begun, begun + len(some), dtype=torch.int64, device=x.device)
        total += (_mixed(place + 1) * _mixed(some.to(torch.int64))).sum()
        begun += len(some)
    return int(total) & (1 << 64) - 1


def _mixed(words: Tensor) -> Tensor:
    """Words of 64 bits, each of whose bits is spread over the result."""
    words = ((words >> 32) ^ words) * _ODD[0]
    words = ((words >> 29) ^ words) * _ODD[1]
    return (words >> 32) ^ words
