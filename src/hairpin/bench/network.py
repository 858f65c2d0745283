"""An emulated network: one Linux network namespace per rank, joined by a bridge, rate-limited.

::

       rank 0              rank 1                rank N-1       one namespace each
      [ wire0 ]           [ wire0 ]             [ wire0 ]       10.77.0.1, .2, ... N
         |   rate: sent      |                     |
         |                   |                     |            veth pairs
         |   rate: received  |                     |
      [ port0 ]-----------[ port1 ]--- ... ---[ portN-1 ]       hub: a bridge in its own namespace

Every rank has a full-duplex link of ``rate_bits_per_s``: a token bucket (``tc tbf``) limits what
leaves the rank at the rank's end and what reaches it at the hub's end. Only bandwidth is emulated,
not latency: ``netem`` is missing from many kernels.

With ``hosts`` there are two tiers. Ranks of a host are joined by its own bridge, over links that
are not limited or fast; one limited link, which they share, joins each host to the hub::

      rank 0   rank 1        rank 2   rank 3
         |        |             |        |       rate: inner_rate_bits_per_s, or none
       [=== host0 ===]        [=== host1 ===]    a bridge each
               | up0                 | up1       rate: rate_bits_per_s, each way
               +--------[ hub ]------+

The namespaces have no names. They live as long as a process holds their file descriptors or runs
inside them, so nothing is left behind, not even by SIGKILL, and the machine's own interfaces,
addresses and routes are never touched.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from hairpin.errors import HairpinError
from hairpin.layout import shard_sizes
from hairpin.units import parse_rate

_CLONE_NEWNET = 0x40000000
_LINK = "wire0"  # name of every rank's interface, inside its own namespace
_SUBNET = "10.77.0"  # exists only inside the namespaces made here
_MTU_BYTES = 9000
_PACKET_BYTES = 32768  # largest packet handed to a link, and the token bucket's depth
_QUEUE_BYTES = 1 << 25  # deep enough that nothing is dropped: TCP's windows are smaller
_WINDOW_BYTES = 1 << 17  # that a rank of a host may have on the way to another
_MAX_RANKS = 250
_NOTE = "ranks in network namespaces, bytes counted by their interfaces"


class NetworkError(HairpinError, RuntimeError):
    """An emulated network cannot be made on this machine."""


class Wire(Protocol):
    """What joins the ranks of a benchmark: an emulated network, or the loopback interface."""

    rate_bits_per_s: float | None
    note: str

    def enter(self, rank: int) -> None:
        """Move the calling process onto rank's end; call it before joining the other ranks."""
        ...

    def bytes_sent(self) -> int | None:
        """Bytes the caller's link has carried away so far, headers included; None if unknown."""
        ...

    def uplink_bytes_sent(self) -> tuple[int, ...] | None:
        """Bytes that have left each host so far, headers included; None if there are no hosts."""
        ...

    def close(self) -> None:
        """Take everything down."""
        ...


