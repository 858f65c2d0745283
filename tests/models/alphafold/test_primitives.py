"""What the modules are built of: attention in each of its forms, and how layers start."""

import pytest
import torch

from hairpin.models.alphafold.primitives import Attention, GlobalAttention, Linear, attend


def by_hand(q, k, v, mask=None, bias=None):
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -1e9)
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_of_attention_is_the_same(with_bias, with_mask, learns, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, length, 8, dtype=dtype) for length in (6, 7, 7))
    mask = (torch.rand(5, 7) > 0.3).to(dtype) if with_mask else None
    bias = torch.randn(2, 6, 7, dtype=dtype, requires_grad=learns) if with_bias else None
    found, wanted = attend(q, k, v, mask=mask, bias=bias), by_hand(q, k, v, mask, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    if with_bias and learns:
        ours, theirs = (torch.autograd.grad(x.square().sum(), bias)[0] for x in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_with_no_key_attends_to_all_alike(with_bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 8) for _ in range(3))
    mask = torch.ones(3, 4)
    mask[1] = 0
    bias = torch.randn(2, 4, 4) if with_bias else None
    out = attend(q, k, v, mask=mask, bias=bias)
    torch.testing.assert_close(out[1], v[1].mean(1, keepdim=True).expand(2, 4, 8))


def test_global_attention_ignores_what_is_masked():
    torch.manual_seed(0)
    module = GlobalAttention(8, 2)
    torch.nn.init.normal_(module.output.weight)
    x, mask = torch.randn(3, 6, 8), torch.ones(3, 6)
    mask[:, 4:] = 0
    changed = x.clone()
    changed[:, 4:] = 7.0
    torch.testing.assert_close(module(x, mask)[:, :4], module(changed, mask)[:, :4])


def test_layers_start_as_the_paper_has_it():
    torch.manual_seed(0)
    assert not Attention(16, 2).output.weight.any()
    gate = Linear(16, 4, init="gating")
    assert not gate.weight.any()
    assert (gate.bias == 1).all()
    for init, std in (("default", 1), ("relu", 2**0.5), ("normal", 1), ("glorot", 1)):
        layer = Linear(400, 400, init=init)
        assert float(layer.weight.detach().std()) == pytest.approx(std / 20, rel=0.02)
        assert not layer.bias.any()
