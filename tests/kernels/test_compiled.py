"""Every Triton kernel compiled ahead of time for sm_90, which needs no GPU."""

from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install 'hairpin[triton]'"
)

ATTENTION = {
    "D": 32, "WIDTH": 32, "M": 64, "N": 64, "MASK": True, "BIAS": True, "PRECISION": "ieee"
}  # fmt: skip
NORM = {"ROWS": 32, "WIDTH": 128}
GATE = {**NORM, "GATE": True, "X_BIAS": True, "GATE_BIAS": True, "KEPT": True}
TRIANGLE = {"N": 64, "M": 64, "K": 32, "PRECISION": "ieee"}
KERNELS = [
    ("attention", "forward_kernel", ATTENTION),
    ("attention", "query_gradient_kernel", ATTENTION),
    ("attention", "key_gradient_kernel", ATTENTION),
    ("attention", "bias_gradient_kernel", ATTENTION),
    ("layer_norm", "forward_kernel", NORM),
    ("layer_norm", "backward_kernel", NORM),
    ("gated_residual", "forward_kernel", {**GATE, "RESIDUAL": True}),
    ("gated_residual", "backward_kernel", GATE),
    ("triangle", "forward_kernel", TRIANGLE),
    ("triangle", "backward_kernel", TRIANGLE),
]
SUMS = {"peak", "total", "delta", "mean", "sums", "grad_weight"}  # in float32 whatever the inputs
SHARED_MEMORY_BYTES = 227 * 1024  # what a block may use on sm_90


def argument_type(name, kernel, operation, dtype):
    """The type of an argument, from its name: pointers, lengths and strides, factors."""
    if name in {"scale", "eps"} and (operation, kernel) != ("layer_norm", "forward_kernel"):
        return "fp32" if operation == "attention" else "*fp32"
    if name == "eps":
        return "fp32"
    tensors = {
        "q", "k", "v", "x", "z", "out", "grad", "mask", "bias", "weight", "gate", "x_bias",
        "gate_bias", "gate_weight", "kept", "residual",
    }  # fmt: skip
    if (operation, name) == ("triangle", "k"):
        return "i32"
    if name in SUMS or (name, kernel) == ("grad_bias", "bias_gradient_kernel"):
        return "*fp32"
    if (operation, name) in {("layer_norm", "scale"), ("layer_norm", "grad_bias")}:
        return "*fp32"
    if name in tensors or name in {f"grad_{n}" for n in (*"qkvx", "gate", "value", "logit")}:
        return f"*{dtype}"
    return "i32"


def compiled(operation, name, constants, **types):
    """The kernel built for sm_90; `types` are those of arguments that differ."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"hairpin.kernels.cuda.{operation}"), name)
    types = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, argument_type(argument, name, operation, "bf16"))
        for argument in signature(kernel.fn).parameters
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(("operation", "name", "constants"), KERNELS)
def test_each_kernel_compiles_for_sm_90(operation, name, constants, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = compiled(operation, name, constants)
    assert ".target sm_90" in built.asm["ptx"]
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_MEMORY_BYTES
    products = operation in {"attention", "triangle"}
    assert ("mma" in built.asm["ptx"]) == products, "products of matrices belong on tensor cores"


@pytest.mark.parametrize("name", [name for room, name, _ in KERNELS if room == "attention"])
def test_attention_compiles_as_the_blocks_of_a_split_sequence_call_it(name, tmp_path, monkeypatch):
    """What is added to their scores is float32, and hides keys too."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = compiled("attention", name, ATTENTION | {"MASK": False}, bias="*fp32")
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_MEMORY_BYTES


def test_every_kernel_is_in_the_list():
    from hairpin.kernels.cuda.language import triton

    listed = {(operation, name) for operation, name, _ in KERNELS}
    for operation in ("attention", "layer_norm", "gated_residual", "triangle"):
        module = import_module(f"hairpin.kernels.cuda.{operation}")
        for name, thing in vars(module).items():
            if isinstance(thing, triton.runtime.JITFunction) and not name.startswith("_"):
                assert (operation, name) in listed
