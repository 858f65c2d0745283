"""Linear attention in chunks against its recurrence: plain, in Triton's interpreter, compiled.

Run as a program it computes all cases in Triton's interpreter and prints what went wrong.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from comm.cases import near, uniform
from exchange.recurrence import KINDS, attend, inputs, recurrence
from hairpin.errors import LayoutError
from hairpin.kernels.linear_attention import linear_attention, summarize, why_not_triton

TESTS = Path(__file__).parents[1]
NEEDS_TRITON = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install 'hairpin[triton]'"
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = (1, 2, 7, 63, 64, 65, 130)


def leaves(s, kind, *, b=2, h=2, d=5, e=3, **how):
    """Inputs and an initial state, all leaves."""
    *tensors, decay = inputs((b, h, s, d, e), kind, **how)
    initial = uniform(b, h, d, e, seed=7).to(tensors[0].dtype).requires_grad_()
    return [*tensors, decay, initial]


def gradients(function, tensors):
    """Values of output and state, then gradients of all leaves, of an objective with both."""
    out, state = function(*tensors)
    objective = (uniform(*out.shape, seed=1) * out.double()).sum()
    objective = objective + (uniform(*state.shape, seed=2) * state.double()).sum()
    learning = [x for x in tensors if x is not None and x.requires_grad]
    return [out, state, *torch.autograd.grad(objective, learning)]


def in_chunks(q, k, v, decay, initial):
    return linear_attention(q, k, v, decay, initial=initial)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_recurrence(kind):
    for s in LENGTHS:
        tensors = leaves(s, kind)
        found, wanted = gradients(in_chunks, tensors), gradients(recurrence, tensors)
        assert all(near(a, b) for a, b in zip(found, wanted, strict=True)), s


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, dtype):
    tensors = leaves(130, kind, dtype=dtype)
    precise = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    found, wanted = gradients(in_chunks, tensors), gradients(recurrence, precise)
    state = found.pop(1)
    assert state.dtype == torch.float32
    assert near(state.double(), wanted.pop(1), TOLERANCES[dtype])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert near(a.double(), b, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [1, 5, 70])
def test_both_ways(kind, s):
    q, k, v, decay, _ = leaves(s, kind)
    out, state = linear_attention(q, k, v, decay, causal=False)
    assert near(out, attend(q, k, v, decay, causal=False))
    assert near(state, recurrence(q, k, v, decay)[1])


def test_both_ways_without_decay_is_the_same_as_with_a_decay_of_zero():
    q, k, v, _, _ = leaves(70, "none")
    out = linear_attention(q, k, v, causal=False)[0]
    assert near(out, linear_attention(q, k, v, torch.zeros(2).double(), causal=False)[0])


@pytest.mark.parametrize("kind", ["position", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_decay_may_be_as_strong_as_it_likes(kind, dtype):
    """Minus infinity too: no exponential of a positive number, nothing cancels, nothing is NaN."""
    *tensors, decay, initial = leaves(130, kind, dtype=dtype, strength=30.0)
    decay = decay.detach()
    decay[:, :, ::7] *= 1e4
    decay[:, :, 40] = decay[:, :, 64] = -torch.inf
    tensors = [*tensors, decay.requires_grad_(), initial]
    precise = [x.detach().double().requires_grad_() for x in tensors]
    found, wanted = gradients(in_chunks, tensors), gradients(recurrence, precise)
    for a, b in zip(found, wanted, strict=True):
        assert near(a.double(), b, 1e-12 if dtype == torch.float64 else 5e-6)
    assert not found[5][:, :, 40].any(), "a decay that forgets all has no gradient"


def test_a_decay_of_broadcast_rows_and_heads():
    q, k, v, _, initial = leaves(70, "none")
    for shape in ((1, 1, 70), (2, 1, 70), (1, 2, 70), (1, 1, 70, 5), (1,)):
        decay = -uniform(*shape).abs().requires_grad_()
        whole = decay if decay.dim() == 1 else decay.expand(2, 2, *shape[2:])
        whole = whole.detach().clone() if decay.dim() > 1 else decay.expand(2).detach().clone()
        found = gradients(in_chunks, [q, k, v, decay, initial])
        wanted = gradients(recurrence, [q, k, v, whole.requires_grad_(), initial])
        wanted[5] = wanted[5].sum_to_size(shape)
        assert all(near(a, b) for a, b in zip(found, wanted, strict=True)), shape


@pytest.mark.parametrize("kind", KINDS)
def test_two_segments_are_one_sequence(kind):
    """What a later segment takes from an earlier one, without its keys and values."""
    q, k, v, decay, _ = leaves(150, kind)
    cut = [slice(0, 97), slice(97, 150)]
    decays = [decay if kind in {"none", "head"} else decay[:, :, at] for at in cut]
    one, two = (summarize(k[:, :, c], v[:, :, c], g) for c, g in zip(cut, decays, strict=True))
    wanted, last = linear_attention(q, k, v, decay)
    later = two.attend(q[:, :, cut[1]]) + two.receive(q[:, :, cut[1]], one.state)
    assert near(torch.cat([one.attend(q[:, :, cut[0]]), later], 2), wanted)
    kept = one.state if two.decay is None else two.decay * one.state
    assert near(kept + two.state, last)
    assert kind == "none" or two.decay.shape[-2:] == (5 if kind == "channel" else 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_positions_leave_a_state_as_it_is(kind):
    q, k, v, decay, initial = leaves(0, kind)
    out, state = linear_attention(q, k, v, decay, initial=initial)
    assert out.shape == (2, 2, 0, 3)
    assert torch.equal(state, initial)
    segment = summarize(k, v, decay)
    assert segment.state.requires_grad, "so that a rank without positions takes part in a backward"
    assert not segment.state.any()
    assert segment.decay is None or bool((segment.decay == 1).all())


def test_gradients_of_the_second_order():
    tensors = leaves(9, "channel", b=1, h=1, d=2, e=2)
    assert torch.autograd.gradgradcheck(in_chunks, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_autocast_does_not_make_the_state_half_precise(kind, causal):
    q, k, v, decay, initial = leaves(70, kind, dtype=torch.float32)
    wanted = linear_attention(q, k, v, decay, initial=initial, causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(q, k, v, decay, initial=initial, causal=causal)
        segment = summarize(k, v, decay)
        received = segment.receive(q, segment.state)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(received, segment.receive(q, segment.state))


def test_an_initial_state_of_another_shape_is_refused():
    q, k, v, _, _ = leaves(4, "none")
    with pytest.raises(LayoutError, match=r"initial has shape \(2, 2, 3, 5\); .* \(2, 2, 5, 3\)"):
        linear_attention(q, k, v, initial=torch.zeros(2, 2, 3, 5))


# ---------------------------------------------------------------------------- which way is taken


class Call(torch.nn.Module):
    def forward(self, q, k, v, decay, initial):
        return in_chunks(q, k, v, decay, initial)


def test_on_a_cpu_a_graph_holds_operations_of_torch_only():
    tensors = tuple(x.detach() for x in leaves(70, "channel"))
    graph = torch.export.export(Call(), tensors).graph
    found = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert found
    assert all(name.startswith(("aten.", "<built-in")) for name in found), found


class Seen(TorchDispatchMode):
    """The operations that torch is asked for, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def on_paper(tensors, dtype=torch.float32):
    """Tensors without values on a CUDA device."""
    with FakeTensorMode():
        return [
            x if x is None else torch.empty(x.shape, device="cuda", dtype=dtype) for x in tensors
        ]


