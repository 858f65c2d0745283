"""The Triton kernel behind the port, in Triton's interpreter: blocks merged, hidden keys, biases.

Run as a program it computes the cases and prints what is off.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hairpin.exchange import biased, block, port

TESTS = Path(__file__).parents[1]
B, H, G, Q, K, D = 2, 4, 2, 9, 13, 8
SHAPES = {  # of what is added to the scores [b, h, q, k]
    "a mask": (Q, K),
    "hidden keys of each row": (B, 1, 1, K),
    "a bias of each head": (1, H, Q, K),
    "a bias of all heads": (1, 1, Q, K),
    "a bias of each row and head": (B, H, Q, K),
    "a bias of each key": (1, H, 1, K),
}
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the greatest element

CASES = [(of, torch.float32) for of in SHAPES.items()]
CASES += [
    (("a bias of each head", (1, H, Q, K)), dtype) for dtype in (torch.float16, torch.bfloat16)
]


def scenario(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, float]]:
    """Two blocks of keys, merged; their gradients by the merged state: errors, by name."""
    made = torch.Generator().manual_seed(len(shape))
    q, k, v, grad = (
        torch.randn(s, generator=made).to(dtype)
        for s in ((B, H, Q, D), (B, G, 2 * K, D), (B, G, 2 * K, D), (B, H, Q, D))
    )
    added = torch.randn(*shape[:-1], 2 * K, generator=made)
    added = added.masked_fill(torch.rand(added.shape, generator=made) > 0.7, -torch.inf)
    if shape[-2] == Q:
        added[..., 3, :] = -torch.inf  # a row that sees nothing
        added[..., 5, :K] = -torch.inf  # and one that sees nothing of the first block
    halves = (slice(0, K), slice(K, 2 * K))

    def compute(kernel, q, k, v, grad, added):
        calls = [port.Block(D**-0.5, added=added[..., keys], learns=True) for keys in halves]
        parts = [(q, k[:, :, keys], v[:, :, keys]) for keys in halves]
        states = [
            with_kernel(kernel, block.attend, p, c) for p, c in zip(parts, calls, strict=True)
        ]
        lse = torch.logaddexp(states[0][1], states[1][1])
        weights = [torch.nan_to_num((s[1] - lse).exp()).unsqueeze(-1) for s in states]
        out = sum(w * s[0] for w, s in zip(weights, states, strict=True))
        found = {"out": out, "lse": lse}
        for i, (part, call) in enumerate(zip(parts, calls, strict=True)):
            grads = with_kernel(kernel, block.attend_backward, grad, part, (out, lse), call)
            found |= {f"{n} of block {i}": x for n, x in zip("qkvb", grads, strict=True)}
        return found

    tensors = (q, k, v, grad, added)
    ours = compute(biased, *tensors)
    true = compute(None, *(x.double() for x in tensors))
    errors = []
    for name, want in true.items():
        got = ours[name].double()
        assert got.shape == want.shape, name
        assert torch.equal(got.isfinite(), want.isfinite()), name
        seen = want.isfinite()
        worst = (got - want)[seen].abs().max() / max(1.0, want[seen].abs().max())
        errors.append((name, worst.item()))
    return errors


def with_kernel(kernel, run, *arguments):
    """A call of the port with this back end, or with plain operations."""
    chosen = (block._plain, block._plain_backward)
    if kernel is not None:
        chosen = (kernel.forward, kernel.backward)
    real = block._backend
    block._backend = lambda *_: chosen
    try:
        return run(*arguments)
    finally:
        block._backend = real


def faults() -> list[str]:
    """Lines that say what is off, and by how much; the last says how much was compared."""
    lines, compared = [], 0
    for (title, shape), dtype in CASES:
        for name, error in scenario(shape, dtype):
            compared += 1
            if not error <= DTYPES[dtype]:
                lines.append(f"{title}, {dtype}: {name} is off by {error:.1e}")
    return [*lines, f"{compared} compared"]


@pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: pip install 'hairpin[triton]'"
)
@pytest.mark.slow
def test_blocks_and_their_gradients_are_those_of_plain_operations():
    path = os.pathsep.join((str(TESTS.parent / "src"), str(TESTS)))
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"{len(CASES) * (2 + 2 * 4)} compared"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_cuda_it_is_what_computes(monkeypatch, shape):
    """On tensors without values: operators take the calls as they are made, shapes are right."""
    monkeypatch.setattr(biased, "why_not", lambda *_: None)
    with FakeTensorMode():
        q, k, v = (torch.empty(B, h, n, D, device="cuda") for h, n in ((H, Q), (G, K), (G, K)))
        call = port.Block(D**-0.5, added=torch.empty(shape, device="cuda"), learns=True)
        assert block._backend(q, k, v, call) == (biased.forward, biased.backward)
        state = block.attend((q, k, v), call)
        assert [x.shape for x in state] == [q.shape, q.shape[:3]]
        grads = block.attend_backward(torch.empty_like(q), (q, k, v), state, call)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape, torch.Size(shape)]


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"learns": True}, True),
        ({"added": None}, False),
        ({"causal": True}, False),
        ({"dropout": 0.1}, False),
        ({"scale": 1.0}, False),
    ],
)
def test_what_it_takes(monkeypatch, changes, taken):
    monkeypatch.setattr(biased, "why_not", lambda *_: None)
    q = torch.empty(1, 4, 9, 16)
    call = port.Block(**{"scale": 0.25, "added": torch.zeros(9, 9), **changes})
    assert biased.takes(q, q, call) is taken
    assert not biased.takes(torch.empty(1, 4, 9, 144), q, call)
    monkeypatch.setattr(biased, "why_not", lambda *_: "Triton is not installed")
    assert not biased.takes(q, q, call)


def main():
    import kernel_cases

    kernel_cases.teach_interpreter_bfloat16()
    sys.stdout.write(json.dumps(faults()) + "\n")


if __name__ == "__main__":
    main()
