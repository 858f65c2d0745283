"""The Triton kernels against plain formulas in float64: values and every gradient.

Run as a program it computes all cases of one operation in Triton's interpreter and prints what went
wrong: ``TRITON_INTERPRET=1 python kernel_cases.py attention``.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from importlib import import_module

import torch

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TOLERANCES = {FLOAT: 1e-5, HALF: 4e-3, BRAIN: 3e-2}  # of the greatest element


@dataclass(frozen=True)
class Case:
    """One call: the twin of ``operation`` on inputs of these shapes."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype = FLOAT
    parts: str = ""  # which optional arguments are given
    turned: bool = False  # tensors lie in memory with two dims swapped

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        turned = "-turned" if self.turned else ""
        return f"{self.operation}-{shape}-{str(self.dtype)[6:]}-{self.parts}{turned}"


def attention_cases():
    """``shape`` is b, h, q, k, d."""
    every = ("", "m", "b", "mb")
    for n, parts in itertools.product((1, 7, 33), every):
        yield Case("attention", (3, 2, n, n, 8), FLOAT, parts)
    for d, dtype in itertools.product((8, 20, 32, 64), (FLOAT, HALF, BRAIN)):
        yield Case("attention", (2, 2, 7, 33, d), dtype, "mb")
    for dtype in (HALF, BRAIN):
        yield Case("attention", (2, 1, 33, 33, 16), dtype, "b")
        yield Case("attention", (2, 1, 33, 33, 16), dtype, "m")
    yield Case("attention", (2, 1, 70, 130, 16), FLOAT, "mb")  # several blocks of either
    yield Case("attention", (2, 1, 130, 70, 16), FLOAT, "mb", turned=True)
    yield Case("attention", (2, 4, 0, 5, 8), FLOAT, "mb")


def layer_norm_cases():
    """``shape`` ends in the channels."""
    for n, dtype in itertools.product((1, 7, 33), (FLOAT, HALF, BRAIN)):
        yield Case("layer_norm", (n, 3, 33), dtype)
    yield Case("layer_norm", (33, 7, 128), FLOAT)
    yield Case("layer_norm", (7, 33, 24), FLOAT, turned=True)
    yield Case("layer_norm", (2, 3, 1), FLOAT)
    yield Case("layer_norm", (0, 3, 8), FLOAT)
    yield Case("layer_norm", (9, 300, 64), FLOAT)  # several tiles to a program


def gated_residual_cases():
    """Parts: gate, its bias (h), bias of x, kept along rows or columns, residual."""
    for parts in ("g", "gh", "gxh", "r0", "1", "gx0r", "gxh1r", "ghxer", "x1r"):
        yield Case("gated_residual", (7, 5, 33), FLOAT, parts)
    for n, dtype in itertools.product((1, 7, 33), (FLOAT, HALF, BRAIN)):
        yield Case("gated_residual", (n, 7, 16), dtype, "gxh0r")
    yield Case("gated_residual", (7, 33, 16), FLOAT, "gxh1r", turned=True)
    yield Case("gated_residual", (0, 33, 16), FLOAT, "gxh1r")
    yield Case("gated_residual", (60, 80, 64), FLOAT, "gxh1r")


def triangle_cases():
    """``shape`` is i, j, channels in, channels out; parts: how many layers."""
    for n, dtype in itertools.product((1, 7, 33), (FLOAT, HALF, BRAIN)):
        yield Case("triangle", (n, n, 16, 8), dtype, "2")
    yield Case("triangle", (7, 9, 33, 33), FLOAT, "1")
    yield Case("triangle", (9, 9, 128, 70), FLOAT, "2", turned=True)
    yield Case("triangle", (0, 7, 16, 8), FLOAT, "2")


CASES = {
    "attention": attention_cases,
    "layer_norm": layer_norm_cases,
    "gated_residual": gated_residual_cases,
    "triangle": triangle_cases,
}


# ------------------------------------------------------------------------------ plain formulas


def attention_formula(q, k, v, mask, bias):
    """A row without keys attends as if all counted."""
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        counts = (mask != 0) | ~(mask != 0).any(-1, keepdim=True)
        logits = logits.masked_fill(~counts[:, None, None], float("-inf"))
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


