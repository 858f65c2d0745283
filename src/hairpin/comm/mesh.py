"""The mesh: named axes of ranks, live over torch.distributed or only a description for planning."""

import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hairpin.errors import CommError, MeshError

DEFAULT_TIMEOUT_S = 300.0


@dataclass
class Traffic:
    """What this rank has sent: payload bytes, messages to single peers, collectives begun.

    ``control_bytes`` are those that check agreement between ranks; the other counts leave them out.
    """

    bytes_sent: int = 0
    messages: int = 0
    collectives: int = 0
    control_bytes: int = 0

    def snapshot(self) -> "Traffic":
        """A copy that later transfers do not change."""
        return replace(self)

    def since(self, earlier: "Traffic") -> "Traffic":
        """What was sent after ``earlier`` was taken."""
        return Traffic(
            self.bytes_sent - earlier.bytes_sent,
            self.messages - earlier.messages,
            self.collectives - earlier.collectives,
            self.control_bytes - earlier.control_bytes,
        )


@dataclass
class Transfer:
    """One exchange of this rank, in the clock of ``time.time_ns``.

    Attributes:
        what: words for what is moved.
        sent_bytes: by this rank.
        control: it checks agreement between ranks.
        awaited_ns: when its result was asked for; done_ns: when it was there; None if never.
    """

    what: str
    axis: str
    sent_bytes: int
    control: bool
    started_ns: int
    awaited_ns: int | None = None
    done_ns: int | None = None


InFlight = dict[int, tuple[Sequence[dist.Work], object]]


class Ticket:
    """Stands for one started transfer, for as long as somebody may await it."""

    def __init__(self, key: int, in_flight: InFlight) -> None:
        self.key = key
        self._in_flight = in_flight

    def release(self) -> None:
        """The transfer is done."""
        self._in_flight.pop(self.key, None)


def _abandon(key: int, in_flight: InFlight, abandoned: list[int]) -> None:
    if key in in_flight:
        abandoned.append(key)


@dataclass(frozen=True, eq=False)
class _Live:
    """The running side of a mesh: torch's mesh, deadline, counters, and transfers under way.

    Gloo gives up a message whose handle is dropped, and every later one with it; so transfers that
    nobody awaits are kept here until they are done.
    """

    device_mesh: DeviceMesh
    timeout_s: float
    traffic: Traffic = field(default_factory=Traffic)
    watchers: list[list[Transfer]] = field(default_factory=list)
    in_flight: InFlight = field(default_factory=dict)
    abandoned: list[int] = field(default_factory=list)


