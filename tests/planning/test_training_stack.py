"""Budgets for the training of stacks: loops in blocks, and over the head and the loss."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hairpin as hp
from hairpin.errors import TraceError
from hairpin.run.profile import peak_cpu_bytes
from marks import slow


class Layer(nn.Module):
    """Causal attention in one kernel, and a wide MLP: ``x[b, n, 16]``."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.p if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Language(nn.Module):
    """Two layers, a head over many words, and the loss: ``tokens[b, n] -> []``."""

    def __init__(self, words: int = 600, p: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 16)
        self.layers = nn.ModuleList(Layer(p) for _ in range(2))
        self.head = nn.Linear(16, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _language(p: float = 0.0) -> tuple[Language, Tensor]:
    torch.manual_seed(0)
    return Language(p=p).double().train(), torch.randint(0, 600, (1, 300))


def _gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(tokens)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _step_peak(model: nn.Module, tokens: Tensor) -> int:
    model.zero_grad()
    peak = peak_cpu_bytes(lambda: model(tokens).backward())
    model.zero_grad()
    return peak


def test_head_and_loss_run_as_a_loop() -> None:
    model, tokens = _language()
    truth, whole = _gradients(model, tokens), hp.estimate(model, tokens, backward=True)
    plan = hp.plan(model, tokens, memory=int(0.5 * whole), backward=True)
    assert [loops.modules for loops in plan.loops if "" in loops.modules] == [("",)]
    hp.parallelize(model, plan)
    for mine, true in zip(_gradients(model, tokens), truth, strict=True):
        assert float((mine - true).norm()) <= 1e-12 * float(true.norm())
    assert hp.estimate(model, tokens, backward=True) == plan.peak_bytes <= int(0.5 * whole)
    assert _step_peak(model, tokens) <= plan.peak_bytes
    assert _step_peak(model, tokens) == pytest.approx(plan.peak_bytes, rel=2e-3)


def test_other_lengths_of_head_and_loss() -> None:
    model, tokens = _language()
    plan = hp.plan(
        model, tokens, memory=int(0.5 * hp.estimate(model, tokens, backward=True)), backward=True
    )
    shorter = tokens[:, :211]
    truth = _gradients(model, shorter)
    hp.parallelize(model, plan)
    for mine, true in zip(_gradients(model, shorter), truth, strict=True):
        assert float((mine - true).norm()) <= 1e-12 * float(true.norm())
    assert _step_peak(model, shorter) <= plan.peak_bytes


@pytest.mark.slow
def test_dropout_inside_attention_is_drawn_by_position() -> None:
    model, tokens = _language(p=0.2)
    whole = hp.estimate(model, tokens, backward=True)
    found = []
    for ratio in (0.6, 0.45):
        plan = hp.plan(model, tokens, memory=int(ratio * whole), backward=True)
        assert not plan.left
        assert any("layers.0" in loops.modules for loops in plan.loops)
        hp.parallelize(model, plan)
        torch.manual_seed(3)
        found.append(_gradients(model, tokens))
        hp.detach(model)
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(other.norm())


class Masked(nn.Module):
    """Layers that are given a mask by positions, or none: ``x[b, n, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskedLayer() for _ in range(2))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, kept)
        return x.square().mean()


class MaskedLayer(Layer):
    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        if kept is not None:
            scores = scores * kept[..., None, :]
        return super().forward(scores.softmax(-1) @ x)


class Headed(Masked):
    """The same, with a head and a loss that hold most."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 900)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, kept)
        return self.head(x).logsumexp(-1).mean()


@pytest.mark.parametrize("with_head", [False, slow(True)])
def test_a_call_without_an_argument_trains_too(with_head: bool) -> None:
    torch.manual_seed(0)
    model = (Headed() if with_head else Masked()).double().train()
    x, kept = torch.randn(1, 200, 16).double(), (torch.rand(1, 200) > 0.2).double()

    def gradients(*given: Tensor) -> list[Tensor]:
        model.zero_grad()
        model(*given).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    truth, whole = gradients(x), hp.estimate(model, (x, kept), backward=True)
    budget = int((0.6 if with_head else 0.8) * whole)
    hp.parallelize(model, hp.plan(model, (x, kept), memory=budget, backward=True))
    for mine, true in zip(gradients(x), truth, strict=True):
        assert float((mine - true).norm()) <= 1e-12 * float(true.norm())
    model.zero_grad()
    peak = peak_cpu_bytes(lambda: model(x).backward())
    assert peak <= budget if with_head else peak < whole  # see "Limits" in docs/memory.md


class Quantized(nn.Module):
    """An MLP whose hidden values are rounded, and learn as if they were not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        out: Tensor = x + self.down(hidden + (hidden.round() - hidden).detach())
        return out


def test_code_that_stops_gradients_is_left_and_the_rest_is_planned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantized(), Layer(), Quantized(), Layer()).train()
    x = torch.randn(2, 64, 16)
    model(x).square().mean().backward()
    truth = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    whole = hp.estimate(model, x, backward=True)
    plan = hp.plan(model, x, memory=int(0.8 * whole), backward=True)
    assert "Sequential changes its own gradients" in plan.left[""]
    assert [loops.modules for loops in plan.loops] == [("1", "3")]
    hp.parallelize(model, plan)
    model(x).square().mean().backward()
    for parameter, grad in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-4)


def test_a_plan_from_a_file_refuses_code_that_stops_gradients_now(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()).train(), torch.randn(2, 64, 16)
    whole = hp.estimate(model, x, backward=True)
    hp.plan(model, x, memory=int(0.7 * whole), backward=True).save(tmp_path / "plan.toml")
    hp.parallelize(model, hp.Plan.load(tmp_path / "plan.toml"))
    forward = Layer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "forward", lambda self, x: forward(self, x.detach()))
        with pytest.raises(TraceError, match="detach"):
            model(x.requires_grad_())
