"""What the tests of this floor share: attention written out, and ranks checked against it."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.exchange.api import attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit

WIDE = torch.float64


def line(timeout_s: float = 30) -> Mesh:
    """All ranks along one axis ``sp``."""
    return init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=timeout_s)


@dataclass(frozen=True)
class Problem:
    """One attention: sizes, mask, what is beside q, k and v."""

    length: int
    heads: int = 4
    groups: int = 4
    d: int = 5
    batch: int = 2
    mask: Mask = field(default_factory=Mask)
    keys: int | None = None
    bias: tuple[int, int] | None = None  # its batch and heads
    hidden: bool = False
    dtype: torch.dtype = WIDE
    spread: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Operands and the output's cotangent, whole, the same on every rank."""
        made = torch.Generator().manual_seed(self.length * 31 + self.heads)
        keys = self.length if self.keys is None else self.keys

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, dtype=WIDE).to(self.dtype)

        found = {
            "q": draw(self.batch, self.heads, self.length, self.d) * self.spread,
            "k": draw(self.batch, self.groups, keys, self.d) * self.spread,
            "v": draw(self.batch, self.groups, keys, self.d),
            "grad": draw(self.batch, self.heads, self.length, self.d),
        }
        if self.bias is not None:
            found["bias"] = draw(*self.bias, self.length, keys)
        if self.hidden:
            seen = torch.rand(self.batch, keys, generator=made) > 0.4
            seen[0] = False  # a row that sees nothing at all
            found["key_mask"] = seen
        return found


def seen_by(mask: Mask, length: int, keys: int) -> Tensor:
    """``[q, k]``: which keys count, from the words of the mask's definition."""
    q, k = torch.arange(length)[:, None], torch.arange(keys)
    seen = torch.ones(length, keys, dtype=torch.bool)
    if mask.causal:
        seen &= k <= q
    if mask.window is not None:
        seen &= (q - k).abs() < mask.window
    if mask.documents is not None:
        of = torch.repeat_interleave(torch.tensor(mask.documents))
        seen &= of[:, None] == of
    if mask.blocks is not None:
        size, table = mask.blocks.block_size, mask.blocks.table
        whole = table.repeat_interleave(size, 0).repeat_interleave(size, 1)
        seen &= whole[:length, :keys]
    if mask.prefix:
        seen |= k < mask.prefix
    return seen


def truth(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64 on one process, scores written out."""
    whole = {n: x.to(WIDE) if x.is_floating_point() else x for n, x in problem.tensors().items()}
    learn = [n for n in ("q", "k", "v", "bias") if n in whole]
    for name in learn:
        whole[name].requires_grad_()
    share = problem.heads // problem.groups
    k, v = (whole[n].repeat_interleave(share, 1) for n in ("k", "v"))
    scores = whole["q"] @ k.transpose(-1, -2) / math.sqrt(problem.d)
    if "bias" in whole:
        scores = scores + whole["bias"]
    seen = seen_by(problem.mask, problem.length, k.shape[2])
    if "key_mask" in whole:
        seen = seen & whole["key_mask"][:, None, None, :]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
    out = weights @ v
    grads = torch.autograd.grad(out, [whole[n] for n in learn], whole["grad"])
    return {"out": out.detach(), **dict(zip(learn, grads, strict=True))}


def checked(problem: Problem, split: SequenceSplit, keys: Order | None = None) -> dict[str, Any]:
    """This rank's output and gradients, and its parts of the truth."""
    whole, want = problem.tensors(), truth(problem)
    held = split.positions
    if keys is None:
        held_keys = held
    else:
        ring, heads = split.place(split.rank)
        held_keys = keys.positions(split.ring, ring).tensor_split(split.heads)[heads]
    part = {name: whole[name][:, :, held].clone() for name in ("q", "grad")}
    part |= {name: whole[name][:, :, held_keys].clone() for name in ("k", "v")}
    if "bias" in whole:
        part["bias"] = whole["bias"][:, :, held].clone()
    learn = [n for n in ("q", "k", "v", "bias") if n in part]
    for name in learn:
        part[name].requires_grad_()
    key_mask = whole["key_mask"][:, held_keys] if "key_mask" in whole else None
    out = attention(
        *(part[n] for n in ("q", "k", "v")),
        split,
        mask=problem.mask,
        keys=keys,
        bias=part.get("bias"),
        key_mask=key_mask,
    )
    grads = torch.autograd.grad(out, [part[n] for n in learn], part["grad"])
    got = {"out": out.detach(), **dict(zip(learn, grads, strict=True))}
    wanted = {"out": want["out"][:, :, held]}
    wanted |= {n: want[n][:, :, held if n in ("q", "bias") else held_keys] for n in learn}
    return {
        "got": got,
        "want": wanted,
        "scale": {n: float(x.abs().max()) for n, x in want.items() if x.numel()},
    }


def worst(result: dict[str, Any]) -> tuple[float, str]:
    """The largest error, relative to the largest value of its tensor, and the tensor's name."""
    errors = [(0.0, "nothing")]
    for name, got in result["got"].items():
        want = result["want"][name]
        assert got.shape == want.shape, name
        if want.numel():
            error = float((got.to(WIDE) - want).abs().max()) / max(result["scale"][name], 1e-300)
            errors.append((math.inf if math.isnan(error) else error, name))
    return max(errors)