def layer_norm_formula(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gated_residual_formula(x, gate, x_bias, gate_bias, kept, residual):
    y = x if x_bias is None else x + x_bias
    if gate is not None:
        y = y / (1 + torch.exp(-(gate if gate_bias is None else gate + gate_bias)))
    y = y if kept is None else y * kept
    return y if residual is None else residual + y


def triangle_formula(z, mask, *layers):
    outs = []
    for weight, bias, gate_weight, gate_bias in layers:
        gate = torch.sigmoid(torch.einsum("ijk,ck->ijc", z, gate_weight) + gate_bias)
        value = torch.einsum("ijk,ck->ijc", z, weight) + bias
        outs.append(gate * value * mask[..., None])
    return torch.cat(outs, -1)


FORMULAS = {
    "attention": attention_formula,
    "layer_norm": layer_norm_formula,
    "gated_residual": gated_residual_formula,
    "triangle": triangle_formula,
}


# --------------------------------------------------------------------------------------- inputs


def inputs(case, device="cpu"):
    """Leaves, in the order of the formula's arguments; None for what is left out."""
    generator = torch.Generator().manual_seed(sum(case.shape) + len(case.parts))

    def random(*shape, factor=1.0):
        x = factor * torch.randn(*shape, generator=generator)
        if case.turned and len(shape) > 2:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return x.to(device, case.dtype).requires_grad_()

    def coin(*shape):
        return (torch.rand(*shape, generator=generator) > 0.3).to(device, case.dtype)

    return globals()[f"{case.operation}_inputs"](case, random, coin)


def attention_inputs(case, random, coin):
    b, h, q, k, d = case.shape
    mask = coin(b, k) if "m" in case.parts else None
    if mask is not None:
        mask[-1] = 0
    bias = random(h, q, k) if "b" in case.parts else None
    return [random(b, h, q, d), random(b, h, k, d), random(b, h, k, d), mask, bias]


def layer_norm_inputs(case, random, coin):
    c = case.shape[-1]
    return [random(*case.shape), random(c), random(c)]


def gated_residual_inputs(case, random, coin):
    a, b, c = case.shape
    kept = {"0": (1, b, c), "1": (a, 1, c), "e": (a, b, c)}
    shape = next((kept[part] for part in case.parts if part in kept), None)
    return [
        random(a, b, c),
        random(a, b, c) if "g" in case.parts else None,
        random(c) if "x" in case.parts else None,
        random(c) if "h" in case.parts else None,
        None if shape is None else coin(*shape) / 0.7,
        random(a, b, c) if "r" in case.parts else None,
    ]


def triangle_inputs(case, random, coin):
    i, j, k, c = case.shape
    layers = []
    for _ in range(int(case.parts)):
        layers += [random(c, k, factor=k**-0.5), random(c), random(c, k, factor=k**-0.5), random(c)]
    return [random(i, j, k), coin(i, j), *layers]


# -------------------------------------------------------------------------------------- running


def twin(case, tensors):
    """What the Triton kernel makes of them, by the way models take on CUDA."""
    module = import_module(f"hairpin.kernels.{case.operation}")
    if case.operation == "layer_norm":
        return module._on_cuda(*tensors, 1e-5)
    if case.operation == "triangle":
        return torch.cat(module._on_cuda(*tensors[:2], layers_of(tensors)), -1)
    return module._on_cuda(*tensors)


def layers_of(tensors):
    from hairpin.kernels import GatedLinear

    return tuple(GatedLinear(*tensors[n : n + 4]) for n in range(2, len(tensors), 4))


def formula(case, tensors):
    plain = FORMULAS[case.operation]
    return (
        plain(*tensors[:2], *layers_of(tensors))
        if case.operation == "triangle"
        else plain(*tensors)
    )


def faults(case, device="cpu", compute=twin):
    """Lines that say which value or gradient is wrong, and by how much."""
    given = inputs(case, device)
    precise = [None if t is None else t.detach().double().cpu() for t in given]
    for ours, theirs in zip(given, precise, strict=True):
        if theirs is not None:
            theirs.requires_grad_(ours.requires_grad)
    out, wanted = compute(case, given), formula(case, precise)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(case.dtype)
    learning = [n for n, t in enumerate(given) if t is not None and t.requires_grad]
    ours = torch.autograd.grad(out, [given[n] for n in learning], grad.to(out.device))
    theirs = torch.autograd.grad(wanted, [precise[n] for n in learning], grad.double())
    names = ["value", *(f"gradient {n}" for n in learning)]
    pairs = zip(names, (out.detach(), *ours), (wanted.detach(), *theirs), strict=True)
    lines = (_compare(name, a, b, case.dtype) for name, a, b in pairs)
    return [f"{case}: {line}" for line in lines if line]


def _compare(name, ours, theirs, dtype):
    if ours.shape != theirs.shape or ours.dtype != dtype:
        return f"{name} is {ours.dtype} {list(ours.shape)}, not {dtype} {list(theirs.shape)}"
    if not theirs.numel():
        return None
    error = (ours.double().cpu() - theirs).abs().max().item()
    most = TOLERANCES[dtype] * max(1.0, theirs.abs().max().item())
    return None if error <= most else f"{name} is off by {error:.2g}, more than {most:.2g}"


def registration_faults(operation):
    """What `torch.library.opcheck` says of the custom operation: schema, fake, autograd."""
    case = {
        "attention": Case("attention", (2, 2, 3, 5, 8), FLOAT, "mb"),
        "layer_norm": Case("layer_norm", (6, 8)),
        "gated_residual": Case("gated_residual", (3, 4, 8), FLOAT, "gxher"),
        "triangle": Case("triangle", (3, 3, 8, 8), FLOAT, "1"),
    }[operation]
    tensors = inputs(case)
    if operation == "layer_norm":
        tensors.append(1e-5)
    if operation == "triangle":
        tensors[:2] = tensors[0].detach().flatten(0, 1).requires_grad_(), tensors[1].flatten()
    name = "gated_projections" if operation == "triangle" else operation
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    import_module(f"hairpin.kernels.cuda.{operation}")
    operator = getattr(torch.ops.hairpin, name).default
    found = torch.library.opcheck(
        operator, tuple(tensors), test_utils=checks, raise_exception=False
    )
    return [f"{name}: {check}: {said}" for check, said in found.items() if said != "SUCCESS"]


def teach_interpreter_bfloat16():
    """Triton's interpreter multiplies the bits of bfloat16 as whole numbers; give it values."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    real = InterpreterBuilder.create_dot

    def values(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return real(self, values(a), values(b), *others)

    InterpreterBuilder.create_dot = create_dot


def main():
    operation = sys.argv[1]
    teach_interpreter_bfloat16()
    cases = list(CASES[operation]())
    wrong = [line for case in cases for line in faults(case)]
    wrong += registration_faults(operation)
    sys.stdout.write(json.dumps({"cases": len(cases), "wrong": wrong}) + "\n")


if __name__ == "__main__":
    main()