@NEEDS_TRITON
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_shapes_alone_go_through_the_custom_operations(kind):
    tensors = on_paper(leaves(70, kind))
    assert why_not_triton(*tensors[:4]) is None
    with tensors[0].fake_mode, Seen() as seen:
        out, state = in_chunks(*tensors)
    assert {"hairpin.linear_attention.default", "hairpin.linear_attention_states.default"} <= (
        seen.names
    )
    assert (out.shape, state.shape) == ((2, 2, 70, 3), (2, 2, 5, 3))


@NEEDS_TRITON
def test_what_the_kernel_cannot_take_goes_by_torch():
    cpu = leaves(7, "none")
    assert why_not_triton(*cpu[:4]) == "a tensor is on cpu"
    double = on_paper(cpu, torch.float64)
    assert why_not_triton(*double[:4]) == "a tensor is torch.float64"
    wide = on_paper(leaves(2, "none", d=160))
    assert why_not_triton(*wide[:4]) == "the heads have 160 and 3 channels"
    q, k, _, _, _ = on_paper(cpu)
    half = on_paper(cpu, torch.float16)[2]
    assert why_not_triton(q, k, half, None) == "queries, keys and values differ in dtype"
    none = on_paper(leaves(0, "none"))
    assert why_not_triton(*none[:4]) == "there are no positions"


# ------------------------------------------------------------------------------------ interpreted


@dataclass(frozen=True)
class Case:
    """``shape`` is b, h, s, d, e."""

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype = torch.float32
    forgets: bool = False


CASES = [
    Case((1, 2, 1, 3, 5), "none"),
    Case((2, 1, 70, 20, 70), "none", torch.float16),
    Case((1, 2, 70, 16, 16), "head", torch.bfloat16),
    Case((2, 2, 70, 8, 20), "position", forgets=True),
    Case((1, 1, 21, 20, 20), "channel", torch.bfloat16),
    Case((1, 1, 70, 8, 16), "channel", forgets=True),
]


