"""Floor 1: operations that a model spends its time in, each the fastest exact way there is.

A function here computes one formula. On a CPU it is plain operations of torch, so that loops and
splits see through it; on CUDA it is a kernel in Triton where that can be used (`choice.why_not`).
Which of them runs follows from the tensors, never from an argument.
"""

from hairpin.kernels.attention import attention
from hairpin.kernels.gated_residual import gated_residual
from hairpin.kernels.layer_norm import layer_norm
from hairpin.kernels.triangle import GatedLinear, gated_projections

__all__ = ["GatedLinear", "attention", "gated_projections", "gated_residual", "layer_norm"]
