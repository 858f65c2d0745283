"""Compiled code stops at a transfer and goes on after it, with the same values and gradients."""

import pytest
import torch

import hairpin as hp
from comm.cases import line, near, part_of, places, uniform
from hairpin.layout import Layout
from hairpin.run.launch import launch


def compiled(backend: str) -> int:
    mesh = line(timeout_s=60)
    at = places(mesh)
    src, dst = Layout("t/sp s", t=5, s=6), Layout("t s/sp", t=5, s=6)
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def block(x):
        x = (x * 1.5).tanh()
        y = hp.switch(x, src, dst, mesh)
        y = y.cumsum(0) * y
        return hp.switch(y, dst, src, mesh, wait=False).wait() + x

    whole = uniform(5, 6).requires_grad_()
    inner = (whole * 1.5).tanh()
    truth = inner.cumsum(0) * inner + inner
    (truth**2).sum().backward()

    run = torch.compile(block, backend=count)
    for _ in range(2):  # once compiling, once compiled
        x = part_of(whole.detach(), src, at).clone().requires_grad_()
        y = run(x)
        assert near(y, part_of(truth, src, at))
        (y**2).sum().backward()
        assert near(x.grad, part_of(whole.grad, src, at))
    return len(traced)


# torch's own, wherever it stops compiling with a tensor at hand that is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_with_transfers_inside(backend):
    graphs = launch(compiled, 2, backend, timeout_s=100)
    assert min(graphs) >= 2  # the work around the transfers was compiled