def case_inputs(case, device="cpu"):
    """Leaves that lie in memory as a model's do: heads beside channels."""
    tensors = [*inputs(case.shape, case.kind)]
    b, h, _, d, e = case.shape
    tensors.append(uniform(b, h, d, e, seed=7))
    if case.forgets:
        tensors[3].data[:, :, case.shape[2] // 2] = -torch.inf
    found = []
    for x in tensors:
        if x is not None:
            turned = x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x
            x = turned.detach().to(device, case.dtype).requires_grad_()  # noqa: PLW2901
        found.append(x)
    return found


def by_twin(q, k, v, decay, initial):
    """The way models take on CUDA, on any device."""
    module = import_module("hairpin.kernels.linear_attention")
    real, module.why_not_triton = module.why_not_triton, lambda *_: None
    try:
        return module.linear_attention(q, k, v, decay, initial=initial)
    finally:
        module.why_not_triton = real


def faults(case, device="cpu", compute=by_twin):
    """Lines that say which value or gradient is wrong, and by how much."""
    given = case_inputs(case, device)
    precise = [x if x is None else x.detach().double().cpu().requires_grad_() for x in given]
    found, wanted = gradients(compute, given), gradients(recurrence, precise)
    lines = []
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = float((a.detach().double().cpu() - b).abs().max())
        most = TOLERANCES[case.dtype] * max(1.0, float(b.detach().abs().max()))
        if a.shape != b.shape or not error <= most:
            lines.append(f"{case}: number {n} is off by {error:.2g}, more than {most:.2g}")
    return lines


def registration_faults():
    """What `torch.library.opcheck` says of the custom operations: schema, fake, autograd."""
    import_module("hairpin.kernels.cuda.linear_attention")
    q, k, v, decay, initial = case_inputs(Case((1, 2, 5, 4, 3), "channel"))
    before = torch.zeros(1, 2, 1, 4, 3, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    lines = []
    for name, tensors in (
        ("linear_attention_states", (k, v, decay, initial)),
        ("linear_attention", (q, k, v, decay, before)),
    ):
        operator = getattr(torch.ops.hairpin, name).default
        said = torch.library.opcheck(operator, tensors, test_utils=checks, raise_exception=False)
        lines += [f"{name}: {check}: {s}" for check, s in said.items() if s != "SUCCESS"]
    return lines


def main():
    wrong_twin = lambda q, *others: by_twin(1.001 * q, *others)  # noqa: E731
    found = {
        "wrong": [line for case in CASES for line in faults(case)] + registration_faults(),
        "found out": faults(CASES[0], compute=wrong_twin),
    }
    sys.stdout.write(json.dumps(found) + "\n")


@NEEDS_TRITON
def test_the_kernels_in_the_interpreter_give_the_recurrence_and_its_gradients():
    """A process of its own: Triton decides how to run a kernel when the kernel is defined."""
    path = os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["found out"], "the comparison would not see queries scaled wrongly"


@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case((2, 8, 1000, 64, 128), "channel", torch.bfloat16)])
def test_the_kernels_on_a_device(case):
    assert faults(case, "cuda", in_chunks) == []


# --------------------------------------------------------------------------------------- compiled


SHARED_MEMORY_BYTES = 227 * 1024  # what a block may use on sm_90
SIZES = {"D": 128, "WIDTH": 128, "E_WIDTH": 64, "CHUNK": 64, "PRECISION": "tf32"}
STATES = {**SIZES, "INITIAL": True}
KERNELS = [
    pytest.param("states_kernel", {**STATES, "KIND": 1}, marks=pytest.mark.slow),
    ("states_kernel", {**STATES, "KIND": 2}),
    pytest.param("outputs_kernel", {**SIZES, "KIND": 0, "ROWS": 64}, marks=pytest.mark.slow),
    pytest.param("outputs_kernel", {**SIZES, "KIND": 1, "ROWS": 64}, marks=pytest.mark.slow),
    ("outputs_kernel", {**SIZES, "KIND": 2, "ROWS": 16}),
]


@NEEDS_TRITON
@pytest.mark.parametrize(("name", "constants"), KERNELS)
def test_each_kernel_compiles_for_sm_90(name, constants, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(import_module("hairpin.kernels.cuda.linear_attention"), name)
    wide = {"initial", "before", "state", "out"}  # in float32 whatever the inputs
    types = {
        argument: "constexpr"
        if argument in constants
        else "*fp32"
        if argument in wide
        else "*bf16"
        if argument in "qkvg"
        else "i32"
        for argument in signature(kernel.fn).parameters
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert ".target sm_90" in built.asm["ptx"]
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED_MEMORY_BYTES
    assert "mma" in built.asm["ptx"], "products of matrices belong on tensor cores"


if __name__ == "__main__":
    main()
