"""A mesh of dp x sp: gradients and a step of SGD equal one process that sees the whole batch.

The objective is the mean over all ranks of each rank's loss. Ranks along sp see the same clips,
ranks along dp other ones; so the truth is the mean of the losses of the two halves of the batch.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hairpin as hp
from hairpin.run.launch import launch
from planning.toys import ATTENDS, Video
from planning.truth import loss_of, randomised, require_close, seeded

# FSDP2 warns of in-place changes of an output that is a view; nobody changes it here.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
RATE = 0.05
CLIPS = (4, 7, 5, 2)  # b t s v


def build():
    return randomised(Video(), 0.3)


def truth():
    """Gradients, and parameters after a step, of one process."""
    model = build()
    halves = seeded(CLIPS).chunk(2)
    (sum(loss_of(model(half)) for half in halves) / len(halves)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return grads, {name: p.detach() - RATE * grads[name] for name, p in model.named_parameters()}


def plain(model, mesh):
    return model, lambda: hp.sync_grads(model, mesh)


def ddp(model, mesh):
    return DistributedDataParallel(model), lambda: None


def fsdp(model, mesh):
    """FSDP2 over all ranks: it shards, and averages, over dp x sp flattened."""
    flat = dist.device_mesh.init_device_mesh("cpu", (mesh.world,), mesh_dim_names=("all",))
    for block in model.blocks:
        fully_shard(block, mesh=flat)
    return fully_shard(model, mesh=flat), lambda: None


def fsdp_over_dp(model, mesh):
    """FSDP2 over dp alone; the shards are then averaged over the other axes."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh.device_mesh["dp"])
    fully_shard(model, mesh=mesh.device_mesh["dp"])
    axes = [axis for axis in mesh.axes if axis != "dp"]
    return model, lambda: hp.sync_grads(model, mesh, axes=axes)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(wrap, dp, sp, wanted):
    """One step on one rank of a dp x sp mesh."""
    mesh = hp.init_mesh(dp=dp, sp=sp, timeout_s=30)
    grads, parameters = wanted
    model = build()
    clips = seeded(CLIPS).chunk(2)
    mine = clips[mesh.rank("dp")] if dp == 2 else torch.cat(clips)
    plan = hp.plan(model, mine, mesh, attends=ATTENDS)
    hp.parallelize(model, plan, mesh)
    runner, sync = wrap(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = loss_of(runner(mine))
    (loss if dp == 2 else loss / 2).backward()
    sync()
    floor = 1e-3 * max(float(g.norm()) for g in grads.values())
    for name, parameter in model.named_parameters():
        require_close(whole(parameter.grad), grads[name], f"gradient of {name}", floor)
    optimizer.step()
    for name, parameter in model.named_parameters():
        require_close(whole(parameter), parameters[name], f"{name} after a step")
    assert hp.plan_of(model) == plan


@pytest.fixture(scope="module")
def wanted():
    return launch(truth, 1)[0]


@pytest.mark.parametrize("wrap", [plain, ddp, fsdp, fsdp_over_dp])
def test_two_by_two(wanted, wrap):
    launch(step, 4, wrap, 2, 2, wanted, timeout_s=60)


@pytest.mark.parametrize("wrap", [plain, ddp, fsdp])
@pytest.mark.parametrize(("dp", "sp"), [(1, 3), (2, 1)])
def test_one_axis_of_degree_one(wanted, wrap, dp, sp):
    launch(step, dp * sp, wrap, dp, sp, wanted, timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [plain, ddp, fsdp, fsdp_over_dp])
def test_two_by_three(wanted, wrap):
    launch(step, 6, wrap, 2, 3, wanted, timeout_s=90)


def partial_step(wanted):
    """Each rank of sp takes the loss of its own frames of the whole output."""
    mesh = hp.init_mesh(dp=2, sp=2, timeout_s=30)
    model = build()
    mine = seeded(CLIPS).chunk(2)[mesh.rank("dp")]
    plan = hp.plan(model, mine, mesh, attends=ATTENDS, output_grad="partial")
    hp.parallelize(model, plan, mesh)
    frames = model(mine).tensor_split(2, dim=1)[mesh.rank("sp")]
    (2 * loss_of(frames)).backward()  # the mean over sp of twice each part is the sum of the parts
    hp.sync_grads(model, mesh)
    floor = 1e-3 * max(float(g.norm()) for g in wanted.values())
    for name, parameter in model.named_parameters():
        require_close(parameter.grad, wanted[name], f"gradient of {name}", floor)


def test_a_partial_loss(wanted):
    launch(partial_step, 4, wanted[0], timeout_s=60)


def accumulated_step(wanted):
    """Two micro-batches under DDP, the first without a sync."""
    mesh = hp.init_mesh(dp=1, sp=2, timeout_s=30)
    model = build()
    clips = seeded(CLIPS).chunk(2)
    hp.parallelize(model, hp.plan(model, clips[0], mesh, attends=ATTENDS), mesh)
    runner = DistributedDataParallel(model)
    with runner.no_sync():
        (loss_of(runner(clips[0])) / 2).backward()
    (loss_of(runner(clips[1])) / 2).backward()
    floor = 1e-3 * max(float(g.norm()) for g in wanted.values())
    for name, parameter in model.named_parameters():
        require_close(parameter.grad, wanted[name], f"gradient of {name}", floor)


def test_accumulation_under_ddp(wanted):
    launch(accumulated_step, 2, wanted[0], timeout_s=60)
