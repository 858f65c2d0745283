"""Which way a kernel takes: it follows from the tensors, and shapes alone are enough to go it."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cases
from hairpin import kernels
from hairpin.kernels import choice
from kernel_cases import Case

EXAMPLES = [
    Case("attention", (3, 2, 5, 7, 8), parts="mb"),
    Case("layer_norm", (5, 7, 16)),
    Case("gated_residual", (5, 7, 16), parts="gxh0r"),
    Case("triangle", (5, 7, 16, 8), parts="2"),
]
OPERATORS = {"triangle": "gated_projections"}


class Call(torch.nn.Module):
    """A kernel as models call it."""

    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, *tensors):
        operation, arguments = self.case.operation, list(tensors)
        if operation == "triangle":
            layers = kernel_cases.layers_of(arguments)
            return torch.cat(kernels.gated_projections(*arguments[:2], *layers), -1)
        if operation == "attention":
            q, k, v, mask, bias = arguments
            return kernels.attention(q, k, v, mask=mask, bias=bias)
        if operation == "layer_norm":
            return kernels.layer_norm(*arguments)
        names = ("gate", "x_bias", "gate_bias", "kept", "residual")
        return kernels.gated_residual(arguments[0], **dict(zip(names, arguments[1:], strict=True)))


def reason(case, tensors):
    module = import_module(f"hairpin.kernels.{case.operation}")
    if case.operation == "triangle":
        return module.why_not_triton(*tensors[:2], *kernel_cases.layers_of(tensors))
    return module.why_not_triton(*tensors)


def on_paper(case, *, dtype=None):
    """The case's inputs as tensors without values on a CUDA device."""
    with FakeTensorMode():
        return [
            torch.empty_strided(t.shape, t.stride(), device="cuda", dtype=dtype or t.dtype)
            for t in kernel_cases.inputs(case)
            if t is not None
        ]


class Seen(TorchDispatchMode):
    """The operations that torch is asked for, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run_on_paper(case, tensors):
    with tensors[0].fake_mode, Seen() as seen:
        out = Call(case)(*tensors)
    return out, seen.names


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_on_a_cpu_the_values_and_gradients_are_the_formula(case):
    compute = lambda _, tensors: Call(case)(*tensors)  # noqa: E731  # faults hands over the case
    assert kernel_cases.faults(case, compute=compute) == []


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_on_a_cpu_a_graph_holds_operations_of_torch_only(case):
    tensors = tuple(t.detach() for t in kernel_cases.inputs(case))
    assert reason(case, tensors) == "a tensor is on cpu"
    graph = torch.export.export(Call(case), tensors).graph
    found = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert found
    assert all(name.startswith(("aten.", "<built-in")) for name in found), found


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_on_cuda_shapes_alone_go_through_the_custom_operation(case):
    tensors = on_paper(case)
    assert reason(case, tensors) is None
    out, names = run_on_paper(case, tensors)
    assert f"hairpin.{OPERATORS.get(case.operation, case.operation)}.default" in names
    assert out.device.type == "cuda"
    assert out.shape == Call(case)(*kernel_cases.inputs(case)).shape


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_export_on_cuda_holds_the_custom_operation(case):
    tensors = on_paper(case)
    graph = torch.export.export(Call(case), tuple(tensors)).graph
    name = OPERATORS.get(case.operation, case.operation)
    assert f"hairpin.{name}.default" in {str(node.target) for node in graph.nodes}


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_what_the_kernel_cannot_take_goes_by_torch(case, monkeypatch):
    assert reason(case, on_paper(case, dtype=torch.float64)) == "a tensor is torch.float64"
    monkeypatch.setattr(choice, "_triton_is_here", lambda: False)
    assert reason(case, on_paper(case)) == "Triton is not installed"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_mask_that_learns_and_wide_heads_go_by_torch():
    case = EXAMPLES[0]
    q, k, v, mask, bias = on_paper(case)
    assert reason(case, [q, k, v, mask.requires_grad_(), bias]) == "the mask learns"
    wide = on_paper(Case("attention", (1, 1, 2, 2, 160)))
    assert reason(case, [*wide, None, None]) == "the heads have 160 and 160 channels"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_with_no_key_attends_as_if_all_counted(dtype, learns, with_bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 8, dtype=dtype) for _ in range(3))
    mask = torch.ones(3, 4, dtype=dtype)
    mask[1] = 0
    bias = torch.randn(2, 4, 4, dtype=dtype, requires_grad=learns) if with_bias else None
    out = kernels.attention(q, k, v, mask=mask, bias=bias)
    wanted = kernels.attention(q, k, v, mask=torch.ones_like(mask), bias=bias)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert out.isfinite().all()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_a_row_with_no_key_are_right_in_float32(learns, with_bias):
    """torch's fused kernel for the CPU is wrong by the number of keys where all logits are -1e9."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 4, 16, 32) for _ in range(3)]
    mask, cotangent = torch.zeros(2, 16), torch.randn(2, 4, 16, 32)
    bias = torch.randn(4, 16, 16) if with_bias else None

    def gradients(dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
        b = None if bias is None else bias.to(dtype).requires_grad_(learns)
        out = kernels.attention(q, k, v, mask=mask.to(dtype), bias=b)
        return torch.autograd.grad(out, (q, k, v), cotangent.to(dtype))

    for found, wanted in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_of_attention_on_a_cpu_is_the_same(with_bias, with_mask, learns, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, length, 8, dtype=dtype) for length in (6, 7, 7))
    mask = (torch.rand(5, 7) > 0.3).to(dtype) if with_mask else None
    bias = torch.randn(2, 6, 7, dtype=dtype, requires_grad=learns) if with_bias else None
    found = kernels.attention(q, k, v, mask=mask, bias=bias)
    wanted = kernel_cases.attention_formula(q, k, v, mask, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    if with_bias and learns:
        ours, theirs = (torch.autograd.grad(x.square().sum(), bias)[0] for x in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
