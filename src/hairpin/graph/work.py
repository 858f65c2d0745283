"""How much a run computes: operations of matrix products and bytes that kernels touch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hairpin.graph.meter import Meter

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_UNTOUCHED = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"})


class WorkMeter(Meter):
    """A meter that counts work too.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention.
        touched_bytes: of all arguments and results of all kernels but views and new memory.
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
        flops, touched_bytes = kernel_work(func, args, kwargs or {}, out)
        self.flops += flops
        self.touched_bytes += touched_bytes
        return out


def kernel_work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[float, float]:
    """Operations and touched bytes of one call of a kernel, as :class:`WorkMeter` counts them."""
    flops, touched_bytes = 0.0, 0.0
    if func.namespace == "prim":  # questions to fake tensors, such as for their device
        return flops, touched_bytes
    packet = func._overloadpacket
    if packet in flop_registry:
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    elif packet.__name__.startswith(_FORWARD):
        flops = _attention_flops(packet.__name__, args)
    is_view = func.is_view or torch.Tag.inplace_view in func.tags
    if not is_view and packet.__name__ not in _UNTOUCHED:
        leaves = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        touched_bytes = float(sum(x.numel() * x.element_size() for x in leaves))
    return flops, touched_bytes


def _attention_flops(name: str, args: tuple[Any, ...]) -> float:
    """Of torch's fused attention on the CPU, which the registry lacks; ``[b, h, s, d]``."""
    if name == _FORWARD:
        q, k, v = (x.shape for x in args[:3])
        return float(sdpa_flop_count(q, k, v))
    grad, q, k, v = (x.shape for x in args[:4])
    return float(sdpa_backward_flop_count(grad, q, k, v))
