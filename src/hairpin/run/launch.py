"""Starting ranks on this machine, and seeing that none is left behind.

Ranks are forked from a parent that has already imported everything, so four of them start in a few
tenths of a second. The parent must not have run a backward or a CUDA kernel before: their threads
do not survive a fork. ``start="spawn"`` starts fresh interpreters instead, which takes seconds.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from hairpin.errors import CommError, HairpinError, MeshError, RankFailed

GRACE_S = 5.0
_TERMINATE_S = 2.0
_STORE_TIMEOUT = timedelta(seconds=60)
_PR_SET_PDEATHSIG = 1

Start = Literal["fork", "spawn"]


class RankFailure(RankFailed):
    """What :func:`launch` raises: the rank that failed first, how, and its traceback.

    Attributes:
        rank: the rank.
        exit_code: its exit code; None where a signal ended it or it did not end in time.
        signal: the number of the signal that ended it, or None.
        traceback: its traceback as text; empty where it had no time to give one.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        exit_code: int | None = None,
        signal: int | None = None,
        traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
        self.signal = signal
        self.traceback = traceback


def launched() -> bool:
    """Whether torchrun or :func:`launch` started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def warm(*names: str) -> None:
    """Import what every rank would at its first step, once, before they are forked.

    Planning and measuring use torch's symbolic machinery, which takes seconds to import.

    Args:
        names: further modules that the ranks will need.
    """
    for name in ("torch._dynamo", "torch.distributed.checkpoint.state_dict", *names):
        import_module(name)


def launch(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    threads: int = 1,
    timeout_s: float | None = None,
    grace_s: float = GRACE_S,
    start: Start = "fork",
    **kwargs: Any,
) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` in ``ranks`` new processes on this machine.

    Each finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as
    under torchrun, so that :func:`hairpin.init_mesh` joins them. When one fails, the others get
    ``grace_s`` seconds to raise their own errors; then they are ended. No rank outlives this call,
    nor, on Linux, this process.

    Args:
        fn: importable by name where ``start="spawn"``; anything callable under fork.
        threads: threads that torch may use in each rank.
        timeout_s: seconds until all ranks must have returned; None to wait for ever.

    Returns:
        what each rank returned, by rank; it has to be picklable.

    Raises:
        RankFailure: a rank raised an error, was killed or was not done in time. Its ``__cause__``
            is the rank's own error where that could be pickled.
        MeshError: ``ranks`` is less than 1.
    """
    if ranks < 1:
        raise MeshError(f"got ranks={ranks}; start at least 1")
    importlib.import_module("hairpin.comm.verbs")  # once here, not in every rank
    work = _Work(fn, args, kwargs, ranks=ranks, threads=threads, parent=os.getpid())
    children = _start(work, start)
    store = None
    try:
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        for child in children:
            child.send_port(store.port)
        _collect(children, timeout_s=timeout_s, grace_s=grace_s)
    finally:
        _end(children)
        del store
    _raise_first_failure(children, timeout_s)
    return [child.outcome.value for child in children if child.outcome]


