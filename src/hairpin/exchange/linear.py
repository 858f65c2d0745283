"""Linear attention along a split sequence: each rank attends to its own part, and a state crosses.

LASP (Sun et al. 2024, arXiv 2404.02882) and LASP-2 (arXiv 2502.07563), with decays of every kind.
A rank sums its keys and values up, starts to pass that on, attends within its part meanwhile, and
then adds what arrives. The same holds in the backward pass.

Dims: b batch, h heads, s positions of this rank, d key channels, e value channels.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.transport import Link
from hairpin.comm.verbs import all_reduce
from hairpin.errors import LayoutError
from hairpin.exchange.affine import Schedule, check_schedule, start_prefix
from hairpin.kernels.linear_attention import check, own_term, summarize, turned
from hairpin.kernels.linear_attention import linear_attention as attend_alone
from hairpin.kernels.linear_chunks import read_state
from hairpin.layout import shard_offset, shard_size


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    mesh: Mesh | DeviceMesh,
    axis: str,
    causal: bool = True,
    schedule: Schedule = "all_gather",
    documents: Sequence[int] | None = None,
    length: int | None = None,
) -> Tensor:
    """:func:`hairpin.kernels.linear_attention.linear_attention` along a split sequence.

    Ranks along ``axis`` hold consecutive parts of any lengths, also none. What crosses them is a
    state ``[b, h, d, e]`` in float32 (float64 where the inputs are), however long the parts are;
    `hairpin.exchange.affine` says how many bytes that is. Not causal, states cross both ways;
    without decay and documents they are added up instead.

    Args:
        q: queries of this rank's part ``[b, h, s, d]``.
        k: keys ``[b, h, s, d]``.
        v: values ``[b, h, s, e]``.
        log_decay: None, ``[h]``, ``[b, h, s]`` or ``[b, h, s, d]``; 0 or less, of the same kind on
            all ranks.
        mesh: the ranks.
        axis: the mesh axis that the sequence is split over.
        causal: whether a position sees only itself and earlier ones.
        schedule: ``"all_gather"``, ``"chain"`` or ``"log_scan"``; the sum of states without decay
            needs none.
        documents: lengths of the documents that stand end to end in the whole sequence, which is
            then split evenly (see `hairpin.layout`). None sees another.
        length: length of the whole sequence, to have this rank's share of it checked.

    Returns:
        ``[b, h, s, e]`` in the dtype of ``v``.

    Raises:
        LayoutError: shapes that do not fit, an unknown schedule, documents that do not fill the
            sequence, or a part that is not this rank's share.
        CommError: a rank is gone or did not answer before the mesh's deadline.
    """
    mesh = as_mesh(mesh)
    check(q, k, v, log_decay)
    check_schedule(schedule)
    link = Link(mesh, axis)
    _check_share(k.shape[2], link, documents, length)
    decay = _forgetting(log_decay, k, documents, link, ends=False)
    if not causal:
        if log_decay is None and documents is None:
            return _sum_over_ranks(q, k, v, link)
        at_ends = _forgetting(log_decay, k, documents, link, ends=True)
        return _both_ways(q, k, v, (decay, at_ends), link=link, schedule=schedule)
    if link.size == 1:
        return attend_alone(q, k, v, decay)[0]
    segment = summarize(k, v, decay)
    pending = start_prefix(segment.state, segment.decay, link, schedule=schedule)
    out = segment.attend(q)
    return (out + segment.receive(q, pending.wait())).to(v.dtype)


def _sum_over_ranks(q: Tensor, k: Tensor, v: Tensor, link: Link) -> Tensor:
    """Every position sees every other alike: one sum of states."""
    state = summarize(k, v).state
    total = all_reduce(state, link.mesh, axis=link.axis, grad="partial")
    return read_state(q, total).to(v.dtype)


def _both_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: tuple[Tensor | None, Tensor | None],
    *,
    link: Link,
    schedule: Schedule,
) -> Tensor:
    """States from before and, reading backward, from after; both cross during the work within."""
    forward = summarize(k, v, decays[0])
    backward = summarize(k.flip(2), v.flip(2), turned(decays[1]))
    q_turned = q.flip(2)
    earlier = start_prefix(forward.state, forward.decay, link, schedule=schedule)
    later = start_prefix(backward.state, backward.decay, link, schedule=schedule, backward=True)
    out = forward.attend(q) + backward.attend(q_turned).flip(2) - own_term(q, k, v)
    out = out + forward.receive(q, earlier.wait())
    return (out + backward.receive(q_turned, later.wait()).flip(2)).to(v.dtype)


def _forgetting(
    log_decay: Tensor | None, k: Tensor, documents: Sequence[int] | None, link: Link, *, ends: bool
) -> Tensor | None:
    """The decay, minus infinity where a document begins: at its last position, if ``ends``."""
    if documents is None:
        return log_decay
    s = k.shape[2]
    first = shard_offset(sum(documents), link.size, link.rank)
    edges = [edge - ends for edge in accumulate(documents, initial=0)]
    here = [edge - first for edge in edges if first <= edge < first + s]
    marks = torch.zeros(s, dtype=torch.bool, device=k.device)
    marks[here] = True
    if log_decay is None:
        log_decay = k.new_zeros(1, 1, s)
    elif log_decay.dim() == 1:
        log_decay = log_decay.reshape(1, -1, 1).expand(1, -1, s)
    return log_decay.masked_fill(marks if log_decay.dim() == 3 else marks[:, None], -torch.inf)


def _check_share(s: int, link: Link, documents: Sequence[int] | None, length: int | None) -> None:
    if documents is not None:
        if any(n < 0 for n in documents):
            raise LayoutError(f"documents={list(documents)}: a length is a whole number, 0 or more")
        if length is not None and sum(documents) != length:
            raise LayoutError(
                f"documents of {sum(documents)} positions in all do not fill a sequence of "
                f"length={length}; their lengths have to add up to it"
            )
        length = sum(documents)
    if length is not None and s != shard_size(length, link.size, link.rank):
        raise LayoutError(
            f"rank {link.rank} of {link.size} on axis {link.axis!r} has {s} positions; of a "
            f"sequence of {length} its share is {shard_size(length, link.size, link.rank)}"
        )
