"""How much a run computes: operations of matrix products and bytes that kernels touch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hairpin.graph.meter import Meter

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


class WorkMeter(Meter):
    """A meter that counts work too.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention.
        touched_bytes: of all arguments and results of all kernels but views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.touched_bytes = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet.__name__.startswith(_FORWARD):
            self.flops += _attention_flops(packet.__name__, args)
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            leaves = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.touched_bytes += sum(x.numel() * x.element_size() for x in leaves)
        return out


def _attention_flops(name: str, args: tuple[Any, ...]) -> float:
    """Of torch's fused attention on the CPU, which the registry lacks; ``[b, h, s, d]``."""
    if name == _FORWARD:
        q, k, v = (x.shape for x in args[:3])
        return float(sdpa_flop_count(q, k, v))
    grad, q, k, v = (x.shape for x in args[:4])
    return float(sdpa_backward_flop_count(grad, q, k, v))
