"""Attention as a module without parameters, so that a plan can compute it in another way.

A model that calls one of these says only *what* is attended. On one rank it runs as written here;
a plan that splits the sequence replaces the forward of the modules of one model.

Dims: b batch, h heads, g key/value heads (h is a multiple of g), q queries, k keys, s positions,
d channels of a head's query and key, e channels of a head's value.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.kernels.linear_attention import linear_attention


class SoftmaxAttention(nn.Module):
    """Softmax attention (Vaswani et al. 2017), grouped where there are fewer keys than queries.

    Args:
        causal: a position sees itself and those before it; else every position sees all.
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        v: Float[Tensor, "b g k e"],
    ) -> Float[Tensor, "b h q e"]:
        """The values, weighted by softmax(q k / sqrt(d)); group i of heads shares key head i."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"causal={self.causal}"


class GatedLinearAttention(nn.Module):
    """Causal linear attention whose state forgets by a gate (GLA; Yang et al. 2023, Sec. 4).

    `S_t = diag(exp(log_decay_t)) S_(t-1) + k_t^T v_t` and `out_t = q_t S_t`, from `S_0 = 0`. The
    queries are taken as they are: a scale is the caller's.
    """

    def forward(
        self,
        q: Float[Tensor, "b h s d"],
        k: Float[Tensor, "b h s d"],
        v: Float[Tensor, "b h s e"],
        log_decay: Float[Tensor, "b h s d"],
    ) -> Float[Tensor, "b h s e"]:
        """The outputs in the order of the positions; `log_decay` is 0 or less."""
        return linear_attention(q, k, v, log_decay)[0]