@dataclass(frozen=True)
class _Work:
    """What a rank is to do."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ranks: int
    threads: int
    parent: int


@dataclass
class _Outcome:
    """What a rank sent back: its result, or its error as text and, if it can be, as an object."""

    value: Any = None
    error: BaseException | None = None
    summary: str = ""
    traceback: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.summary)


@dataclass(eq=False)
class _Child:
    """A rank as its parent sees it."""

    rank: int
    process: BaseProcess
    connection: Connection
    outcome: _Outcome | None = None
    ended: bool = False
    stopped_by_us: bool = False
    order: int = field(default=-1)

    def send_port(self, port: int) -> None:
        with contextlib.suppress(OSError):  # it died at once: collecting will say so
            self.connection.send(port)

    def receive(self) -> None:
        """Take what the rank has sent, or note that it has ended."""
        try:
            self.outcome = cast(_Outcome, pickle.loads(self.connection.recv_bytes()))  # noqa: S301  # from our own child
        except (EOFError, OSError):
            self.ended = True
            self.process.join()

    @property
    def failed(self) -> bool:
        return self.outcome.failed if self.outcome else self.ended

    @property
    def signal(self) -> int | None:
        code = self.process.exitcode
        return -code if code is not None and code < 0 else None


def _start(work: _Work, start: Start) -> list[_Child]:
    context = multiprocessing.get_context(start)
    sys.stdout.flush()
    sys.stderr.flush()
    children: list[_Child] = []
    try:
        for rank in range(work.ranks):
            ours, theirs = context.Pipe()
            inherited = [child.connection for child in children] + [ours]
            process = context.Process(  # type: ignore[attr-defined]  # every context has one
                target=_rank_main,
                args=(work, rank, theirs, inherited if start == "fork" else []),
                name=f"hairpin-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            children.append(_Child(rank, process, ours))
    except BaseException:
        _end(children)
        raise
    return children


def _rank_main(
    work: _Work, rank: int, connection: Connection, inherited: Sequence[Connection]
) -> None:
    """One rank: set up, run, send the outcome, end."""
    for other in inherited:
        other.close()
    _die_with(work.parent)
    multiprocessing.current_process().daemon = False  # it may have processes of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the parent, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    try:
        port = connection.recv()
    except EOFError:
        os._exit(1)
    _set_environment(rank, work.ranks, port)
    torch.set_num_threads(work.threads)
    outcome = _run(work)
    with contextlib.suppress(OSError):  # the parent has gone: nobody is left to tell
        connection.send_bytes(_pickled(outcome))
    if not outcome.failed and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if outcome.failed else 0)  # no destructors: they may wait for ranks that are gone


def _run(work: _Work) -> _Outcome:
    try:
        return _Outcome(value=work.fn(*work.args, **work.kwargs))
    except BaseException as error:  # noqa: BLE001  # all of it is handed to the parent
        text = traceback.format_exc()
        return _Outcome(error=error, summary=f"{type(error).__name__}: {error}", traceback=text)


def _pickled(outcome: _Outcome) -> bytes:
    """The outcome as bytes; an error that cannot be pickled, or read back, travels as text."""
    try:
        data = pickle.dumps(outcome)
        if outcome.failed:
            pickle.loads(data)  # noqa: S301  # our own
    except Exception as problem:  # noqa: BLE001  # pickling may raise anything
        if outcome.failed:
            return pickle.dumps(_Outcome(summary=outcome.summary, traceback=outcome.traceback))
        words = f"the rank's result cannot be pickled: {type(problem).__name__}: {problem}"
        return pickle.dumps(_Outcome(summary=words))
    return data


def _die_with(parent: int) -> None:
    """On Linux: be killed when the parent dies, however it dies."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _set_environment(rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent hosts the store, as torchrun does
    )
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # a host name that resolves to nothing would stop Gloo
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _collect(children: list[_Child], *, timeout_s: float | None, grace_s: float) -> None:
    """Wait for all outcomes; after a first failure or the timeout, only a little longer."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    seen_failure = False
    count = 0
    while pending := [c for c in children if c.outcome is None and not c.ended]:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([child.connection for child in pending], timeout=left_s)
        if not ready:
            if not seen_failure:
                _dump_stacks(pending)
            return
        for child in pending:
            if child.connection in ready:
                child.receive()
                child.order, count = count, count + 1
                if child.failed and not seen_failure:
                    seen_failure = True
                    end = time.monotonic() + grace_s
                    deadline = end if deadline is None else min(deadline, end)


def _dump_stacks(pending: list[_Child]) -> None:
    """Have ranks that hang write their stacks to stderr."""
    for child in pending:
        if child.process.pid is not None:
            os.kill(child.process.pid, signal.SIGUSR1)
    time.sleep(0.3)


def _end(children: list[_Child]) -> None:
    """Leave no rank behind: the done ones may exit, the others are terminated, then killed."""
    for child in children:
        if child.outcome is None and not child.ended:
            child.stopped_by_us = True
            child.process.terminate()
    deadline = time.monotonic() + _TERMINATE_S
    for child in children:
        child.process.join(max(0.0, deadline - time.monotonic()))
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.connection.close()


def _raise_first_failure(children: list[_Child], timeout_s: float | None) -> None:
    failed = [child for child in children if child.failed or child.stopped_by_us]
    if not failed:
        return
    first = min(failed, key=_blame)
    others = [f"  rank {c.rank} {_how(c, timeout_s)}" for c in failed if c is not first]
    text = first.outcome.traceback if first.outcome else ""
    message = f"rank {first.rank} of {len(children)} {_how(first, timeout_s)}"
    if others:
        message += "\nalso:\n" + "\n".join(others)
    if text:
        message += f"\ntraceback of rank {first.rank}:\n{text.rstrip()}"
    raise RankFailure(
        message,
        rank=first.rank,
        exit_code=None if first.signal else first.process.exitcode,
        signal=None if first.stopped_by_us else first.signal,
        traceback=text,
    ) from (first.outcome.error if first.outcome else None)


def _blame(child: _Child) -> tuple[int, int]:
    """Sorts causes before effects: death by a signal, own errors, lost peers, those we stopped."""
    if child.stopped_by_us:
        return 3, child.rank
    if child.outcome is None:
        return 0, child.order
    lost_peer = isinstance(child.outcome.error, CommError | dist.DistError)
    return (2 if lost_peer else 1), child.order


def _how(child: _Child, timeout_s: float | None) -> str:
    if child.stopped_by_us:
        limit = "" if timeout_s is None else f" within {timeout_s:g} s"
        return f"was not done{limit} and was stopped"
    if child.outcome:
        return f"failed: {child.outcome.summary.splitlines()[0]}"
    if child.signal:
        return f"was killed by {signal.Signals(child.signal).name}"
    return f"ended with exit code {child.process.exitcode} and no result"


def user_error(error: RankFailed) -> HairpinError:
    """The error to show a person: the rank's own where Hairpin raised it on purpose."""
    return error.__cause__ if isinstance(error.__cause__, HairpinError) else error
