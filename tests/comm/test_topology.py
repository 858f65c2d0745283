"""Topologies: their arithmetic, their text, and what ranks measure of links of known rates."""

import math
from dataclasses import replace

import numpy as np
import pytest

from comm.cases import line
from hairpin.bench.measure import join
from hairpin.bench.network import Network
from hairpin.comm.mesh import Mesh
from hairpin.comm.topology import Tier, Topology, Work, find_hosts, meetings
from hairpin.errors import MeshError
from hairpin.run.launch import launch

FAST, SLOW = Tier(1e-5, 1e9), Tier(1e-3, 1e6)
TWO_BY_TWO = Topology.two_tier(2, 2, FAST, SLOW, shared_outer=True)


def test_a_message_takes_its_latency_and_its_bytes():
    flat = Topology.flat(3, SLOW)
    assert flat.transfer_s([(0, 1, 1_000_000)]) == pytest.approx(1.001)
    assert flat.transfer_s([(0, 1, 500_000), (0, 2, 500_000)]) == pytest.approx(1.002)
    assert flat.transfer_s([(0, 1, 500_000), (1, 0, 500_000)]) == pytest.approx(0.501)
    assert flat.transfer_s([(0, 2, 500_000), (1, 2, 500_000)]) == pytest.approx(1.002)


def test_nothing_takes_no_time():
    assert TWO_BY_TWO.transfer_s([]) == 0.0
    assert TWO_BY_TWO.transfer_s([(0, 1, 0), (2, 2, 100)]) == 0.0
    assert Work(1.0, 1.0).time_s(0) == Tier(1.0, 1.0).time_s(0) == 0.0


def test_ranks_of_a_host_share_the_outer_link_or_not():
    both = [(0, 2, 1_000_000), (1, 3, 1_000_000)]
    assert TWO_BY_TWO.transfer_s(both) == pytest.approx(2.001)
    assert replace(TWO_BY_TWO, shared_outer=False).transfer_s(both) == pytest.approx(1.001)


def test_the_slower_tier_counts_and_both_work_at_once():
    messages = [(0, 1, 1_000_000), (0, 2, 1_000_000)]
    assert TWO_BY_TWO.transfer_s(messages) == pytest.approx(1.001)
    assert TWO_BY_TWO.transfer_s(messages[:1]) == pytest.approx(1e-5 + 1e-3)


def test_text_and_back():
    for topology in (TWO_BY_TWO, Topology.flat(1, Tier(0.0, math.inf))):
        assert Topology.from_toml(topology.to_toml()) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 9", "version 9"),
        ("nonsense", "not valid TOML"),
        ("version = 1\nhost_of = [0]", "not a whole topology"),
        (TWO_BY_TWO.to_toml().replace("[0,", "[7,").replace("    0,\n", "    7,\n", 1), "host_of"),
        (TWO_BY_TWO.to_toml() + "surplus = 1\n", "surplus"),
        (TWO_BY_TWO.to_toml().replace("latency_s = 1e-05", "latency_s = -1.0"), "latency_s=-1.0"),
    ],
)
def test_text_that_is_no_topology(text, message):
    with pytest.raises(MeshError, match=message):
        Topology.from_toml(text)


def test_impossible_topologies():
    with pytest.raises(MeshError, match="numbered from 0"):
        Topology((), FAST, SLOW)
    with pytest.raises(MeshError, match="numbered from 0"):
        Topology((0, 2), FAST, SLOW)
    with pytest.raises(MeshError, match="bytes_per_s=0"):
        Tier(0.0, 0)
    with pytest.raises(MeshError, match="flops_per_s=nan"):
        Work(0.0, math.nan)


def test_ranks_per_host():
    assert TWO_BY_TWO.ranks_per_host == 2
    assert Topology((0, 1, 0, 1), FAST, SLOW).ranks_per_host is None
    assert Topology((0, 0, 1), FAST, SLOW).ranks_per_host is None
    assert Topology.flat(3, FAST).ranks_per_host == 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_all_meet_all_once(ranks):
    rounds = meetings(ranks)
    assert all(len({r for pair in pairs for r in pair}) == 2 * len(pairs) for pairs in rounds)
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == [(a, b) for a in range(ranks) for b in range(a + 1, ranks)]


def times(host_of, *, inner=1.0, outer=5.0):
    host = np.array(host_of)
    return np.where(host[:, None] == host[None, :], inner, outer)


def test_hosts_are_found_by_the_times_between_pairs():
    for host_of in [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 1, 1, 2, 2)]:
        noise = 1 + 0.3 * np.random.default_rng(0).random((len(host_of),) * 2)
        noise = np.minimum(noise, noise.T)
        assert find_hosts(times(host_of) * noise) == host_of


def test_a_disturbed_pair_does_not_make_hosts_unequal():
    disturbed = times((0, 0, 1, 1), outer=9.0) * 1.0
    disturbed[0, 1] = disturbed[1, 0] = 4.0
    assert find_hosts(disturbed) == (0, 0, 1, 1)


def test_one_host_where_times_show_no_groups():
    alike = times((0, 0, 0, 0)) * 1.0
    assert find_hosts(alike) == (0, 0, 0, 0)
    assert find_hosts(times((0, 0, 1, 1), outer=1.6)) == (0, 0, 0, 0)
    slow_pair = alike.copy()
    slow_pair[0, 1] = slow_pair[1, 0] = 9.0
    assert find_hosts(slow_pair) == (0, 0, 0, 0)
    assert find_hosts(np.zeros((1, 1))) == (0,)


def survey(wire: Network) -> tuple[Topology, int]:
    mesh = join(wire)
    return Topology.measure(mesh, "sp", lengths=(32, 64)), mesh.traffic.bytes_sent


def alone_or_not() -> Topology:
    return Topology.measure(line(), "sp", lengths=(32, 64))


@pytest.mark.root
def test_two_tiers_are_found_and_measured_alike_by_all_ranks():
    with Network(4, rate_bits_per_s=2e8, hosts=2) as wire:
        found = launch(survey, 4, wire, timeout_s=60)
    topology, payload_bytes = found[0]
    assert [each for each, _ in found] == [topology] * 4
    assert payload_bytes == 0, "measuring counts as control, not as payload"
    assert topology.host_of == (0, 0, 1, 1)
    assert topology.shared_outer
    assert topology.outer.bytes_per_s == pytest.approx(2e8 / 8, rel=0.1)
    assert topology.inner.bytes_per_s > 2 * topology.outer.bytes_per_s


@pytest.mark.root
def test_one_tier_is_found():
    with Network(3, rate_bits_per_s=2e8) as wire:
        topology = launch(survey, 3, wire, timeout_s=60)[0][0]
    assert topology.host_of == (0, 0, 0)
    assert topology.inner == topology.outer
    assert topology.inner.bytes_per_s == pytest.approx(2e8 / 8, rel=0.1)


def test_without_an_emulated_network():
    for ranks in (1, 2):
        found = launch(alone_or_not, ranks, timeout_s=60)
        assert len(set(found)) == 1
        assert found[0].ranks == ranks
        assert found[0].forward.flops_per_s > found[0].forward.overhead_s >= 0
        assert 1e6 < found[0].copy_bytes_per_s < 1e13


def test_measuring_needs_ranks_and_lengths():
    with pytest.raises(MeshError, match="only a description"):
        Topology.measure(Mesh(sp=2), "sp")
    with pytest.raises(MeshError, match="give two or more"):
        Topology.measure(Mesh(sp=1), "sp", lengths=(64,))
