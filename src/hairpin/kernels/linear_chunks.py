"""Linear attention in plain operations: states from chunk to chunk, then all chunks at once.

Every exponent here is a sum of decays between two positions, never a difference of two such sums.
So no exponential of a positive number is formed, nothing cancels however strong the decay is, and a
decay may be minus infinity.

Dims: b batch, h heads, s positions, d key channels, e value channels, n chunks, c positions of one
chunk; j is 1 or d.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 64  # positions of a chunk, a power of 2


def in_own_dtype(function: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out: a state is a long sum, which half precision cannot hold."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _without_autocast(next(x for x in args if isinstance(x, Tensor))):
            return function(*args, **kwargs)

    return run


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()  # a graph that is exported shows no trace of it


@in_own_dtype
def chunk_states(
    k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk ``[b, h, n, d, e]``, and after the last ``[b, h, d, e]``.

    Args:
        k: ``[b, h, s, d]``.
        v: ``[b, h, s, e]``.
        g: log decay ``[b, h, s, j]`` or None.
        initial: ``[b, h, d, e]`` or None.
    """
    k, v, g = _in_chunks(k), _in_chunks(v), None if g is None else _in_chunks(g)
    if g is not None:
        k = k * _later(g).exp()
    added = k.transpose(-1, -2) @ v
    state = torch.zeros_like(added[:, :, 0]) if initial is None else initial.to(added.dtype)
    kept = None if g is None else g.sum(-2).exp().unsqueeze(-1).unbind(2)  # [b, h, j, 1] each
    before = []
    for n, add in enumerate(added.unbind(2)):
        before.append(state)
        state = add + (state if kept is None else kept[n] * state)
    return torch.stack(before, 2), state


@in_own_dtype
def chunk_outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Tensor:
    """``[b, h, s, e]``, in float32 at least, from the state before each chunk.

    Args:
        q: ``[b, h, s, d]``.
        k: ``[b, h, s, d]``.
        v: ``[b, h, s, e]``.
        g: log decay ``[b, h, s, j]`` or None.
        before: ``[b, h, n, d, e]``.
    """
    s = q.shape[2]
    q, k, v, g = _in_chunks(q), _in_chunks(k), _in_chunks(v), None if g is None else _in_chunks(g)
    within = _scores(q, k, g) @ v
    if g is not None:
        q = q * g.cumsum(-2).exp()
    out: Tensor = within + q @ before
    return out.flatten(2, 3)[:, :, :s]


@in_own_dtype
def read_state(q: Tensor, state: Tensor) -> Tensor:
    """``q S``: ``[b, h, s, d], [b, h, d, e] -> [b, h, s, e]``, in the dtype of the state."""
    return q.to(state.dtype) @ state


def _scores(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """What each position of a chunk takes from each: ``[b, h, n, c, c]``, lower triangle."""
    if g is not None and g.shape[-1] > 1:
        return _scores_by_channel(q, k, g)
    scores: Tensor = q @ k.transpose(-1, -2)
    return scores.tril() if g is None else scores * _between(g.squeeze(-1)).exp()


def _between(g: Tensor) -> Tensor:
    """Sum of ``g`` after position i up to t: ``[..., c] -> [..., t, i]``; -inf for later i."""
    c = g.shape[-1]
    sums = g.unsqueeze(-1).expand(*g.shape, c).tril(-1).cumsum(-2)
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1)
    return sums.masked_fill(later, -torch.inf)


def _scores_by_channel(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Blocks of 1, 2, 4... positions: what a block takes from the one on its left.

    A query's decay counts from the edge between the two blocks, a key's up to it, so that both are
    sums of decays, and the scores a product of matrices.
    """
    scores = (q * k).sum(-1)[..., None, None]  # [..., blocks, 1, 1]
    while (size := scores.shape[-1]) < q.shape[-2]:
        q_right, k_left = _blocks(q, size)[..., 1, :, :], _blocks(k, size)[..., 0, :, :]
        g_left, g_right = _blocks(g, size).unbind(-3)
        pairs = scores.shape[-3] // 2
        left, right = scores.unflatten(-3, (pairs, 2)).unbind(-3)
        q_right, k_left = q_right * g_right.cumsum(-2).exp(), k_left * _later(g_left).exp()
        across = q_right @ k_left.transpose(-1, -2)
        upper = torch.cat([left, torch.zeros_like(left)], -1)
        scores = torch.cat([upper, torch.cat([across, right], -1)], -2)
    return scores.squeeze(-3)


def _blocks(x: Tensor, size: int) -> Tensor:
    """Pairs of blocks: ``[..., c, d] -> [..., pairs, 2, size, d]``."""
    pairs = x.shape[-2] // (2 * size)
    return x.reshape(*x.shape[:-2], pairs, 2, size, x.shape[-1])


def _later(g: Tensor) -> Tensor:
    """Sum of ``g`` over the later positions of a chunk: ``[..., c, j]``, 0 at the last."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _in_chunks(x: Tensor) -> Tensor:
    """``[b, h, s, d] -> [b, h, n, c, d]`` in float32 at least, zeros at the end; n is 1 or more."""
    s = x.shape[2]
    c = min(CHUNK, 1 << max(s - 1, 0).bit_length())
    n = max(1, -(-s // c))
    x = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, n * c - s))
    return x.reshape(*x.shape[:2], n, c, x.shape[-1])
