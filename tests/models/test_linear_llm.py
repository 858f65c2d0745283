"""The language model with gated linear attention: against the formulas, causality, its seams."""

import math

import pytest
import torch
from torch import nn

from hairpin.errors import RecipeError
from hairpin.kernels.routed import GatedLinearAttention
from hairpin.models.linear_llm import ATTENDS, ROUTED, LinearLLM, LinearLLMConfig, tiny
from hairpin.planning.split.seam import match_table


@pytest.fixture
def model() -> LinearLLM:
    torch.manual_seed(0)
    made = LinearLLM(tiny()).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def tokens(b=2, s=9) -> torch.Tensor:
    return torch.randint(256, (b, s), generator=torch.Generator().manual_seed(1))


def inputs(b=2, h=3, s=7, d=4, e=5):
    torch.manual_seed(3)
    q, k = torch.randn(2, b, h, s, d, dtype=torch.float64)
    v = torch.randn(b, h, s, e, dtype=torch.float64)
    return q, k, v, -torch.rand(b, h, s, d, dtype=torch.float64)


def test_gated_linear_attention_is_a_decayed_sum_over_the_past():
    """In the parallel form: o_t = sum over u <= t of (q_t * decay from u to t) . k_u v_u."""
    q, k, v, log_decay = inputs()
    since = log_decay.cumsum(2)
    decay = (since[:, :, :, None] - since[:, :, None]).exp()  # [b, h, t, u, d]
    scores = torch.einsum("bhtd,bhtud,bhud->bhtu", q, decay, k).tril()
    ours = GatedLinearAttention()(q, k, v, log_decay)
    torch.testing.assert_close(ours, scores @ v, rtol=1e-10, atol=1e-10)


def test_gated_linear_attention_has_right_gradients():
    q, k, v, log_decay = (x[:1, :1, :3].requires_grad_() for x in inputs())
    torch.autograd.gradcheck(GatedLinearAttention(), (q, k, v, log_decay))


def test_no_token_is_no_output():
    assert GatedLinearAttention()(*inputs(s=0)).shape == (2, 3, 0, 5)


def test_a_block_attends_as_the_paper_has_it(model):
    """Gate alpha = sigmoid(.)^(1/16), queries by sqrt(d), a norm per head, and a SiLU gate."""
    attention = model.blocks[0].attention
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    alpha = attention.to_decay(x).sigmoid() ** (1 / 16)
    q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)
    heads = []
    for h in range(4):
        key, value = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
        state, rows = torch.zeros(4, 8, dtype=torch.float64), []
        for t in range(6):
            state = alpha[0, t, key, None] * state + k[0, t, key, None] * v[0, t, None, value]
            rows.append(q[0, t, key] / math.sqrt(4) @ state)
        y = torch.stack(rows)
        heads.append(attention.norm.weight * y / (y.square().mean(-1, True) + 1e-5).sqrt())
    gate = attention.to_gate(x)
    expected = attention.to_out(gate * gate.sigmoid() * torch.cat(heads, -1))
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_a_logit_depends_on_its_token_and_those_before(model):
    row = tokens()
    changed = row.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    same = (model(row) == model(changed)).all(-1)
    assert same[:, :5].all()
    assert not same[:, 5:].any()


def test_positions_change_nothing(model):
    row = tokens()
    assert torch.equal(model(row), model(row, torch.arange(9).expand(2, 9) + 7))


@pytest.mark.parametrize(("b", "s"), [(1, 1), (0, 4), (3, 33)])
def test_any_number_of_rows_and_tokens(model, b, s):
    logits = model(tokens(b, s))
    assert logits.shape == (b, s, 256)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_is_routed_and_along_the_sequence(model):
    assert list(match_table(model, ATTENDS).seams) == ["blocks.0.attention", "blocks.1.attention"]
    routed = [n for n, m in model.named_modules() if isinstance(m, GatedLinearAttention)]
    assert routed == [ROUTED[0].replace("*", str(i)) for i in range(2)]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="channels=36 over heads=4 must give an even number"):
        LinearLLMConfig(channels=36, heads=4)
