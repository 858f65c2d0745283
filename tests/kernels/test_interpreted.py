"""The Triton kernels in Triton's interpreter, on the CPU: values and gradients against float64."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import kernel_cases

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install 'hairpin[triton]'"
)


def interpreted(operation, code="import kernel_cases; kernel_cases.main()"):
    """A process of its own: Triton decides how to run a kernel when the kernel is defined."""
    path = os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))
    done = subprocess.run(
        [sys.executable, "-c", code, operation],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("operation", kernel_cases.CASES)
def test_each_kernel_gives_the_formula_and_its_gradients(operation):
    found = interpreted(operation)
    assert found["cases"] == len(list(kernel_cases.CASES[operation]()))
    assert found["wrong"] == []


@pytest.mark.slow
def test_a_wrong_kernel_is_found_out():
    """The comparison itself: a twin that scales its queries wrongly."""
    code = """
import json
import kernel_cases
case = kernel_cases.Case("attention", (2, 1, 7, 7, 8), parts="mb")
real = kernel_cases.twin
wrong = lambda case, tensors: real(case, [1.001 * tensors[0], *tensors[1:]])
print(json.dumps([kernel_cases.faults(case), kernel_cases.faults(case, compute=wrong)]))
"""
    right, wrong = interpreted("attention", code)
    assert right == []
    assert any("value" in line for line in wrong)
