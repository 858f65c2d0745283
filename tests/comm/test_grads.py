"""The gradient contract: with averages over every mesh axis, all gradients are one process's."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hairpin as hp
from comm.cases import line, near, part_of, places, uniform
from hairpin.comm import grads
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import MeshError
from hairpin.layout import Layout
from hairpin.run.launch import launch

C = 4


@dataclass(frozen=True)
class Split:
    """How :class:`Net` holds its input; without a mesh, whole."""

    frames: Layout
    patches: Layout
    mesh: Mesh


class Net(nn.Module):
    """Works along patches, then along frames; ``shared`` is used inside the split and after it."""

    def __init__(self, split: Split | None = None) -> None:
        super().__init__()
        self.split = split
        self.embed, self.shared, self.out = (nn.Linear(C, C) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()  # x[b, t/sp, s, c]
        x = self.shared(x * x.softmax(2))
        if self.split:
            x = hp.switch(x, self.split.frames, self.split.patches, self.split.mesh)
        x = (x.cumsum(1) * self.scale).tanh()  # x[b, t, s/sp, c]
        if self.split:
            x = hp.switch(x, self.split.patches, self.split.frames, self.split.mesh)
        return self.out(x).sin()


def net(split: Split | None = None) -> Net:
    torch.manual_seed(3)
    return Net(split).double()


def split_of(mesh: Mesh, b: int, t: int, s: int, *, over_dp: bool = True) -> Split:
    batch = "b/dp" if over_dp else "b"
    frames = Layout(f"{batch} t/sp s c", b=b, t=t, s=s, c=C)
    return Split(frames, frames.split("s", "sp"), mesh)


def assert_same_gradients(model: nn.Module, truth: nn.Module, case: str) -> None:
    for (name, got), want in zip(model.named_parameters(), truth.parameters(), strict=True):
        gradient = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
        assert near(gradient, want.grad), f"{name}: {case}"


# Loss over valid tokens under uneven shards


def valid_tokens(b: int, t: int, s: int) -> Tensor:
    """Some samples and frames have none, so that some ranks have none."""
    valid = torch.rand((b, t, s), generator=torch.Generator().manual_seed(5)) < 0.6
    valid[:, -2:] = False
    valid[0] = False
    valid[-1, 0, 0] = True
    return valid.double()


def over_valid_tokens(dp: int, sp: int) -> list[float]:
    mesh, losses = init_mesh(dp=dp, sp=sp, timeout_s=20), []
    at = places(mesh)
    for b, t, s in ((2, 5, 3), (3, 7, 5), (4, 1, 2), (2, 3, 1)):
        x, target, valid = uniform(b, t, s, C), uniform(b, t, s, C, seed=1), valid_tokens(b, t, s)
        truth = net()
        errors = (truth(x) - target).square().mean(-1)
        want = (errors * valid).sum() / valid.sum()
        want.backward()

        split = split_of(mesh, b, t, s)
        tokens = Layout("b/dp t/sp s", b=b, t=t, s=s)
        model = net(split)
        mine = part_of(valid, tokens, at)
        errors = (model(part_of(x, split.frames, at)) - part_of(target, split.frames, at)).square()
        loss = hp.global_mean((errors.mean(-1) * mine).sum(), mine.sum(), mesh)
        loss.backward()
        hp.sync_grads(model, mesh)
        assert near(loss, want), f"loss of {b} x {t} x {s} on {mesh}"
        assert_same_gradients(model, truth, f"{b} x {t} x {s} on {mesh}")
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dp", "sp"), [(1, 1), (1, 2), (1, 3), (1, 4), (4, 1), (2, 2), (2, 3)])
def test_a_loss_over_valid_tokens_is_that_of_one_process(dp, sp):
    by_rank = launch(over_valid_tokens, dp * sp, dp, sp, timeout_s=60)
    assert all(losses == by_rank[0] for losses in by_rank)  # every rank has the same value


def means() -> None:
    mesh = line()
    rank, world = mesh.global_rank, mesh.world
    total = torch.tensor(float(rank), requires_grad=True)
    mean = hp.global_mean(total, rank, mesh)  # rank 0 has no token
    assert mean.shape == ()
    assert float(mean.detach()) == 1.0
    mean.backward()  # times N: the mean over ranks divides by N again
    assert float(total.grad) == pytest.approx(world / sum(range(world)))
    counts = (rank, torch.tensor(rank), torch.tensor(float(rank)))
    assert all(float(hp.global_mean(total.detach(), count, mesh)) == 1.0 for count in counts)


def test_global_mean():
    launch(means, 4, timeout_s=60)


def means_of_many() -> None:
    """More tokens than half precision can count."""
    mesh = line()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        total, count = torch.tensor(50_000, dtype=dtype), 100_001
        want = 50_000 / 100_001
        got = hp.global_mean(total, count, mesh)
        assert got.dtype == dtype
        assert float(got) == pytest.approx(want, rel=torch.finfo(dtype).eps), dtype


@pytest.mark.parametrize("world", [1, 2])
def test_a_mean_over_many_tokens_in_half_precision(world):
    launch(means_of_many, world, timeout_s=60)


# A replicated loss, and each rank's own


def replicated_loss(dp: int, sp: int) -> None:
    """The gathered output goes through ``shared`` once more; dp ranks have other samples."""
    mesh = init_mesh(dp=dp, sp=sp, timeout_s=20)
    at = places(mesh)
    b, t, s = 2 * dp, 5, 3
    x, target = uniform(b, t, s, C), uniform(b, t, s, C, seed=1)
    truth = net()
    F.mse_loss(truth.shared(truth(x)), target).backward()
    for grad in ("replicated", "partial"):
        split = split_of(mesh, b, t, s)
        model = net(split)
        y = model(part_of(x, split.frames, at))
        y = hp.gather(y, split.frames, mesh, axis="sp", grad=grad)
        samples = split.frames.split(None, "sp")
        F.mse_loss(model.shared(y), part_of(target, samples, at)).backward()
        hp.sync_grads(model, mesh)
        assert_same_gradients(model, truth, f"gather {grad} on {mesh}")


@pytest.mark.parametrize(("dp", "sp"), [(1, 2), (1, 3), (2, 2), (3, 1)])
def test_a_replicated_loss(dp, sp):
    launch(replicated_loss, dp * sp, dp, sp, timeout_s=60)


def with_ddp_and_fsdp() -> None:
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    at = places(mesh)
    b, t, s = 4, 5, 3
    x, target = uniform(b, t, s, C), uniform(b, t, s, C, seed=1)
    truth = net()
    F.mse_loss(truth(x), target).backward()
    split = split_of(mesh, b, t, s)
    samples = split.frames.split(None, "sp")

    def backward(model: nn.Module) -> None:
        y = model(part_of(x, split.frames, at))
        y = hp.gather(y, split.frames, mesh, axis="sp", grad="replicated")
        F.mse_loss(y, part_of(target, samples, at)).backward()

    ddp = DistributedDataParallel(net(split))
    backward(ddp)
    assert_same_gradients(ddp.module, truth, "DDP over all ranks")

    flat = mesh.device_mesh._flatten("all")
    everywhere = fully_shard(net(split), mesh=flat)
    backward(everywhere)
    assert_same_gradients(everywhere, truth, "FSDP2 over all ranks")

    over_dp = fully_shard(net(split), mesh=mesh.device_mesh["dp"])
    backward(over_dp)
    hp.sync_grads(over_dp, mesh, axes=["sp"])
    assert_same_gradients(over_dp, truth, "FSDP2 over dp, sync_grads over sp")


def test_with_ddp_and_fsdp2():
    launch(with_ddp_and_fsdp, 4, timeout_s=60)


# sync_grads by itself


def parameters(*gradients: Tensor | None) -> nn.ParameterList:
    model = nn.ParameterList()
    for gradient in gradients:
        like = torch.zeros(3) if gradient is None else torch.zeros_like(gradient)
        parameter = nn.Parameter(like)
        parameter.grad = gradient
        model.append(parameter)
    return model


def averaged() -> None:
    mesh = line()
    rank, world = mesh.global_rank, mesh.world
    middle = (world - 1) / 2
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    model = parameters(*(torch.full((2, 3), rank, dtype=dtype) for dtype in dtypes * 2))
    hp.sync_grads(model, mesh)
    for parameter in model:
        assert torch.equal(parameter.grad, torch.full_like(parameter, middle)), parameter.dtype

    strange = [
        uniform(4, 6).T * (rank + 1),
        uniform(2, 3, 4, 5).to(memory_format=torch.channels_last) * (rank + 1),
        torch.tensor(rank + 1.0, dtype=torch.float64),
        torch.empty(0, 3, dtype=torch.float64),
    ]
    model = parameters(*strange)
    hp.sync_grads(model, mesh)
    for parameter, like in zip(model, strange, strict=True):
        assert parameter.grad is like  # in place: an optimizer may hold it
    assert near(model[0].grad, uniform(4, 6).T * (middle + 1))
    assert near(model[1].grad, uniform(2, 3, 4, 5) * (middle + 1))
    assert near(model[2].grad, torch.tensor(middle + 1, dtype=torch.float64))


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_become_their_mean(world):
    launch(averaged, world, timeout_s=60)


def missing() -> None:
    mesh = line()
    rank = mesh.global_rank
    some = torch.full((3,), 4.0) if rank == 1 else None
    model = parameters(some, torch.full((3,), float(rank)), None)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model.append(frozen)
    hp.sync_grads(model, mesh)
    assert torch.equal(model[0].grad, torch.full((3,), 2.0))  # a rank without one counts as zero
    assert torch.equal(model[1].grad, torch.full((3,), 0.5))
    assert frozen.grad is None
    # What no rank has used stays without a gradient, as in one process: weight decay and momentum
    # would move it otherwise.
    assert model[2].grad is None


def test_ranks_without_a_gradient():
    launch(missing, 2, timeout_s=60)


def unused_at_one_rank() -> None:
    model = parameters(None, torch.ones(3))
    hp.sync_grads(model, hp.init_mesh(dp=1, sp=1))
    assert model[0].grad is None
    assert torch.equal(model[1].grad, torch.ones(3))


def test_one_rank_keeps_its_gradients():
    launch(unused_at_one_rank, 1, timeout_s=60)


def large_in_half_precision() -> None:
    mesh = line()
    model = parameters(torch.full((3,), 40_000, dtype=torch.float16))
    hp.sync_grads(model, mesh)
    assert model[0].grad.tolist() == [40_000] * 3


def test_a_mean_does_not_overflow_where_none_of_its_terms_does():
    launch(large_in_half_precision, 2, timeout_s=60)


def one_parameter_two_names() -> None:
    mesh = line()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, mesh.global_rank)
    hp.sync_grads(model, mesh)
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in model.parameters())


def test_a_shared_parameter_is_averaged_once():
    launch(one_parameter_two_names, 2, timeout_s=60)


def bucketed(bucket_bytes: int) -> tuple[int, int]:
    grads._BUCKET_BYTES = bucket_bytes  # in this rank's own process only
    mesh = line()
    sizes = [5, 1, 30, 7, 7, 100, 3]
    model = parameters(*(uniform(n, seed=n + mesh.global_rank) for n in sizes))
    hp.sync_grads(model, mesh)
    for n, parameter in zip(sizes, model, strict=True):
        want = torch.stack([uniform(n, seed=n + rank) for rank in range(mesh.world)]).mean(0)
        assert near(parameter.grad, want), (n, bucket_bytes)
    return mesh.traffic.collectives, mesh.traffic.bytes_sent


def test_buckets():
    counts = {size: launch(bucketed, 2, size, timeout_s=60)[0] for size in (1, 160, 320, 2**20)}
    collectives = [count for count, _ in counts.values()]  # for 7, 5, 4 and 1 buckets
    assert collectives[0] > collectives[1] > collectives[2] > collectives[3]
    payload = sum([5, 1, 30, 7, 7, 100, 3]) * 8
    assert all(payload <= sent <= payload + 64 for _, sent in counts.values())  # 2 M (N-1)/N


def by_axes() -> None:
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    rank = float(mesh.global_rank)  # dp 0: ranks 0, 1; dp 1: ranks 2, 3
    want = {("dp",): rank % 2 + 1, ("sp",): 0.5 if rank < 2 else 2.5, ("dp", "sp"): 1.5, None: 1.5}
    for axes, mean in want.items():
        model = parameters(torch.full((3,), rank))
        hp.sync_grads(model, mesh, axes=axes)
        assert torch.equal(model[0].grad, torch.full((3,), mean)), axes
    with pytest.raises(MeshError, match=r"Mesh\(dp=2, sp=2\) has no axis 'tp'"):
        hp.sync_grads(parameters(torch.ones(3)), mesh, axes=["tp"])
    model = parameters(torch.full((3,), rank))
    hp.sync_grads(model, mesh, axes=[])
    assert torch.equal(model[0].grad, torch.full((3,), rank)), "no axes: nothing to average over"


def test_axes_can_be_named():
    launch(by_axes, 4, timeout_s=60)


def accumulated() -> None:
    """Two backwards, one average: as one process with both samples."""
    mesh = init_mesh(dp=1, sp=2, timeout_s=20)
    at = places(mesh)
    split = split_of(mesh, 1, 5, 3)
    truth, model = net(), net(split)
    for seed in (1, 2):
        x = uniform(1, 5, 3, C, seed=seed)
        (truth(x).square().mean() / 2).backward()
        y = model(part_of(x, split.frames, at)).square()
        (hp.global_mean(y.sum(), y.numel(), mesh) / 2).backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    hp.sync_grads(model, mesh)
    assert_same_gradients(model, truth, "accumulated")
    assert any(not near(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_accumulation_needs_one_average():
    launch(accumulated, 2, timeout_s=60)