class Mesh:
    """Named axes of ranks, outermost first: ``Mesh(dp=2, sp=4)`` describes eight ranks.

    Built like this it is a description, enough for planning on one process. :func:`init_mesh`
    gives a live one. Deep copies share the live part; a pickled mesh comes back as a description,
    because process groups do not travel.

    Raises:
        MeshError: no axis, or a degree that is not a whole number above 0.
    """

    def __init__(self, **degrees: int) -> None:
        _check_degrees(degrees)
        self._degrees = dict(degrees)
        self._live: _Live | None = None
        self._idle = Traffic()
        self._keys = count()

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, outermost first."""
        return tuple(self._degrees)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(self._degrees.values())

    @property
    def is_live(self) -> bool:
        """Whether ranks can talk over this mesh; a mesh of one rank always can."""
        return self._live is not None or self.world == 1

    @property
    def is_rehearsal(self) -> bool:
        """Whether transfers are counted and not made."""
        return False

    @property
    def device_mesh(self) -> DeviceMesh:
        """torch's own mesh with the same axes, for FSDP2, tensor parallel and checkpoints."""
        return self._running().device_mesh

    @property
    def global_rank(self) -> int:
        """This process's rank in the whole mesh; 0 for a description."""
        return self._live.device_mesh.get_rank() if self._live else 0

    @property
    def timeout_s(self) -> float:
        """Seconds that a transfer may take before it is an error."""
        return self._live.timeout_s if self._live else DEFAULT_TIMEOUT_S

    @property
    def traffic(self) -> Traffic:
        """Counters of what this rank has sent over this mesh."""
        return self._live.traffic if self._live else self._idle

    @contextmanager
    def watched(self) -> Iterator[list[Transfer]]:
        """The transfers that this rank starts while the block lasts, noted as they happen."""
        found: list[Transfer] = []
        watchers = self._live.watchers if self._live else []
        watchers.append(found)
        try:
            yield found
        finally:
            watchers.pop()

    def note_transfer(self, what: str, axis: str, sent_bytes: int, *, control: bool) -> Transfer:
        """Tell whoever watches that an exchange is started."""
        transfer = Transfer(what, axis, sent_bytes, control, time.time_ns())
        for found in self._running().watchers:
            found.append(transfer)
        return transfer

    def keep(self, works: Sequence[dist.Work], buffers: object) -> "Ticket":
        """Hold a started transfer until it is awaited, or found abandoned by :meth:`sweep`."""
        live = self._running()
        ticket = Ticket(next(self._keys), live.in_flight)
        live.in_flight[ticket.key] = (works, buffers)
        weakref.finalize(ticket, _abandon, ticket.key, live.in_flight, live.abandoned)
        return ticket

    def sweep(self) -> None:
        """Let abandoned transfers end: every peer has started them too, earlier than this."""
        live = self._running()
        while live.abandoned:
            works, _ = live.in_flight.pop(live.abandoned.pop())
            for work in works:
                work.wait(timedelta(seconds=live.timeout_s))

    def size(self, axis: str) -> int:
        """Degree of ``axis``.

        Raises:
            MeshError: no such axis.
        """
        if axis not in self._degrees:
            raise MeshError(
                f"{self} has no axis {axis!r}; name one of {', '.join(self.axes)} or add "
                f"{axis}=1 to init_mesh"
            )
        return self._degrees[axis]

    def rank(self, axis: str) -> int:
        """This rank's place along ``axis``; 0 for a description."""
        degree = self.size(axis)
        return self._live.device_mesh.get_local_rank(axis) if self._live and degree > 1 else 0

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Process group of the ranks along ``axis``; None where the degree is 1."""
        return None if self.size(axis) == 1 else self._running().device_mesh.get_group(axis)

    def coordinates(self, axes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
        """(rank, degree) on each of ``axes``."""
        return {axis: (self.rank(axis), self.size(axis)) for axis in axes}

    def _running(self) -> _Live:
        if self._live is None:
            raise MeshError(
                f"{self} is only a description; make a live mesh with hp.init_mesh("
                f"{', '.join(f'{a}={n}' for a, n in self._degrees.items())}) in {self.world} ranks"
            )
        return self._live

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{a}={n}' for a, n in self._degrees.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and [*self._degrees.items()] == [*other._degrees.items()]

    def __hash__(self) -> int:
        return hash(tuple(self._degrees.items()))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        return self

    def __reduce__(self) -> tuple[object, tuple[dict[str, int]]]:
        return _describe, (self._degrees,)


def init_mesh(
    *, timeout_s: float = DEFAULT_TIMEOUT_S, device_type: str | None = None, **degrees: int
) -> Mesh:
    """A live mesh over the ranks that torchrun or :func:`hairpin.run.launch` started.

    Sets up torch.distributed if nobody has: Gloo for CPU tensors and, where there are GPUs, NCCL
    for CUDA tensors. A mesh of one rank needs no process group.

    Args:
        timeout_s: seconds any transfer may take before it is an error.
        device_type: ``"cpu"`` or ``"cuda"``; the default is CUDA where there is a GPU per rank.
        degrees: axes, outermost first, such as ``dp=1, sp=4``.

    Raises:
        MeshError: the degrees do not multiply to the number of ranks.
        CommError: a rank did not join in time.
    """
    mesh = Mesh(**degrees)
    world = _world_size()
    if mesh.world != world:
        raise MeshError(
            f"{mesh} needs {mesh.world} ranks but there are {world}; choose degrees whose product "
            f"is {world}, or start {mesh.world} ranks (torchrun --nproc-per-node {mesh.world})"
        )
    if world == 1:
        return mesh
    device_type = device_type or _device_type()
    ranks = torch.arange(world).view(tuple(degrees.values()))
    try:
        if not dist.is_initialized():
            _init_process_group(device_type, timeout_s)
        device_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=tuple(degrees))
        dist.barrier()  # nobody goes on, or fails and leaves, before all have joined
    except RuntimeError as error:
        raise CommError(
            f"the {world} ranks of {mesh} did not all join within {timeout_s:g} s "
            f"({str(error).strip().splitlines()[0]}); start every rank with the same MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE, or raise timeout_s"
        ) from error
    mesh._live = _Live(device_mesh, timeout_s)
    return mesh


def as_mesh(mesh: Mesh | DeviceMesh) -> Mesh:
    """Our mesh of a torch ``DeviceMesh``; ours is returned as it is.

    Raises:
        MeshError: the torch mesh has no axis names.
    """
    if isinstance(mesh, Mesh):
        return mesh
    known: Mesh | None = getattr(mesh, "_hairpin_mesh", None)
    if known is not None:
        return known
    names = mesh.mesh_dim_names
    if names is None:
        raise MeshError(
            "this torch DeviceMesh has no axis names; build it with "
            "init_device_mesh(..., mesh_dim_names=('dp', 'sp'))"
        )
    ours = Mesh(**dict(zip(names, mesh.mesh.shape, strict=True)))
    ours._live = _Live(mesh, DEFAULT_TIMEOUT_S)
    mesh._hairpin_mesh = ours  # type: ignore[attr-defined]  # its counters must outlive this call
    return ours


def _check_degrees(degrees: Mapping[str, int]) -> None:
    if not degrees:
        raise MeshError("a mesh needs at least one axis, for example sp=4")
    for axis, degree in degrees.items():
        if type(degree) is not int or degree < 1:
            raise MeshError(
                f"mesh axis {axis!r} has degree {degree!r}; a degree is a whole number, 1 or more"
            )


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_ranks() -> int:
    """Ranks that were started on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _device_type() -> str:
    return "cuda" if 0 < local_ranks() <= torch.cuda.device_count() else "cpu"


def _init_process_group(device_type: str, timeout_s: float) -> None:
    backend = "gloo"
    if device_type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def _describe(degrees: dict[str, int]) -> Mesh:
    return Mesh(**degrees)
