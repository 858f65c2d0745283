"""Planning is quick where it repeats itself."""

import pytest
import torch

from hairpin.bench.planning_time import cached, replans, stacks
from hairpin.bench.zoo import select
from planning.looping import Block, Stack


def build(count):
    torch.manual_seed(0)
    return Stack(*(Block() for _ in range(count))).eval()


INPUTS = ((torch.linspace(0, 1, 2 * 96 * 8).reshape(2, 96, 8),), {})


@pytest.mark.slow
def test_48_blocks_are_planned_about_as_fast_as_two():
    found = stacks(build, INPUTS)
    assert found.ratio <= 1.2, found


@pytest.mark.slow
def test_chunk_sizes_at_new_lengths_take_milliseconds():
    pytest.importorskip("transformers")
    for row in replans(select("GPT-2 (eager)", "Pairformer block")):
        assert row.worst_s <= 0.05, row
        assert row.first_s <= 0.15, row


@pytest.mark.slow
def test_a_plan_from_the_cache_is_found_at_once():
    found = cached(build(2), INPUTS, 40_000)
    assert found.found_s < found.made_s / 5, found
