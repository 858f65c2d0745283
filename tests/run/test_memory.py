"""Peak memory is counted to the byte, and a budget is kept."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hairpin.comm.mesh import init_mesh
from hairpin.errors import MemoryBudgetError
from hairpin.run.launch import launch
from hairpin.run.memory import measured, require_budget

CPU = torch.device("cpu")
KIB = 1024


def test_the_peak_is_the_most_alive_at_once():
    x = torch.zeros(KIB, dtype=torch.uint8)
    with measured(CPU) as peak:
        a = x + 1
        b = a + 1
        del a
        c = b + 1  # noqa: F841  # alive until the block ends
    assert peak.peak_bytes == 2 * KIB


def test_views_and_work_in_place_take_nothing():
    x = torch.zeros(KIB, dtype=torch.uint8)
    with measured(CPU) as peak:
        x.view(32, 32).t().add_(1)
    assert peak.peak_bytes == 0


def test_what_a_backward_keeps_is_counted():
    x = torch.zeros(KIB // 4, requires_grad=True)
    with measured(CPU) as peak:
        y = x
        for _ in range(4):
            y = y.exp()  # each keeps its result
        y.sum().backward()
    assert 4 * KIB < peak.peak_bytes <= 7 * KIB


def test_tensors_from_before_do_not_count_when_they_go():
    x = torch.zeros(KIB)
    with measured(CPU) as peak:
        del x
        torch.zeros(KIB, dtype=torch.uint8)
    assert peak.peak_bytes == KIB


def test_a_budget_that_is_too_small_gives_both_figures():
    with pytest.raises(MemoryBudgetError) as info:
        require_budget([KIB, 3 * KIB], 2 * KIB, batch_size=4, ranks=2)
    assert str(info.value) == (
        "a training step needs 3.00 KiB on rank 1, more than the 2.00 KiB that --memory allows; "
        "use more ranks than 2, a batch smaller than 4 clips, or a larger budget"
    )


@pytest.mark.parametrize("budget_bytes", [None, 3 * KIB])
def test_enough_is_enough(budget_bytes):
    require_budget([KIB, 3 * KIB], budget_bytes, batch_size=4, ranks=2)


def slices_of_a_product() -> int:
    """A relu of a product that two ranks share: each gets half of either."""
    mesh = init_mesh(tp=2).device_mesh
    x = distribute_tensor(torch.randn(16, 16), mesh, [Replicate()])
    y = distribute_tensor(torch.randn(16, 64), mesh, [Shard(1)])
    with measured(CPU) as peak:
        z = (x @ y).relu()  # noqa: F841
    return peak.peak_bytes


def test_of_what_ranks_share_the_own_slice_counts():
    assert launch(slices_of_a_product, 2) == [2 * 16 * 32 * 4] * 2
