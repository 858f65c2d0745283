"""Whether a Triton kernel can take these tensors, and why not."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability: the first with bfloat16


def why_not(*tensors: Tensor | None) -> str | None:
    """Why torch's own operations compute on these; None where the Triton kernels do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}"
    return why_not_here()


def why_not_here() -> str | None:
    """Why no Triton kernel can run on this machine; None where they can."""
    if torch.version.hip is not None:
        return "this build of torch is for AMD, where the kernels were never tested"
    if not _triton_is_here():
        return "Triton is not installed"
    return _why_not_on_device()


@cache
def _triton_is_here() -> bool:
    return find_spec("triton") is not None


@cache
def _why_not_on_device() -> str | None:
    if not torch.cuda.is_available():
        return None  # shapes without values may be said to be on a device that is not there
    found = torch.cuda.get_device_capability()
    if found >= _OLDEST:
        return None
    return f"the device has compute capability {found[0]}.{found[1]}, the kernels need 8.0"


def autocasts() -> bool:
    """Whether torch picks the dtypes of operations on CUDA here."""
    return torch.is_autocast_enabled("cuda")


def learns(tensor: Tensor | None) -> bool:
    """Whether a gradient of the tensor may be asked for."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
