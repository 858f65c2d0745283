"""What the links along a mesh axis and the attention on its ranks cost: latencies and speeds.

Ranks stand on hosts. Links inside a host are one tier, links between hosts the other; where all
links are alike there is one host. Everything is a straight line, time = start + amount / speed.
"""

import math
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F
from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.transport import Link
from hairpin.errors import MeshError

VERSION = 1

_PROBE_BYTES = 1 << 16
_LEAST_BYTES, _MOST_BYTES = 1 << 18, 1 << 22  # of one timed message
_PAIRS_S = 2.0  # for the swaps of all pairs together
_SWAP_S = 0.25  # for one swap of what is fitted
_PINGS, _REPEATS = 8, 4
_GAP = 2.0  # links of one tier differ by less
_SHARED = 1.5  # ranks of a host that send at once take so much longer on one link
_ATTEND_S = 0.06  # for one length of attention
_COPY_BYTES = 1 << 22

Message = tuple[int, int, int]  # from, to, bytes


def _require_number(name: str, value: float, *, least: float | None = None) -> None:
    if math.isnan(value) or (value <= 0 if least is None else value < least):
        bound = "above 0" if least is None else f"{least:g} or more"
        raise MeshError(f"topology: {name}={value!r}; give a number {bound}")


@dataclass(frozen=True)
class Tier:
    """Links of one kind.

    Attributes:
        latency_s: what one message takes, however small.
        bytes_per_s: what goes over a link in a second, each way.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _require_number("latency_s", self.latency_s, least=0.0)
        _require_number("bytes_per_s", self.bytes_per_s)

    def time_s(self, sent_bytes: float, messages: int = 1) -> float:
        """Seconds that so many bytes in so many messages take; nothing takes none."""
        return messages * self.latency_s + sent_bytes / self.bytes_per_s if sent_bytes else 0.0


@dataclass(frozen=True)
class Work:
    """Arithmetic of one kind.

    Attributes:
        overhead_s: what one call takes, however small.
        flops_per_s: operations in a second.
    """

    overhead_s: float
    flops_per_s: float

    def __post_init__(self) -> None:
        _require_number("overhead_s", self.overhead_s, least=0.0)
        _require_number("flops_per_s", self.flops_per_s)

    def time_s(self, flops: float, calls: int = 1) -> float:
        """Seconds that so many operations in so many calls take; nothing takes none."""
        return calls * self.overhead_s + flops / self.flops_per_s if flops else 0.0


@dataclass(frozen=True)
class Topology:
    """The ranks along one mesh axis: where they stand, and what links and attention cost.

    The defaults of the arithmetic are of the order of one data-centre GPU.

    Attributes:
        host_of: the host of each rank, hosts numbered from 0.
        inner: links inside a host: each rank's own.
        outer: links between hosts.
        shared_outer: ranks of a host share one outer link; else each has its own.
        forward: one call of an attention kernel.
        backward: one call of its backward.
        copy_bytes_per_s: copying in a rank's memory.

    Raises:
        MeshError: no ranks, hosts not numbered from 0, or a speed that is none.
    """

    host_of: tuple[int, ...]
    inner: Tier
    outer: Tier
    shared_outer: bool = False
    forward: Work = Work(2e-5, 200e12)
    backward: Work = Work(4e-5, 150e12)
    copy_bytes_per_s: float = 1e12

    def __post_init__(self) -> None:
        object.__setattr__(self, "host_of", tuple(self.host_of))
        if not self.host_of or set(self.host_of) != set(range(max(self.host_of) + 1)):
            raise MeshError(
                f"topology: host_of={self.host_of}; give the host of every rank, hosts numbered "
                "from 0 without gaps, for example (0, 0, 1, 1)"
            )
        _require_number("copy_bytes_per_s", self.copy_bytes_per_s)

    @classmethod
    def flat(cls, ranks: int, link: Tier, **rest: Any) -> Self:
        """All links alike: every rank has one, to all others."""
        return cls((0,) * ranks, link, link, **rest)

    @classmethod
    def two_tier(cls, hosts: int, ranks: int, inner: Tier, outer: Tier, **rest: Any) -> Self:
        """``hosts`` hosts with ``ranks`` neighbouring ranks each."""
        return cls(tuple(rank // ranks for rank in range(hosts * ranks)), inner, outer, **rest)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.host_of)

    @property
    def hosts(self) -> int:
        """How many hosts they stand on."""
        return max(self.host_of) + 1

    @property
    def ranks_per_host(self) -> int | None:
        """Ranks on every host, where neighbours stand together and all hosts have as many."""
        each = self.ranks // self.hosts
        regular = tuple(rank // each for rank in range(self.hosts * each))
        return each if self.host_of == regular else None

    def transfer_s(self, messages: Iterable[Message]) -> float:
        """Seconds that messages started together take: the busiest link's.

        A link carries both ways at once; the two tiers work at once.

        Args:
            messages: (from, to, bytes), each between two ranks.
        """
        table = np.array([m for m in messages if m[2] and m[0] != m[1]], dtype=np.int64)
        if not len(table):
            return 0.0
        host = np.array(self.host_of)
        crosses = host[table[:, 0]] != host[table[:, 1]]
        inside = _busiest(self.inner, table[~crosses], np.arange(self.ranks))
        ends = host if self.shared_outer else np.arange(self.ranks)
        return max(inside, _busiest(self.outer, table[crosses], ends))

    @classmethod
    def measure(
        cls,
        mesh: Mesh,
        axis: str,
        *,
        heads: int = 8,
        head_dim: int = 64,
        lengths: Sequence[int] = (128, 256, 512),
        device: torch.device | str = "cpu",
    ) -> Self:
        """Fit everything to what the ranks of ``axis`` measure together, in a few seconds.

        All ranks of the axis must call it. They measure with the transport that attention uses,
        tell each other all figures, and come to the same result. Hosts are found by the times of
        swaps between all pairs. Attention is timed while all ranks compute.

        Args:
            heads: of the attention that is timed, which is float32.
            head_dim: channels of each.
            lengths: of the sequence that is timed, at least two.

        Raises:
            MeshError: the mesh is only a description, or there are fewer than two lengths.
            CommError: a rank is gone or did not answer.
        """
        if len(set(lengths)) < 2:
            raise MeshError(f"topology: lengths={tuple(lengths)}; give two or more to fit a line")
        survey = _Survey(mesh, axis, torch.device(device))
        host_of, inner, outer, shared = survey.links()
        forward, backward = survey.attention(heads, head_dim, lengths)
        return cls(host_of, inner, outer, shared, forward, backward, survey.copies())

    def to_toml(self) -> str:
        """The topology as TOML text."""
        return tomli_w.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a topology back.

        Raises:
            MeshError: not TOML, another version, or a missing, surplus or impossible field.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MeshError(f"this is not a topology: not valid TOML ({error})") from error
        version = data.pop("version", None)
        if version != VERSION:
            raise MeshError(
                f"topology has version {version!r}, this Hairpin reads version {VERSION}; measure "
                "it again with Topology.measure"
            )
        try:
            data |= {name: Tier(**data[name]) for name in ("inner", "outer")}
            data |= {name: Work(**data[name]) for name in ("forward", "backward")}
            return cls(**data)
        except (TypeError, KeyError) as error:
            raise MeshError(
                f"this is not a whole topology: {error}; measure it again with Topology.measure"
            ) from error


def _busiest(tier: Tier, table: "np.ndarray[Any, Any]", end_of: "np.ndarray[Any, Any]") -> float:
    """The longest that any end of the tier's links sends or receives."""
    if not len(table):
        return 0.0
    ends = int(end_of.max()) + 1
    ranks = len(end_of)
    times = []
    for column in (0, 1):
        load = np.bincount(end_of[table[:, column]], weights=table[:, 2], minlength=ends)
        messages = np.bincount(table[:, column], minlength=ranks)
        times.append(float(load.max()) / tier.bytes_per_s + int(messages.max()) * tier.latency_s)
    return max(times)


