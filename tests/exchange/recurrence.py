"""Linear attention as its recurrence says, position by position, in one process."""

import torch

KINDS = ("none", "head", "position", "channel")


def inputs(shape, kind, *, dtype=torch.float64, seed=0, strength=2.0):
    """Leaves q, k, v and the decay, of ``shape`` b, h, s, d, e; the same on every rank."""
    b, h, s, d, e = shape
    generator = torch.Generator().manual_seed(seed)

    def leaf(*sizes, factor=1.0):
        x = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return (factor * (x.abs() if factor < 0 else x)).to(dtype).requires_grad_()

    sizes = {"head": (h,), "position": (b, h, s), "channel": (b, h, s, d)}
    decay = leaf(*sizes[kind], factor=-strength) if kind in sizes else None
    return leaf(b, h, s, d), leaf(b, h, s, d), leaf(b, h, s, e), decay


def recurrence(q, k, v, log_decay=None, initial=None):
    """Output and last state, one position after another."""
    b, h, s, d = q.shape
    state = q.new_zeros(b, h, d, v.shape[-1]) if initial is None else initial
    outs = [v[:, :, :0]]
    for t in range(s):
        if log_decay is not None:
            state = keep(log_decay, t) * state
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(q[:, :, t, None, :] @ state)
    return torch.cat(outs, 2), state


def keep(log_decay, t):
    if log_decay.dim() == 1:
        return log_decay.exp()[None, :, None, None]
    return log_decay[:, :, t].exp().reshape(*log_decay.shape[:2], -1, 1)


def attend(q, k, v, log_decay=None, *, causal=True, documents=None):
    """Output only: also read from both ends, and document by document."""
    if documents is not None:
        parts = [x.split(list(documents), 2) for x in (q, k, v)]
        decays = [log_decay] * len(documents)
        if log_decay is not None and log_decay.dim() > 1:
            decays = log_decay.split(list(documents), 2)
        return torch.cat([attend(*p, causal=causal) for p in zip(*parts, decays, strict=True)], 2)
    out = recurrence(q, k, v, log_decay)[0]
    if causal:
        return out
    turned = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay.flip(2)
    back = recurrence(q.flip(2), k.flip(2), v.flip(2), turned)[0].flip(2)
    return out + back - (q * k).sum(-1, keepdim=True) * v
