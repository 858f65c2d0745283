"""One block with something added to its scores, such as a bias that learns: our Triton kernel.

It is the kernel of :mod:`hairpin.kernels.attention`. That one has its bias in common for all b, so
where each b has its own they are taken as heads. It has no minus infinity: a hidden key gets a
logit so low that nothing is left of it beside any other, and in a row without others the port
throws away what comes out.
"""

import torch
from torch import Tensor

from hairpin.exchange.cuda import repeated, summed
from hairpin.exchange.port import Block, Qkv, State
from hairpin.kernels.attention import WIDEST
from hairpin.kernels.choice import why_not

_HIDDEN = -1e30  # finite, and no sum of exponentials above it loses a bit


def takes(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether the kernel can be used here and computes this."""
    if block.added is None or block.dropout or block.causal:
        return False
    d = q.shape[-1]
    if not 1 <= d <= WIDEST or abs(block.scale * d**0.5 - 1) > 1e-6:
        return False
    return why_not(q, k, block.added) is None


def forward(qkv: Qkv, block: Block) -> State:
    """``(out, lse)`` of one block."""
    from hairpin.kernels.cuda.attention import attention

    q, k, v, bias = _operands(qkv, block)
    out, peak, total = attention(q, k, v, None, bias)
    shape = qkv[0].shape[:3]
    return out.reshape(*shape, -1), (peak + total.log()).view(shape)


def backward(
    grad: Tensor, qkv: Qkv, state: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by one block, given output and log-sum-exp over all keys.

    The kernel divides by a sum of exponentials above a peak: above the log-sum-exp it is 1.
    """
    from hairpin.kernels.cuda.attention import attention_backward

    q, k, v, bias = _operands(qkv, block)
    grad, out = (x.to(q.dtype).reshape(q.shape) for x in (grad, state[0]))
    lse = state[1].to(torch.float32).reshape(q.shape[:3]).contiguous()
    grad_q, grad_k, grad_v, grad_bias = attention_backward(
        *(grad, out, q, k, v, None, bias, lse, torch.ones_like(lse), block.learns)
    )
    b, h = qkv[0].shape[:2]
    groups = qkv[1].shape[1]
    grads = [x.reshape(b, h, *x.shape[2:]) for x in (grad_q, grad_k, grad_v)]
    grad_added = None
    if block.learns:
        assert block.added is not None
        scores = grad_bias.view(-1, h, *grad_bias.shape[1:])
        grad_added = scores.sum_to_size(_with_four_dims(block.added).shape)
        grad_added = grad_added.view(block.added.shape)
    return grads[0], summed(grads[1], groups), summed(grads[2], groups), grad_added


def _operands(qkv: Qkv, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v with as many heads each, and the bias ``[h, q, k]``; or all with b h heads."""
    assert block.added is not None
    q, k, v = qkv
    added = _with_four_dims(block.added).clamp(min=_HIDDEN)
    each = added.shape[0]
    bias = added.expand(each, q.shape[1], q.shape[2], k.shape[2]).flatten(0, 1)
    tensors = [
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, repeated(q, k), repeated(q, v))
    ]
    if each > 1:
        tensors = [x.flatten(0, 1).unsqueeze(0) for x in tensors]
    return tensors[0], tensors[1], tensors[2], bias if bias.stride(-1) == 1 else bias.contiguous()


def _with_four_dims(added: Tensor) -> Tensor:
    return added.reshape((1,) * (4 - added.dim()) + added.shape)