# ------------------------------------------------------------------------------------- measuring


class _Survey:
    """The measurements of one rank, in step with all others of the axis."""

    def __init__(self, mesh: Mesh, axis: str, device: torch.device) -> None:
        self.link = Link(mesh, axis)
        self.ranks, self.rank = self.link.size, self.link.rank
        self.device = device

    def links(self) -> tuple[tuple[int, ...], Tier, Tier, bool]:
        """Hosts, the two tiers, and whether the outer one is shared."""
        if self.ranks == 1:
            alone = Tier(0.0, math.inf)
            return (0,), alone, alone, False
        ping_s, swap_s, swap_bytes = self._pairs()
        host_of = find_hosts(swap_s)
        scale = _SWAP_S / float(swap_s.max())
        nbytes = _clamp(scale * swap_bytes, _LEAST_BYTES, 4 * _MOST_BYTES)
        host = np.array(host_of)
        same = host[:, None] == host[None, :]
        pairs = ~np.eye(self.ranks, dtype=bool)
        latency_s = float(np.median(ping_s[same & pairs])) if (same & pairs).any() else 0.0
        neighbours = _rings(
            [[r for r in range(self.ranks) if host_of[r] == h] for h in set(host_of)]
        )
        inner = self._tier(latency_s, self._ring_s(neighbours, nbytes), nbytes)
        if same.all():
            return host_of, inner, inner, False
        latency_s = float(np.median(ping_s[~same]))
        columns = list(_columns(host_of))
        one_s = self._ring_s(_rings(columns[:1]), nbytes)
        all_s = self._ring_s(_rings(columns), nbytes)
        shared = len(columns) > 1 and all_s > _SHARED * one_s
        full = sum(len(column) == len(columns[0]) for column in columns)  # that all hosts are in
        outer = self._tier(latency_s, all_s, nbytes * (full if shared else 1))
        return host_of, inner, outer, shared

    def attention(self, heads: int, head_dim: int, lengths: Sequence[int]) -> tuple[Work, Work]:
        """One call of attention and of its backward."""
        rows = []
        for length in lengths:
            shape = (1, heads, length, head_dim)
            q, k, v = (torch.randn(shape, device=self.device).requires_grad_() for _ in range(3))

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            out = forward()
            cotangent = torch.randn_like(out)

            def backward(out: Tensor = out, cotangent: Tensor = cotangent) -> None:
                out.backward(cotangent, retain_graph=True)

            rows.append([self._mean_s(forward), self._mean_s(backward)])
        times_s = np.median(self._tell(np.array(rows)), axis=0)
        products = np.array([2 * length**2 * heads * head_dim for length in lengths])
        return (
            _fit_work(2 * products, times_s[:, 0]),  # scores, output
            _fit_work(5 * products, times_s[:, 1]),  # scores again, and four gradients
        )

    def copies(self) -> float:
        """Bytes copied in a second."""
        x = torch.ones(_COPY_BYTES // 4, device=self.device)
        into = torch.empty_like(x)
        mean_s = self._mean_s(lambda: into.copy_(x))
        return _COPY_BYTES / float(np.median(self._tell(np.array([mean_s]))))

    def _pairs(self) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]:
        """Times of pings and of swaps between all pairs, and the bytes of a swap, one way."""
        ping_s, probe_s = np.zeros(self.ranks), np.zeros(self.ranks)
        for peer in self._meetings():
            ping_s[peer] = self._least_s(peer, 8, _PINGS)
            probe_s[peer] = self._least_s(peer, _PROBE_BYTES, 2)
        ping, probe = self._tell(ping_s), self._tell(probe_s)
        each_s = _PAIRS_S / (self.ranks * _REPEATS)
        typical_s = float(np.median(np.maximum(probe, probe.T)[~np.eye(self.ranks, dtype=bool)]))
        nbytes = _clamp(_PROBE_BYTES * each_s / typical_s, _LEAST_BYTES, _MOST_BYTES)
        swap_s = np.zeros(self.ranks)
        for peer in self._meetings():
            swap_s[peer] = self._least_s(peer, nbytes, _REPEATS)
        swap = self._tell(swap_s)
        return np.maximum(ping, ping.T), np.maximum(swap, swap.T), nbytes

    def _meetings(self) -> Iterator[int]:
        """This rank's peers, one a round, so that all pairs of a round meet at once."""
        for pairs in meetings(self.ranks):
            self._barrier()
            for a, b in pairs:
                if self.rank in (a, b):
                    yield b if self.rank == a else a

    def _least_s(self, peer: int, nbytes: int, repeats: int) -> float:
        """Least time of a swap with one peer."""
        sends, receives = ([torch.empty(0, dtype=torch.uint8)] * self.ranks for _ in range(2))
        sends[peer] = torch.zeros(nbytes, dtype=torch.uint8)
        receives[peer] = torch.empty(nbytes, dtype=torch.uint8)
        return min(self._timed(sends, receives) for _ in range(repeats))

    def _ring_s(self, next_of: dict[int, int], nbytes: int) -> float:
        """Least time in which every rank of some rings has sent to its next one."""
        sends, receives = ([torch.empty(0, dtype=torch.uint8)] * self.ranks for _ in range(2))
        before = {after: rank for rank, after in next_of.items()}
        if self.rank in next_of:
            sends[next_of[self.rank]] = torch.zeros(nbytes, dtype=torch.uint8)
            receives[before[self.rank]] = torch.empty(nbytes, dtype=torch.uint8)
        times_s = []
        for _ in range(_REPEATS):
            self._barrier()
            times_s.append(self._timed(sends, receives) if self.rank in next_of else 0.0)
        return float(self._tell(np.array(times_s)).max(0).min())

    def _timed(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> float:
        start_s = time.perf_counter()
        self.link.exchange(sends, receives, what="measuring links", control=True)()
        return time.perf_counter() - start_s

    def _tier(self, latency_s: float, time_s: float, nbytes: float) -> Tier:
        return Tier(latency_s, math.inf if not time_s else nbytes / max(time_s - latency_s, 1e-9))

    def _mean_s(self, run: Callable[[], object]) -> float:
        """Mean time of a call among many: the machine may be shared by ranks."""
        run()
        self._barrier()
        self._settle()
        start_s, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - start_s < _ATTEND_S:
            run()
            calls += 1
            self._settle()
        return (time.perf_counter() - start_s) / calls

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _barrier(self) -> None:
        self._tell(np.zeros(1))

    def _tell(self, mine: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """The figures of all ranks ``[rank, ...]``, float64, the same on every rank."""
        figures = torch.from_numpy(np.array(mine, dtype=np.float64))
        everyone = [torch.empty_like(figures) for _ in range(self.ranks)]
        everyone[self.rank].copy_(figures)
        if self.ranks > 1:
            what = "telling what was measured"
            self.link.exchange([figures] * self.ranks, everyone, what=what, control=True)()
        return torch.stack(everyone).numpy()


def meetings(ranks: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every rank meets at most one other, until all have met all."""
    seats = [*range(ranks)] + [-1] * (ranks % 2)
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if -1 not in p])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def find_hosts(time_s: "np.ndarray[Any, Any]") -> tuple[int, ...]:
    """The host of each rank, from times ``[rank, rank]`` between all pairs.

    The times are cut in two at a wide gap, where the fast links join groups of ranks each to each:
    one that makes hosts of as many ranks each if there is one, and then the widest. Without such a
    gap there is one host.
    """
    ranks = len(time_s)
    times = np.sort(time_s[np.triu_indices(ranks, 1)])
    best, best_rank = (0,) * ranks, (False, _GAP)
    for below, above in pairwise(times.tolist()):
        gap = above / max(below, 1e-12)
        host_of = _groups(time_s <= below) if gap >= _GAP else None
        if host_of is None:
            continue
        sizes = np.bincount(host_of)
        rank = (bool((sizes == sizes[0]).all()), float(gap))
        if rank > best_rank:
            best, best_rank = host_of, rank
    return best


def _groups(near: "np.ndarray[Any, Any]") -> tuple[int, ...] | None:
    """Groups of ranks that are all near each other and nobody else; None if there are none such."""
    near = near | np.eye(len(near), dtype=bool)
    hosts: dict[tuple[bool, ...], int] = {}
    host_of = tuple(hosts.setdefault(tuple(row), len(hosts)) for row in near.tolist())
    whole = np.array(host_of)[:, None] == np.array(host_of)[None, :]
    return host_of if bool((whole == near).all()) else None


def _columns(host_of: Sequence[int]) -> Iterator[list[int]]:
    """The first rank of every host, then the second of every host that has two, and so on."""
    members = [[r for r, h in enumerate(host_of) if h == host] for host in sorted(set(host_of))]
    for index in range(max(len(ranks) for ranks in members)):
        column = [ranks[index] for ranks in members if index < len(ranks)]
        if len(column) > 1:
            yield column


def _rings(groups: Iterable[Sequence[int]]) -> dict[int, int]:
    """The next rank of each, around each group of two or more."""
    return {
        rank: group[(index + 1) % len(group)]
        for group in groups
        if len(group) > 1
        for index, rank in enumerate(group)
    }


def _fit_work(flops: "np.ndarray[Any, Any]", times_s: "np.ndarray[Any, Any]") -> Work:
    """The line through the times, by least squares of relative errors, not below zero."""
    weights = 1 / times_s
    design = np.stack([weights, flops * weights], axis=1)
    (overhead_s, per_flop_s), *_ = np.linalg.lstsq(design, np.ones(len(flops)), rcond=None)
    if overhead_s < 0 or per_flop_s <= 0:
        return Work(0.0, 1 / median((times_s / flops).tolist()))
    return Work(float(overhead_s), float(1 / per_flop_s))


def _clamp(value: float, least: int, most: int) -> int:
    return int(min(max(value, least), most))
