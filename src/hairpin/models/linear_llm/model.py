"""A language model with gated linear attention, in the frame of `models.llm`.

Yang et al. (2023), "Gated Linear Attention Transformers with Hardware-Efficient Training": each
head keeps a state of keys x values that forgets each channel of the key by a gate of the input
(Sec. 4.4); keys are half as wide as values. Time and memory grow linearly with the length.

Dims: b batch, s positions, c channels, v vocabulary, h heads, d channels of a head's key, e
channels of a head's value.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.errors import RecipeError
from hairpin.kernels.routed import GatedLinearAttention
from hairpin.models.llm.model import MLP


@dataclass(frozen=True)
class LinearLLMConfig:
    """Sizes of a `LinearLLM`.

    `hidden` is the width of the MLP. The gate of the state is a map of rank `gate_rank` whose
    sigmoid is taken to the power 1 / `gate_temperature`, so that it forgets slowly at first.
    """

    vocabulary: int = 256
    channels: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int = 352
    gate_rank: int = 16
    gate_temperature: float = 16.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.channels % (2 * self.heads):
            raise RecipeError(
                f"channels={self.channels} over heads={self.heads} must give an even number of "
                f"channels per head (keys are half as wide as values); change channels or heads"
            )


def tiny() -> LinearLLMConfig:
    """The smallest model with every part in it, for tests: about 38 thousand parameters."""
    return LinearLLMConfig(channels=32, depth=2, heads=4, hidden=64, gate_rank=4)


def small() -> LinearLLMConfig:
    """A model of bytes that learns on one core in minutes: 0.9 million parameters."""
    return LinearLLMConfig()


class LinearLLM(nn.Module):
    """Predicts each next token from those up to it."""

    def __init__(self, config: LinearLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.head = nn.Linear(config.channels, config.vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights; those that write into the stream start smaller (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                out = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) ** out)

    def forward(
        self, tokens: Int[Tensor, "b s"], positions: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s v"]:
        """The logits of the token after each one.

        `positions` is there so that all language models are called alike: the state is passed on
        from one token to the next, so their order says it all.
        """
        del positions
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Gated linear attention, then an MLP, each behind a norm and added to the stream."""

    def __init__(self, config: LinearLLMConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.mlp = MLP(config.channels, config.hidden)

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Gated linear attention: a decay of the state before it, a norm and a gate behind it."""

    def __init__(self, config: LinearLLMConfig) -> None:
        super().__init__()
        c, half = config.channels, config.channels // 2
        self.heads, self.gate_temperature = config.heads, config.gate_temperature
        self.to_q = nn.Linear(c, half, bias=False)
        self.to_k = nn.Linear(c, half, bias=False)
        self.to_v = nn.Linear(c, c, bias=False)
        self.to_decay = nn.Sequential(
            nn.Linear(c, config.gate_rank, bias=False), nn.Linear(config.gate_rank, half)
        )
        self.attend = GatedLinearAttention()
        self.norm = nn.RMSNorm(c // config.heads, eps=config.norm_eps)
        self.to_gate = nn.Linear(c, c)
        self.to_out = nn.Linear(c, c, bias=False)

    def forward(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b s c"]:
        log_decay = F.logsigmoid(self.to_decay(x)) / self.gate_temperature
        projected = (self.to_q(x), self.to_k(x), self.to_v(x), log_decay)
        q, k, v, log_decay = (self._by_head(y) for y in projected)
        y = self.attend(q / math.sqrt(q.shape[-1]), k, v, log_decay)  # [b, h, s, e]
        y = self.norm(y).transpose(1, 2).flatten(2)
        return self.to_out(F.silu(self.to_gate(x)) * y)  # type: ignore[no-any-return]

    def _by_head(self, x: Float[Tensor, "b s c"]) -> Float[Tensor, "b h s d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]