class Network:
    """Ranks in network namespaces of their own. A context manager; see the module's drawing.

    Make it in the parent, fork the ranks, and call :meth:`enter` first thing in each.

    Args:
        ranks: how many ends.
        rate_bits_per_s: limit on sending and, separately, receiving, of each rank or, with
            ``hosts``, of each host; None: no limit.
        hosts: None for one tier; else the ranks stand on so many hosts, neighbours together, the
            first hosts with one more where they do not divide.
        inner_rate_bits_per_s: with ``hosts``, limit of each rank's own link; None: no limit.

    Raises:
        NetworkError: not on Linux, not allowed, ``ip`` or ``tc`` is missing or too old, or there
            are more hosts than ranks.
    """

    def __init__(
        self,
        ranks: int,
        *,
        rate_bits_per_s: float | None = None,
        hosts: int | None = None,
        inner_rate_bits_per_s: float | None = None,
    ) -> None:
        obstacle = why_not()
        if obstacle is not None:
            raise NetworkError(f"cannot emulate a network: {obstacle}")
        if not 1 <= ranks <= _MAX_RANKS:
            raise NetworkError(f"an emulated network has 1 to {_MAX_RANKS} ranks, got {ranks}")
        _check_hosts(ranks, hosts, inner_rate_bits_per_s)
        self.ranks = ranks
        self.rate_bits_per_s = rate_bits_per_s
        self.hosts = hosts
        self.inner_rate_bits_per_s = inner_rate_bits_per_s
        self.note = _NOTE
        self._home = _current_namespace()
        self._hub = -1
        self._ends: list[int] = []
        try:
            self._hub = self._new_namespace()
            self._build()
        except BaseException:
            self.close()
            raise

    def enter(self, rank: int) -> None:
        """Move this process's thread, and all threads it starts later, into ``rank``'s namespace.

        Sockets that are open keep the network they were opened in. Gloo is told which interface to
        use.
        """
        _set_namespace(self._ends[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = _LINK

    def address(self, rank: int) -> str:
        """IPv4 address of ``rank``, reachable only from the other ranks."""
        return f"{_SUBNET}.{rank + 1}"

    def bytes_sent(self) -> int:
        """Bytes the caller's link has carried away so far, all headers included."""
        return _transmitted_bytes(_LINK)

    def uplink_bytes_sent(self) -> tuple[int, ...] | None:
        """Bytes that have left each host over its uplink so far; None where there is one tier."""
        if self.hosts is None:
            return None
        counts: list[int] = []

        def read() -> None:  # in a thread of its own, so that the caller stays where it is
            _set_namespace(self._hub)
            counts.extend(_transmitted_bytes(_uplink(host)) for host in range(self.hosts or 0))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        return tuple(counts)

    def host_of(self, rank: int) -> int | None:
        """The host that ``rank`` stands on; None where there is one tier."""
        return None if self.hosts is None else _host_of(self.ranks, self.hosts)[rank]

    def close(self) -> None:
        """Let go of the namespaces; the kernel removes them with the last rank inside."""
        for descriptor in (self._hub, *self._ends, self._home):
            if descriptor >= 0:
                os.close(descriptor)
        self._hub, self._ends, self._home = -1, [], -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self) -> None:
        with self._inside(self._hub):
            _run("ip link add hub type bridge")
            _run("ip link set hub up addrgenmode none")
            for host in range(self.hosts or 0):
                self._join_host(host)
        for rank in range(self.ranks):
            end = self._new_namespace()
            self._ends.append(end)
            self._join(rank, end)

    def _join_host(self, host: int) -> None:
        """A bridge for the host and the one link from it to the hub; inside the hub's namespace."""
        bridge, up, down = f"host{host}", _uplink(host), f"down{host}"
        size = f"mtu {_MTU_BYTES} gso_max_size {_PACKET_BYTES}"
        _run(f"ip link add {bridge} type bridge")
        _run(f"ip link set {bridge} up addrgenmode none")
        _run(f"ip link add {up} {size} type veth peer name {down} {size}")
        for device, master in ((up, bridge), (down, "hub")):
            _run(f"ip link set dev {device} master {master} up addrgenmode none")
            _limit(device, self.rate_bits_per_s)

    def _join(self, rank: int, end: int) -> None:
        port = f"port{rank}"
        host = self.host_of(rank)
        bridge, rate = "hub", self.rate_bits_per_s
        if host is not None:
            bridge, rate = f"host{host}", self.inner_rate_bits_per_s
        size = f"mtu {_MTU_BYTES} gso_max_size {_PACKET_BYTES}"
        with self._inside(self._hub):
            there = f"/proc/{os.getpid()}/fd/{end}"
            _run(f"ip link add {port} {size} type veth peer name {_LINK} {size} netns {there}")
            _run(f"ip link set dev {port} master {bridge} up addrgenmode none")
            _limit(port, rate)
        with self._inside(end):
            _tune_tcp(hosts=self.hosts is not None)
            _run("ip link set lo up")
            _run(f"ip link set dev {_LINK} up addrgenmode none")
            _run(f"ip address add {self.address(rank)}/24 dev {_LINK}")
            _limit(_LINK, rate)

    def _new_namespace(self) -> int:
        _unshare()
        try:
            return _current_namespace()
        finally:
            _set_namespace(self._home)

    @contextmanager
    def _inside(self, namespace: int) -> Iterator[None]:
        _set_namespace(namespace)
        try:
            yield
        finally:
            _set_namespace(self._home)


def _check_hosts(ranks: int, hosts: int | None, inner_rate_bits_per_s: float | None) -> None:
    if hosts is not None and not 1 <= hosts <= ranks:
        raise NetworkError(f"{ranks} ranks stand on 1 to {ranks} hosts, got hosts={hosts}")
    if hosts is None and inner_rate_bits_per_s is not None:
        raise NetworkError(
            f"inner_rate_bits_per_s={inner_rate_bits_per_s:g} is of links inside hosts, and there "
            "are none; give hosts, or rate_bits_per_s alone"
        )


def _host_of(ranks: int, hosts: int) -> list[int]:
    return [host for host, size in enumerate(shard_sizes(ranks, hosts)) for _ in range(size)]


def _uplink(host: int) -> str:
    """The host's end of its link to the hub: what it transmits leaves the host."""
    return f"up{host}"


def _limit(device: str, rate_bits_per_s: float | None) -> None:
    if rate_bits_per_s is not None:
        _run(
            f"tc qdisc replace dev {device} root tbf rate {rate_bits_per_s:.0f}bit "
            f"burst {_PACKET_BYTES} limit {_QUEUE_BYTES}"
        )


class Loopback:
    """All ranks on the loopback interface: no rate limit and no count per rank."""

    rate_bits_per_s: float | None = None

    def __init__(self, note: str = "ranks on the loopback interface") -> None:
        self.note = note

    def enter(self, rank: int) -> None:
        """Nothing to move: all ranks share the machine's own network."""

    def bytes_sent(self) -> None:
        """None: the loopback interface counts all ranks together."""

    def uplink_bytes_sent(self) -> None:
        """None: there are no hosts."""

    def close(self) -> None:
        """Nothing to take down."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_network(
    ranks: int,
    *,
    rate_bits_per_s: float | None = None,
    hosts: int | None = None,
    inner_rate_bits_per_s: float | None = None,
) -> "Network | Loopback":
    """An emulated network where this machine allows one, else the loopback; see its ``note``."""
    obstacle = why_not()
    if obstacle is None:
        return Network(
            ranks,
            rate_bits_per_s=rate_bits_per_s,
            hosts=hosts,
            inner_rate_bits_per_s=inner_rate_bits_per_s,
        )
    return Loopback(_note_without(obstacle))


def network_note() -> str:
    """The ``note`` of every network that :func:`open_network` makes here."""
    obstacle = why_not()
    return _NOTE if obstacle is None else _note_without(obstacle)


def _note_without(obstacle: str) -> str:
    return (
        f"no emulated network ({obstacle}): ranks share the loopback interface, so rates are NOT "
        "limited and bytes are counted by the program, not by an interface"
    )


def emulated_rates(rates: Sequence[str]) -> dict[str, float | None]:
    """Bits per second by rate, None without limit; ``"unlimited"`` alone where there is no network.

    Raises:
        UnitError: a rate that cannot be read.
    """
    read = {rate: parse_rate(rate) for rate in rates}
    return read if why_not() is None else {"unlimited": None}


def why_not() -> str | None:
    """Why no network can be emulated here, with the way out; None if one can."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    if not _may_move():
        return (
            "making network namespaces is not allowed; run as root, or as an ordinary user in "
            "`unshare --user --map-root-user --net sh -c 'ip link set lo up && hairpin bench ...'`"
        )
    return None


def _may_move() -> bool:
    """Whether a thread may go to a new namespace and back; tried in one that ends at once."""
    refusals: list[OSError] = []

    def attempt() -> None:
        home = _current_namespace()
        try:
            _unshare()
            _set_namespace(home)
        except OSError as error:
            refusals.append(error)
        finally:
            os.close(home)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return not refusals


def _current_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _unshare() -> None:
    """Put the calling thread into a new, empty network namespace (os.unshare is 3.12+)."""
    _call("unshare", _CLONE_NEWNET)


def _set_namespace(descriptor: int) -> None:
    """Put the calling thread into an open network namespace (os.setns is 3.12+)."""
    _call("setns", descriptor, _CLONE_NEWNET)


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(
            f"cannot emulate a network: `{command}` failed: {done.stderr.strip() or 'no message'}; "
            "it needs iproute2 5.0 or newer and the kernel's veth, bridge and sch_tbf"
        )


def _tune_tcp(*, hosts: bool) -> None:
    """The same congestion control on every machine, and no slow start after a pause to compute.

    The queue of a link between hosts is not the sender's own, so nothing keeps it from filling
    it; acknowledgements of what comes the other way would wait behind whole messages, and each way
    would idle for the other. So ranks of hosts have small windows.
    """
    settings = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
    if hosts:
        settings["tcp_rmem"] = f"4096 {_WINDOW_BYTES // 2} {_WINDOW_BYTES}"
    for name, value in settings.items():
        path = Path("/proc/sys/net/ipv4", name)
        if os.access(path, os.W_OK):
            path.write_text(value)


def _transmitted_bytes(device: str) -> int:
    # /sys/class/net shows the namespace it was mounted in; /proc shows the reader's.
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == device:
            return int(counters.split()[8])
    raise NetworkError(f"this process is in no rank's namespace: it has no interface {device!r}")
