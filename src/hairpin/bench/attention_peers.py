"""Other libraries' attention along a split sequence, as they are, on a CPU.

- ``ring-flash-attention``: Zhu's ring and zigzag. It needs flash-attn, which needs CUDA; here its
  two entry points call torch's fused kernel of the CPU.
- ``torch ring, all-gather`` and ``torch ring, all-to-all``: torch's private templated ring with
  either way of passing keys; it balances causal work by the same zigzag.
- ``yunchang ulysses``: its all-to-all of heads, with the same kernel in flash-attn's place.

What is not installed, or cannot run, is reported with its reason. Dims: b, s, h, d as everywhere.
"""

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hairpin.errors import MissingExtraError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Peer:
    """A library's attention, ready to be called by every rank of the world.

    Attributes:
        attend: takes this rank's q, k and v, gives its output; differentiable.
        order: how it wants positions dealt.
        heads_first: whether tensors are ``[b, h, s, d]`` or else ``[b, s, h, d]``.
    """

    attend: Attend
    order: Literal["contiguous", "zigzag"]
    heads_first: bool


def ring_flash_attention(*, causal: bool) -> Peer:
    """Zhu's ring, or zigzag where causal.

    Raises:
        MissingExtraError: it is not installed.
    """
    name = "zigzag_ring_flash_attn" if causal else "ring_flash_attn"
    _require("ring_flash_attn", "ring-flash-attn")
    with _flash_attn(), _bare_package("ring_flash_attn"):
        module = importlib.import_module(f"ring_flash_attn.{name}")
    function: Any = getattr(module, f"{name}_func")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q, k, v, causal=causal, group=dist.group.WORLD)
        return out

    return Peer(attend, "zigzag" if causal else "contiguous", heads_first=False)


def yunchang_ulysses(*, causal: bool) -> Peer:
    """Yunchang's Ulysses.

    Raises:
        MissingExtraError: it is not installed.
    """
    _require("yunchang", "yunchang")
    with _flash_attn(), redirect_stdout(io.StringIO()):
        ulysses = importlib.import_module("yunchang.ulysses")
        kernels = importlib.import_module("yunchang.kernels")
    layer = ulysses.UlyssesAttention(dist.group.WORLD, attn_type=kernels.AttnType.FA)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = layer(q, k, v, causal=causal)
        return out

    return Peer(attend, "contiguous", heads_first=False)


def torch_ring(rotate: Literal["ALL_GATHER", "ALL_TO_ALL"], *, causal: bool) -> Peer:
    """torch's private ring, which ``context_parallel`` uses on CUDA.

    Raises:
        MissingExtraError: this torch has it elsewhere.
    """
    home = "torch.distributed.tensor.experimental._context_parallel._attention"
    try:
        module: Any = importlib.import_module(home)
        options, methods = module._cp_options, module._RotateMethod
        forward, backward = (
            module._templated_ring_attention,
            module._templated_ring_attention_backward,
        )
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(f"this torch has no {home} as known here: {error}") from error

    def set_options() -> None:  # the library's own switches are global
        options.enable_load_balance = causal
        options.rotate_method = methods[rotate]

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            set_options()
            out, lse = forward(dist.group.WORLD, 2, _torch_op, q, k, v, is_causal=causal)[:2]
            ctx.save_for_backward(q, k, v, out, lse)
            result: Tensor = out
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            set_options()
            q, k, v, out, lse = ctx.saved_tensors
            operands = (_torch_backward_op, grads[0], "grad_out", q, k, v, out, lse)
            return tuple(backward(dist.group.WORLD, 2, *operands, is_causal=causal)[:3])

    return Peer(Ring.apply, "zigzag" if causal else "contiguous", heads_first=True)


def _torch_gather(*, causal: bool) -> Peer:
    return torch_ring("ALL_GATHER", causal=causal)


def _torch_rotate(*, causal: bool) -> Peer:
    return torch_ring("ALL_TO_ALL", causal=causal)


PEERS: Mapping[str, Callable[..., Peer]] = {
    "ring-flash-attention": ring_flash_attention,
    "torch ring, all-gather": _torch_gather,
    "torch ring, all-to-all": _torch_rotate,
    "yunchang ulysses": yunchang_ulysses,
}


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"not installed: pip install --no-deps {package}")


# ------------------------------------------------------- torch's kernel under the others' names


def _torch_op(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _FLASH(q, k, v, 0.0, is_causal)
    return out, lse


def _torch_backward_op(
    *,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _FLASH_BACKWARD(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)
    return grads[0], grads[1], grads[2]


def _flash_attn_forward(  # noqa: PLR0917  # flash-attn's own signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,  # noqa: FBT001
    window_size: tuple[int, int],
    alibi_slopes: None,
    return_softmax: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, None, None]:
    """flash-attn's ``[b, s, h, d]`` entry point."""
    del window_size, alibi_slopes, return_softmax
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _FLASH(*heads_first, dropout_p, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(  # noqa: PLR0917
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,  # noqa: FBT001
    window_size: tuple[int, int],
    alibi_slopes: None,
    deterministic: bool,  # noqa: FBT001
) -> None:
    """flash-attn's backward, which fills dq, dk and dv."""
    del window_size, alibi_slopes, deterministic
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    operands = (dout, q, k, v, out, softmax_lse, dropout_p, causal)
    grads = _FLASH_BACKWARD(*operands, scale=softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad.transpose(1, 2))


def _flash_attn_func(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002
    **_: Any,
) -> Tensor:
    """flash-attn's differentiable function."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=dropout_p,
        is_causal=causal,
        scale=softmax_scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


class _FlashAttn(ModuleType):
    """Stands for flash-attn while another library is imported; what it lacks cannot be called."""

    __version__ = "2.8.0"
    _flash_attn_forward = staticmethod(_flash_attn_forward)
    _flash_attn_backward = staticmethod(_flash_attn_backward)
    flash_attn_func = staticmethod(_flash_attn_func)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> None:
            raise MissingExtraError(f"flash-attn's {name} has no counterpart on a CPU here")

        return absent


@contextmanager
def _flash_attn() -> Iterator[None]:
    """Imports of flash-attn give torch's kernel; afterwards it is absent, or itself, again."""
    names = ("flash_attn", "flash_attn.flash_attn_interface")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update({name: _FlashAttn(name) for name in names})
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@contextmanager
def _bare_package(name: str) -> Iterator[None]:
    """Import modules of a package without its front page, which wants more than they do."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    before = sys.modules.get(name)
    sys.modules[name] = package
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
