"""Averaging parameter gradients over the mesh for those who use neither DDP nor FSDP2."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.transport import Link

_BUCKET_BYTES = 32 * 2**20


def sync_grads(
    model: nn.Module, mesh: Mesh | DeviceMesh, *, axes: Sequence[str] | None = None
) -> None:
    """Replace every ``p.grad`` by its mean over the mesh, in buckets of 32 MiB.

    A parameter that got no gradient on this rank counts as zero, so ranks with empty shards take
    part; one that got none on any rank keeps none. Call it once per optimizer step, after the last
    backward of an accumulation.

    Args:
        axes: mesh axes to average over; all of them by default. With FSDP2 over ``dp`` alone, give
            ``["sp"]``: its sharded gradients are averaged shard by shard.

    Raises:
        MeshError: an axis that is not on the mesh.
        CommError: a rank is gone or did not answer.
    """
    mesh = as_mesh(mesh)
    links = [Link(mesh, a) for a in (mesh.axes if axes is None else axes) if mesh.size(a) > 1]
    if not links:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = _used_anywhere(parameters, links)
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(_local(p.grad) for p in used if p.grad is not None):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        for link in links:
            flat /= link.size  # before adding, so that no sum overflows where the mean does not
            link.sum(flat, what=f"averaging {len(bucket)} gradients")()
        for grad, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _used_anywhere(parameters: list[nn.Parameter], links: Sequence[Link]) -> list[nn.Parameter]:
    """The parameters that got a gradient on some rank, the same list on every rank."""
    counts = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    for link in links:
        link.sum(counts, what=f"counting which of {len(parameters)} parameters were used")()
    return [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]


def _local(grad: Tensor) -> Tensor:
    """The part of a gradient on this rank: of a DTensor its local shard."""
    return grad.to_local() if hasattr(grad, "to_local") else grad


def _buckets(grads: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Consecutive gradients of one dtype and device, together at most 32 MiB or one tensor."""
    bucket: list[Tensor] = []
    size_bytes = 0
    for grad in grads:
        alike = bucket and (grad.dtype, grad.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size_bytes + grad.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(grad)
        size_bytes += grad.nbytes
    if bucket:
        yield bucket
