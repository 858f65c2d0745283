"""What the modules are built of: global attention, and how layers start."""

import pytest
import torch

from hairpin.models.alphafold.primitives import Attention, GlobalAttention, Linear


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
