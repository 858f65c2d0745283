"""The fused kernels of torch on CUDA: how they are called, and on a GPU what they give."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hairpin.exchange import block, cuda
from hairpin.exchange.port import Block

CASES = [(torch.bfloat16, 4), (torch.bfloat16, 2), (torch.float32, 4)]


@pytest.mark.parametrize(("dtype", "groups"), CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_torch_takes_the_calls_as_they_are_made(dtype, groups, causal):
    """On tensors without values, so that operators and the order of their arguments are checked."""
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, 16, dtype=dtype, device="cuda")
        k = torch.empty(2, groups, 32, 16, dtype=dtype, device="cuda")
        v = torch.empty_like(k)
        call = Block(0.25, causal=causal)
        assert cuda.takes(q, k, call)
        out, lse = cuda.forward((q, k, v), call)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        if dtype == torch.float32:  # there the operator comes last; elsewhere heads are added up
            grads = cuda.backward(torch.empty_like(q), (q, k, v), (out, lse), call)
        else:
            grads = cuda.backward(torch.empty_like(q), (q, k, v), (out.float(), lse.float()), call)
        assert [x.shape for x in grads[:3]] == [q.shape, k.shape, v.shape]
        assert grads[3] is None


@pytest.mark.parametrize(
    ("dtype", "channels", "taken"),
    [
        (torch.float64, 16, False),
        (torch.float32, 12, False),
        (torch.float32, 512, True),
        (torch.float16, 512, False),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_plain_operations(dtype, channels, taken):
    q = torch.empty(1, 1, 1, channels, dtype=dtype)
    assert cuda.takes(q, q, Block(0.25)) is taken
    assert not cuda.takes(q, q, Block(0.25, added=torch.zeros(1, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "groups"), CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_they_give_what_plain_operations_give(dtype, groups, causal):
    require_alike(dtype, groups, Block(0.25, causal=causal))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "groups"), CASES)
def test_on_a_gpu_a_bias_learns_what_it_does_by_plain_operations(dtype, groups):
    """By our Triton kernel where Triton is here, some keys hidden and one row blind."""
    added = torch.randn(2, 4, 40, 40, device="cuda")
    added = added.masked_fill(torch.rand(40, 40, device="cuda") > 0.7, -torch.inf)
    added[:, :, 7] = -torch.inf
    require_alike(dtype, groups, Block(0.25, added=added, learns=True))


def require_alike(dtype: torch.dtype, groups: int, call: Block) -> None:
    """Raise unless values and gradients on the device are those of plain operations in float64."""
    made = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 40, 16), (2, groups, 40, 16), (2, groups, 40, 16), (2, 4, 40, 16)]
    q, k, v, grad = (torch.randn(s, generator=made).to("cuda", dtype) for s in shapes)
    exact = call if call.added is None else replace(call, added=call.added.double())
    wide = tuple(x.double() for x in (q, k, v))
    want = block.attend(wide, exact)
    got = block.attend((q, k, v), call)
    grads = block.attend_backward(grad, (q, k, v), got, call)
    wants = block.attend_backward(grad.double(), wide, want, exact)
    for x, y in zip((*got, *grads), (*want, *wants), strict=True):
        if y is None:
            assert x is None
            continue
        most = y[y.isfinite()].abs().max().item()
        torch.testing.assert_close(x.double(), y, rtol=0, atol=0.05 * most)
