"""The emulated network: limits, counts, and nothing left behind. And the way without it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hairpin.bench import network
from hairpin.bench.measure import join, sample
from hairpin.bench.network import Loopback, Network, NetworkError, open_network
from hairpin.comm.transport import Link
from hairpin.run.launch import launch

RATE_BITS_PER_S = 1e8
CHUNK_BYTES = 1 << 20
FRAMED = 1.06  # a frame carries at most 1448 bytes behind 66 of headers; and acknowledgements

HOLDER = r"""
import os, time
from hairpin.bench.network import Network
from hairpin.run.launch import launch

def rank(wire):
    wire.enter(int(os.environ["RANK"]))
    os.write(1, b"%d\n" % os.stat("/proc/thread-self/ns/net").st_ino)
    time.sleep(600)

launch(rank, 2, Network(2))
"""


def exchange(wire: Network) -> tuple[float, int, int]:
    """Time of, payload of, and bytes on the wire for one exchange with every other rank."""
    mesh = join(wire)
    link = Link(mesh, "sp")
    sends = [torch.zeros(CHUNK_BYTES, dtype=torch.uint8) for _ in range(link.size)]
    receives = [torch.empty_like(chunk) for chunk in sends]

    def step() -> None:
        link.exchange(sends, receives, what="test")()

    got = sample(step, mesh, wire)
    return got.time_s, got.payload_bytes, got.wire_bytes


def namespaces() -> set[int]:
    """Inodes of all network namespaces that a process is in or holds, or that are mounted."""
    held = set()
    for link in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            found = re.fullmatch(r"net:\[(\d+)\]", str(link.readlink()))
        except OSError:  # ended meanwhile
            continue
        if found:
            held.add(int(found[1]))
    mounted = re.findall(r"net:\[(\d+)\]", Path("/proc/self/mountinfo").read_text())
    return held | {int(inode) for inode in mounted}


@pytest.mark.root
def test_links_are_limited_and_counted():
    ideal_s = 2 * CHUNK_BYTES * 8 / RATE_BITS_PER_S
    with Network(3, rate_bits_per_s=RATE_BITS_PER_S) as wire:
        for time_s, payload_bytes, wire_bytes in launch(exchange, 3, wire, timeout_s=60):
            assert payload_bytes == 2 * CHUNK_BYTES
            assert payload_bytes < wire_bytes < FRAMED * payload_bytes
            assert time_s > 0.9 * ideal_s, "the limit did not hold"


@pytest.mark.root
def test_nothing_of_the_machine_changes_and_nothing_stays():
    interfaces, home = socket.if_nameindex(), Path("/proc/thread-self/ns/net").stat().st_ino
    with Network(2) as wire:
        made = {os.fstat(fd).st_ino for fd in (wire._hub, *wire._ends)}
        assert len(made) == 3
        assert made <= namespaces()
        assert socket.if_nameindex() == interfaces
    assert not made & namespaces()
    assert Path("/proc/thread-self/ns/net").stat().st_ino == home


@pytest.mark.root
def test_a_killed_benchmark_leaves_no_namespace():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        try:
            inodes = {int(holder.stdout.readline()) for _ in range(2)}
            assert inodes <= namespaces()
        finally:
            holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while inodes & namespaces() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not inodes & namespaces()


@pytest.mark.root
def test_a_process_outside_has_no_count():
    with Network(1) as wire, pytest.raises(NetworkError, match="in no rank's namespace"):
        wire.bytes_sent()


@pytest.mark.root
def test_a_failing_tool_is_named_and_nothing_stays(monkeypatch):
    before = namespaces()
    monkeypatch.setattr(network, "_MTU_BYTES", -1)
    with pytest.raises(NetworkError, match=r"`ip link add port0 mtu -1 .*` failed"):
        Network(2)
    assert namespaces() == before


@pytest.mark.root
@pytest.mark.parametrize("ranks", [0, 251])
def test_refuses_a_number_of_ranks(ranks):
    with pytest.raises(NetworkError, match=f"1 to 250 ranks, got {ranks}"):
        Network(ranks)


def test_without_permission_the_loopback_says_that_rates_are_not_limited(monkeypatch):
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(network, "_unshare", refuse)
    monkeypatch.setattr(network.sys, "platform", "linux")
    monkeypatch.setattr(network.shutil, "which", lambda tool: f"/sbin/{tool}")
    with open_network(2, rate_bits_per_s=RATE_BITS_PER_S) as wire:
        assert isinstance(wire, Loopback)
        assert "run as root" in wire.note
        assert "rates are NOT limited" in wire.note
        assert wire.rate_bits_per_s is None
        assert wire.bytes_sent() is None
    with pytest.raises(NetworkError, match="run as root"):
        Network(2)


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(network.sys, "platform", "linux")
    monkeypatch.setattr(network.shutil, "which", lambda tool: None if tool == "tc" else "/sbin/ip")
    assert network.why_not() == "tc not found; install iproute2"


def test_another_system_is_named(monkeypatch):
    monkeypatch.setattr(network.sys, "platform", "darwin")
    assert "need Linux" in network.why_not()


def cross_and_stay(wire: Network) -> tuple[float, float, tuple[int, ...], tuple[int, ...]]:
    """Times of a swap inside the host and one across hosts, and what each sent up its uplink."""
    mesh = join(wire)
    link = Link(mesh, "sp")

    def swap(peer: int) -> None:
        empty = torch.empty(0, dtype=torch.uint8)
        sends, receives = ([empty] * link.size for _ in range(2))
        sends[peer] = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
        receives[peer] = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        link.exchange(sends, receives, what="test")()

    times_s, counts = [], []
    for peer in (link.rank ^ 1, (link.rank + 2) % 4):
        before = wire.uplink_bytes_sent()
        times_s.append(sample(lambda peer=peer: swap(peer), mesh, wire).time_s)
        counts.append(tuple(b - a for a, b in zip(before, wire.uplink_bytes_sent(), strict=True)))
    return *times_s, *counts


@pytest.mark.root
def test_ranks_of_a_host_share_its_uplink_and_only_what_crosses_is_counted():
    crossing_s = 2 * CHUNK_BYTES * 8 / RATE_BITS_PER_S
    with Network(4, rate_bits_per_s=RATE_BITS_PER_S, hosts=2) as wire:
        assert [wire.host_of(rank) for rank in range(4)] == [0, 0, 1, 1]
        ranks = launch(cross_and_stay, 4, wire, timeout_s=60)
    assert max(rank[0] for rank in ranks) < 0.7 * crossing_s
    slowest_s = max(rank[1] for rank in ranks)
    assert slowest_s > 0.9 * crossing_s, "the two ranks of a host had more than one link"
    for _, _, stayed, crossed in ranks:
        for few, many in zip(stayed, crossed, strict=True):
            assert few < 0.1 * CHUNK_BYTES
            assert 2 * CHUNK_BYTES < many < 2.1 * CHUNK_BYTES


@pytest.mark.root
def test_links_inside_a_host_can_be_limited():
    ideal_s = CHUNK_BYTES * 8 / RATE_BITS_PER_S
    with Network(4, hosts=2, inner_rate_bits_per_s=RATE_BITS_PER_S) as wire:
        for inside_s, _, _, _ in launch(cross_and_stay, 4, wire, timeout_s=60):
            assert inside_s > 0.9 * ideal_s


@pytest.mark.root
def test_refuses_hosts_that_cannot_be():
    with pytest.raises(NetworkError, match="4 ranks stand on 1 to 4 hosts, got hosts=5"):
        Network(4, hosts=5)
    with pytest.raises(NetworkError, match="give hosts"):
        Network(4, inner_rate_bits_per_s=1e9)
