"""The language model: against a plain recomputation, causality, positions, its loss."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hairpin.errors import RecipeError
from hairpin.kernels.routed import SoftmaxAttention
from hairpin.models.llm import ATTENDS, IGNORED, LLM, ROUTED, LLMConfig, tiny, token_losses
from hairpin.models.llm.model import rotary_angles, rotate
from hairpin.planning.split.seam import match_table


@pytest.fixture
def model() -> LLM:
    torch.manual_seed(0)
    made = LLM(tiny()).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def tokens(b=2, s=9) -> torch.Tensor:
    return torch.randint(256, (b, s), generator=torch.Generator().manual_seed(1))


def norm(x, weight, eps=1e-5):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def by_hand(model: LLM, row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One row's logits from the weights alone: complex rotations, heads and keys one by one."""
    config, w = model.config, dict(model.named_parameters())
    d, group = config.channels // config.heads, config.heads // config.kv_heads
    x = w["embedding.weight"][row]  # [s, c]
    turn = positions[:, None] * config.rotary_base ** (-2 * torch.arange(d // 2).double() / d)
    turn = torch.polar(torch.ones_like(turn), turn)

    def turned(y):
        z = torch.complex(y[:, : d // 2], y[:, d // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=1)

    for i in range(config.depth):
        p = f"blocks.{i}."
        y = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (y @ w[f"{p}attention.to_{n}.weight"].T for n in "qkv")
        heads = []
        for h in range(config.heads):
            g = h // group
            qh, kh, vh = q[:, h * d : (h + 1) * d], k[:, g * d : (g + 1) * d], v[:, g * d :][:, :d]
            scores = turned(qh) @ turned(kh).T / math.sqrt(d)
            hidden = torch.ones(len(row), len(row)).triu(1).bool()
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ vh)
        x = x + torch.cat(heads, dim=1) @ w[p + "attention.to_out.weight"].T
        y = norm(x, w[p + "mlp_norm.weight"])
        gate = y @ w[p + "mlp.gate.weight"].T
        y = gate * gate.sigmoid() * (y @ w[p + "mlp.up.weight"].T)
        x = x + y @ w[p + "mlp.down.weight"].T
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_logits_are_those_of_the_formulas(kv_heads):
    torch.manual_seed(2)
    model = LLM(replace(tiny(), kv_heads=kv_heads)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    row, positions = tokens(1, 7)[0], torch.tensor([5, 6, 7, 0, 1, 90, 91])
    ours = model(row[None], positions[None])[0]
    torch.testing.assert_close(ours, by_hand(model, row, positions), rtol=1e-10, atol=1e-10)


def test_positions_count_from_zero_if_left_out(model):
    row = tokens()
    assert torch.equal(model(row), model(row, torch.arange(9).expand(2, 9)))


def test_only_differences_of_positions_matter(model):
    row, positions = tokens(), torch.arange(9).expand(2, 9)
    torch.testing.assert_close(model(row, positions + 10**6), model(row), rtol=1e-7, atol=1e-9)


def test_a_logit_depends_on_its_token_and_those_before(model):
    row = tokens()
    changed = row.clone()
    changed[:, 5] += 1
    same = (model(row) == model(changed % 256)).all(-1)
    assert same[:, :5].all()
    assert not same[:, 5:].any()


def test_angles_of_far_positions_keep_their_precision():
    like = torch.zeros(1)
    far = rotary_angles(torch.tensor([[10_000_019]]), 8, base=1e4, like=like)
    exact = [10_000_019 * 1e4 ** (-i / 4) % (2 * math.pi) for i in range(4)]
    torch.testing.assert_close(far.flatten().tolist(), exact, rtol=1e-6, atol=1e-6)
    assert far.dtype == torch.float32


def test_half_precision_stays_half(model):
    half = model.bfloat16()
    assert half(tokens()).dtype == torch.bfloat16
    x = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    angle = rotary_angles(torch.arange(3)[None], 8, base=1e4, like=x)
    assert angle.dtype == torch.float32
    assert rotate(x, angle).dtype == torch.bfloat16


@pytest.mark.parametrize(("b", "s"), [(1, 1), (0, 4), (3, 33)])
def test_any_number_of_rows_and_tokens(model, b, s):
    logits = model(tokens(b, s))
    assert logits.shape == (b, s, 256)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_is_routed_and_along_the_sequence(model):
    table = match_table(model, ATTENDS)
    assert list(table.seams) == ["blocks.0.attention", "blocks.1.attention"]
    routed = [n for n, m in model.named_modules() if isinstance(m, SoftmaxAttention)]
    assert routed == [ROUTED[0].replace("*", str(i)) for i in range(2)]
    assert all(m.causal for m in model.modules() if isinstance(m, SoftmaxAttention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 36}, "channels=36 over heads=4 must give an even number"),
        ({"kv_heads": 3}, "heads=4 cannot share kv_heads=3 evenly"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        replace(LLMConfig(heads=4), **change)


# ------------------------------------------------------------------------------------------- loss


def test_the_loss_is_a_sum_over_labels_that_count():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4, IGNORED], [IGNORED, 2, 1]])
    total, count = token_losses(logits, labels)
    kept = labels != IGNORED
    expected = -F.log_softmax(logits, -1)[kept].gather(1, labels[kept][:, None]).sum()
    assert count == 4
    torch.testing.assert_close(total, expected)
    (grad,) = torch.autograd.grad(total, logits)
    assert (grad[~kept] == 0).all()


def test_nothing_that_counts_is_a_loss_of_zero_with_a_gradient():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    total, count = token_losses(logits, torch.full((1, 2), IGNORED))
    total.backward()
    assert (total, count) == (0, 0)
    assert (logits.grad == 0).all()


def test_the_loss_of_half_precision_is_summed_in_single():
    logits = torch.zeros(1, 4096, 256, dtype=torch.bfloat16)
    total, count = token_losses(logits, torch.zeros(1, 4096, dtype=torch.long))
    assert (total / count).item() == pytest.approx(math.log(256), rel=1e-5)
