"""The kernels on a CUDA device, against float64."""

from importlib.util import find_spec

import pytest
import torch

import kernel_cases
from hairpin.kernels.choice import why_not_here
from kernel_cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
]
LARGER = [
    Case("attention", (256, 4, 256, 256, 32), torch.bfloat16, "mb"),
    Case("attention", (3, 8, 1000, 1000, 64), torch.float32, "mb"),
    Case("layer_norm", (256, 256, 128), torch.bfloat16),
    Case("gated_residual", (256, 256, 128), torch.bfloat16, "gxh0r"),
    Case("triangle", (256, 256, 128, 128), torch.bfloat16, "2"),
]


@pytest.mark.parametrize("operation", kernel_cases.CASES)
def test_every_case_of_the_interpreter_holds_on_a_device(operation):
    assert why_not_here() is None
    cases = kernel_cases.CASES[operation]()
    assert [line for case in cases for line in kernel_cases.faults(case, "cuda")] == []


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_sizes_of_a_model_hold_on_a_device(case):
    assert kernel_cases.faults(case, "cuda") == []


def test_attention_holds_no_logits():
    """In the backward too, whose gradient of the bias is one tile at a time."""
    case = Case("attention", (256, 4, 512, 512, 32), torch.bfloat16, "mb")
    tensors = kernel_cases.inputs(case, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = kernel_cases.twin(case, tensors)
    torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out))
    logits_bytes = 256 * 4 * 512 * 512 * 2
    assert torch.cuda.max_memory_allocated() - before < logits_bytes


def test_twice_gives_the_same_bits():
    """No sum depends on the order of threads."""
    case = Case("attention", (64, 4, 256, 256, 32), torch.bfloat16, "mb")
    runs = []
    for _ in range(2):
        tensors = kernel_cases.inputs(case, "cuda")
        out = kernel_cases.twin(case, tensors)
        runs.append(torch.autograd.grad(out.float().square().sum(), [*tensors[:3], tensors[4]]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
