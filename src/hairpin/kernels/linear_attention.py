"""Linear attention with decay, chunk by chunk: products within a chunk, a state between chunks.

The recurrence is ``S_t = exp(g_t) S_(t-1) + k_t v_t^T``, ``o_t = q_t S_t``; ``g`` acts on the key
channels. Without decay: Katharopoulos et al. 2020 (arXiv 2006.16236). One decay per head: RetNet
(2307.08621), Lightning Attention (2401.04658). One per token: Mamba-2 (2405.21060). One per token
and key channel: gated linear attention (2312.06635).

A decay of minus infinity forgets all that came before: that is how documents are kept apart.

Dims: b batch, h heads, s positions, d key channels, e value channels, n chunks; j is 1 or d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hairpin.errors import LayoutError
from hairpin.kernels.choice import why_not
from hairpin.kernels.linear_chunks import chunk_outputs, chunk_states, read_state

WIDEST = 128  # key and value channels of a head that the Triton kernels take


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """``o_t = q_t S_t`` with ``S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T``.

    Not causal, the sequence is read from both ends, each position decaying what reaches it, and
    each position's own term counts once. Without decay that is ``q (k^T v)``.

    Args:
        q: queries ``[b, h, s, d]``, as they are: scale them, or map them to features, before.
        k: keys ``[b, h, s, d]``.
        v: values ``[b, h, s, e]``.
        log_decay: 0 or less; None for no decay, ``[h]`` for one per head, ``[b, h, s]`` for one per
            position, ``[b, h, s, d]`` for one per position and key channel. b and h may be 1.
            Minus infinity forgets the state. Values above 0 are not looked for; they grow the
            state, and overflow when they add up.
        initial: state before the first position, ``[b, h, d, e]``; None for zero.
        causal: whether a position sees only itself and earlier ones.

    Returns:
        The output ``[b, h, s, e]`` in the dtype of ``v``, and the state after the last position
        ``[b, h, d, e]``, in float32 (float64 where the inputs are).

    Raises:
        LayoutError: shapes that do not fit, or dtypes that are not floating point.
    """
    check(q, k, v, log_decay)
    if initial is not None and initial.shape != _state_shape(k, v):
        raise LayoutError(
            f"initial has shape {tuple(initial.shape)}; the state of these keys and values is "
            f"[b, h, d, e] = {_state_shape(k, v)}"
        )
    segment = summarize(k, v, log_decay, initial=initial)
    if causal:
        return segment.attend(q).to(v.dtype), segment.state
    if log_decay is None:
        return read_state(q, segment.state).to(v.dtype), segment.state
    backward = summarize(k.flip(2), v.flip(2), turned(log_decay))
    out = segment.attend(q) + backward.attend(q.flip(2)).flip(2) - own_term(q, k, v)
    return out.to(v.dtype), segment.state


@dataclass(frozen=True)
class Segment:
    """Keys and values of consecutive positions, and what they do to a state that comes in.

    ``S_after = decay S_before + state``. ``decay`` is ``[b, h, j, 1]``, b and h may be 1, or None
    where nothing decays; ``state`` is ``[b, h, d, e]``.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor | None  # [b, h, s, j]
    before: Tensor  # [b, h, n, d, e]: the state before each chunk
    state: Tensor
    decay: Tensor | None

    def attend(self, q: Tensor) -> Tensor:
        """Output of queries ``[b, h, s, d]`` at these positions, as if nothing came in.

        Returns:
            ``[b, h, s, e]`` in the dtype of the state.
        """
        if why_not_triton(q, self.k, self.v, self.log_decay) is None:
            from hairpin.kernels.cuda import linear_attention as twin

            out: Tensor = twin.chunk_outputs(q, self.k, self.v, self.log_decay, self.before)
            return out
        return chunk_outputs(q, self.k, self.v, self.log_decay, self.before)

    def receive(self, q: Tensor, incoming: Tensor) -> Tensor:
        """What a state that comes in adds to :meth:`attend`: ``q_t exp(g_1 + ... + g_t) S``.

        Args:
            q: ``[b, h, s, d]``.
            incoming: ``[b, h, d, e]``.

        Returns:
            ``[b, h, s, e]`` in the dtype of the state.
        """
        if self.log_decay is not None:
            q = q * self.log_decay.cumsum(2).exp()
        return read_state(q, incoming)


def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, initial: Tensor | None = None
) -> Segment:
    """The states of keys and values, before any query is looked at: one pass, ``s d e`` products.

    Args:
        k: ``[b, h, s, d]``.
        v: ``[b, h, s, e]``.
        log_decay: as in :func:`linear_attention`.
        initial: state before the first position, ``[b, h, d, e]``; None for zero.
    """
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    g = None if log_decay is None else _by_position(log_decay, k.shape[2]).to(dtype)
    if why_not_triton(k, k, v, g) is None:
        from hairpin.kernels.cuda import linear_attention as twin

        before, state = twin.chunk_states(k, v, g, initial)
    else:
        before, state = chunk_states(k, v, g, initial)
    decay = None if g is None else g.sum(2, keepdim=True).exp().transpose(-1, -2)
    return Segment(k, v, g, before, state, decay)


def own_term(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``(q_t . k_t) v_t``, which reading from both ends counts twice: ``[b, h, s, e]``."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return (q.to(dtype) * k.to(dtype)).sum(-1, keepdim=True) * v.to(dtype)


def turned(log_decay: Tensor | None) -> Tensor | None:
    """The decay of the sequence read backward, in the shape it has."""
    if log_decay is None or log_decay.dim() == 1:
        return log_decay
    return log_decay.flip(2)


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str | None:
    """Why torch's own operations compute this; None where Triton does."""
    reason = why_not(q, k, v, log_decay)
    if reason is not None:
        return reason
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return "queries, keys and values differ in dtype"
    if not (1 <= k.shape[-1] <= WIDEST and 1 <= v.shape[-1] <= WIDEST):
        return f"the heads have {k.shape[-1]} and {v.shape[-1]} channels"
    return None if k.numel() else "there are no positions"


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Refuse what :func:`linear_attention` cannot take.

    Raises:
        LayoutError: says which shape or dtype is wrong.
    """
    given = {"q": q, "k": k, "v": v}
    for name, x in given.items() if log_decay is None else (*given.items(), ("g", log_decay)):
        if not x.dtype.is_floating_point:
            raise LayoutError(
                f"{'log_decay' if name == 'g' else name} is {x.dtype}; it has to be floating point"
            )
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise LayoutError(
            f"linear attention takes q [b, h, s, d], k [b, h, s, d] and v [b, h, s, e]; these are "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if log_decay is None:
        return
    b, h, s, d = k.shape
    got = tuple(log_decay.shape)
    if got in ((h,), (1,)):
        return
    if (
        len(got) not in (3, 4)
        or got[0] not in (1, b)
        or got[1] not in (1, h)
        or got[2:] not in ((s,), (s, d))
    ):
        raise LayoutError(
            f"log_decay has shape {got}; give [h] = ({h},), [b, h, s] = {(b, h, s)} or "
            f"[b, h, s, d] = {(b, h, s, d)}"
        )


def _by_position(log_decay: Tensor, s: int) -> Tensor:
    """``[b, h, s, j]``, b and h may be 1."""
    if log_decay.dim() == 1:
        return log_decay.reshape(1, -1, 1, 1).expand(1, -1, s, 1)
    return log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay


def _state_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*k.shape[:2], k.shape[3], v.shape[3])
