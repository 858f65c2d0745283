"""Split stacks beside data parallelism: gradients equal one process that sees every example.

The objective is the mean over all ranks of each rank's loss; ranks that split a stack see the same
example, the others another one.
"""

import pytest
import torch
from torch.distributed.tensor import DTensor

import hairpin as hp
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.run.launch import launch
from marks import slow
from planning.test_data_parallel import ddp, fsdp, fsdp_over_dp, plain
from planning.truth import loss_of, randomised, require_close, seeded

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")

S, R = 5, 7
LINE = {"axis": "sp"}
GRID = {"axis": ("rows", "columns")}


def build():
    return randomised(EvoformerStack(presets.tiny().evoformer, 2), 0.3).eval()


def example(number):
    config = presets.tiny()
    m, z = seeded((S, R, config.c_m), 2 * number), seeded((R, R, config.c_z), 2 * number + 1)
    return m, z, torch.ones(S, R).double(), torch.ones(R, R).double()


def loss(outputs):
    return sum(map(loss_of, outputs))


def truth():
    model = build()
    (sum(loss(model(*example(n))) for n in range(2)) / 2).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def wanted():
    return launch(truth, 1)[0]


def step(wrap, degrees, words, wanted):
    mesh = hp.init_mesh(**degrees, timeout_s=30)
    model = build()
    hp.parallelize(model, hp.plan_axial(mesh, **words), mesh)
    runner, sync = wrap(model, mesh)
    loss(runner(*example(mesh.rank("dp")))).backward()
    sync()
    floor = 1e-3 * max(float(g.norm()) for g in wanted.values())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.detach()
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        require_close(grad, wanted[name], f"gradient of {name}", floor)


@pytest.mark.parametrize("wrap", [plain, ddp, fsdp, fsdp_over_dp])
@pytest.mark.parametrize(
    "words",
    [
        {**LINE, "product": "ring", "passing": "ring"},
        slow({**LINE, "product": "channels", "pieces": 2, "chunks": 2}),
        slow(LINE),
    ],
)
def test_beside_a_line(wanted, wrap, words):
    launch(step, 4, wrap, {"dp": 2, "sp": 2}, words, wanted, timeout_s=60)


@pytest.mark.parametrize(("wrap"), [ddp, slow(plain), fsdp, slow(fsdp_over_dp)])
def test_beside_a_grid(wanted, wrap):
    degrees = {"dp": 2, "rows": 2, "columns": 1}
    launch(step, 4, wrap, degrees, {**GRID, "passing": "ring"}, wanted, timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [plain, ddp, fsdp, fsdp_over_dp])
def test_beside_a_grid_of_four(wanted, wrap):
    degrees = {"dp": 2, "rows": 2, "columns": 2}
    launch(step, 8, wrap, degrees, GRID, wanted, timeout_s=120)
