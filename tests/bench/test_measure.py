"""Samples of all ranks come together as they should."""

import pytest

from hairpin.bench import measure
from hairpin.bench.measure import Sample, combine, interleave
from hairpin.bench.network import Loopback
from hairpin.comm.mesh import init_mesh


def test_combine_takes_the_slowest_rank_and_the_median_round():
    ranks = [
        [Sample(1.0, 10, 12), Sample(5.0, 10, 13), Sample(2.0, 10, 12)],
        [Sample(3.0, 20, 22), Sample(1.0, 20, 22), Sample(1.0, 20, 99)],
    ]
    figures = combine(ranks)
    assert figures.times_s == [3.0, 5.0, 2.0]
    assert figures.time_s == 3.0
    assert figures.payload_bytes == [10, 20]
    assert figures.wire_bytes == [12, 22]


def test_combine_without_counters():
    assert combine([[Sample(1.0, 10, None)]]).wire_bytes is None


def test_interleave_takes_turns_and_turns_begin_with_each():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(steps, init_mesh(sp=1), Loopback(), rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(got) for name, got in samples.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (3.0, True)])
def test_a_busy_machine_is_told(monkeypatch, load, busy):
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(measure, "usable_cores", lambda: 2)
    warning = measure.foreign_load()
    assert (warning is not None) == busy
    if busy:
        assert "load 3.0 on 2 cores" in warning
