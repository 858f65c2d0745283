"""What goes over the wire, to the byte; what happens when a peer is gone; what is left behind."""

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hairpin as hp
from comm.cases import line, part_of, places, uniform
from hairpin.comm.agree import require_agreement
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import CommError
from hairpin.layout import Layout
from hairpin.run.launch import RankFailure, launch
from marks import slow

# Bytes and counts


def split_sizes(length: int, parts: int) -> list[int]:
    """The reference: torch's own balanced split."""
    return [len(part) for part in torch.arange(length).tensor_split(parts)]


SHAPES = [(17, 65), (1, 64), (5, 1), (0, 7), (1, 1), (16, 64), (3, 4)]
REST = 3


def verbs(src: Layout, dst: Layout, mesh: Mesh) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "scatter": lambda x: hp.scatter(x, src, mesh),
        "switch": lambda x: hp.switch(x, src, dst, mesh),
        "switch, started early": lambda x: hp.switch(x, src, dst, mesh, wait=False).wait(),
        "gather replicated": lambda x: hp.gather(x, src, mesh, grad="replicated"),
        "gather partial": lambda x: hp.gather(x, src, mesh, grad="partial"),
        "reduce_scatter": lambda x: hp.reduce_scatter(x, src, mesh),
    }


def counted() -> list[dict[str, tuple[int, int, int, int]]]:
    """(bytes, messages, collectives, control bytes) of each verb, forward and backward."""
    mesh, found = line(), []
    for t, s in SHAPES:
        sizes = {"t": t, "s": s, "c": REST}
        src, dst = Layout.of("t/sp s c", sizes), Layout.of("t s/sp c", sizes)
        whole = uniform(t, s, REST).to(torch.float32)
        row = {}
        for name, verb in verbs(src, dst, mesh).items():
            is_part = name.startswith(("switch", "gather"))
            x = part_of(whole, src, places(mesh)) if is_part else whole
            x = x.clone().requires_grad_()
            begun = mesh.traffic.snapshot()
            y = verb(x)
            middle = mesh.traffic.snapshot()
            y.sum().backward()
            for way, sent in (("", middle.since(begun)), (" back", mesh.traffic.since(middle))):
                counts = (sent.bytes_sent, sent.messages, sent.collectives, sent.control_bytes)
                row[name + way] = counts
        found.append(row)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_are_those_of_the_formulas_exactly(world):
    by_rank = launch(counted, world, timeout_s=60)
    for case, (t, s) in enumerate(SHAPES):
        t_of, s_of = split_sizes(t, world), split_sizes(s, world)
        for i in range(world):
            others = [j for j in range(world) if j != i]
            there = [t_of[i] * s_of[j] * REST * 4 for j in others]
            back = [s_of[i] * t_of[j] * REST * 4 for j in others]
            part = [t_of[i] * s * REST * 4 for _ in others]
            parts = [t_of[j] * s * REST * 4 for j in others]
            want = {
                "scatter": None,
                "scatter back": None,
                "switch": there,
                "switch back": back,
                "switch, started early": there,
                "switch, started early back": back,
                "gather replicated": part,
                "gather replicated back": None,
                "gather partial": part,
                "gather partial back": parts,
                "reduce_scatter": parts,
                "reduce_scatter back": part,
            }
            for name, messages in want.items():
                bytes_sent, sent, collectives, control = by_rank[i][case][name]
                where = f"{name} of {t} x {s}, rank {i} of {world}"
                assert bytes_sent == sum(messages or []), where
                assert sent == sum(n > 0 for n in messages or []), where
                assert collectives == (messages is not None), where
                assert control == 0, where


def test_what_one_rank_sends_to_all_is_one_nth_of_what_it_would_gather():
    """DSP / gather = 1/N where sizes divide."""
    case = SHAPES.index((16, 64))
    for row in (rank[case] for rank in launch(counted, 4, timeout_s=60)):
        assert row["switch"][0] * 4 == row["gather partial"][0]


def bytes_by_dtype() -> list[int]:
    mesh, found = line(), []
    src, dst = Layout("t/sp s", t=5, s=6), Layout("t s/sp", t=5, s=6)
    for dtype in (torch.bool, torch.bfloat16, torch.float64, torch.complex128):
        begun = mesh.traffic.snapshot()
        hp.switch(part_of(torch.ones(5, 6), src, places(mesh)).to(dtype), src, dst, mesh)
        found.append(mesh.traffic.since(begun).bytes_sent)
    return found


def test_bytes_go_with_the_size_of_an_element():
    assert launch(bytes_by_dtype, 2, timeout_s=60) == [[9, 18, 72, 144], [6, 12, 48, 96]]


def sum_traffic() -> list[tuple[int, int]]:
    """Bytes of each sum, forward and backward."""
    mesh, found = init_mesh(dp=2, sp=2, timeout_s=20), []
    for verb in (
        lambda x: hp.all_reduce(x, mesh, axis="sp", grad="partial"),
        lambda x: hp.all_reduce(x, mesh, axis="dp", grad="replicated"),
        lambda x: hp.global_mean(x.sum(), 1, mesh),
    ):
        begun = mesh.traffic.snapshot()
        y = verb(uniform(10, 4).requires_grad_())
        middle = mesh.traffic.snapshot()
        y.sum().backward()
        assert middle.since(begun).collectives > 0
        found.append((middle.since(begun).bytes_sent, mesh.traffic.since(middle).bytes_sent))
    return found


def test_bytes_of_sums():
    for partial, replicated, mean in launch(sum_traffic, 4, timeout_s=60):
        assert partial == (320, 320)  # 2 M (N - 1) / N
        assert replicated == (320, 0)
        assert 0 < mean[0] <= 64  # two numbers, over two axes
        assert mean[1] == 0


# Peers that are gone


def write_down(folder: Path, rank: int, error: BaseException, start: float) -> None:
    """Leave what a rank saw where the parent finds it, whatever becomes of the rank."""
    seen = {"kind": type(error).__name__, "message": str(error), "end": time.time(), "start": start}
    path = folder / f"{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(seen))
    path.with_suffix(".part").rename(path)


def read_down(folder: Path, ranks: list[int]) -> list[dict]:
    assert sorted(folder.glob("*.json")) == sorted(folder / f"{rank}.json" for rank in ranks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]


def train_until_killed(folder: Path, victim: int, dp: int, sp: int) -> None:
    mesh = init_mesh(dp=dp, sp=sp, timeout_s=60)
    src, dst = Layout("t/sp s", t=97, s=101), Layout("t s/sp", t=97, s=101)
    x = part_of(uniform(97, 101), src, places(mesh)).clone().requires_grad_()

    def kill() -> None:
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if mesh.global_rank == victim:
        threading.Timer(0.4, kill).start()
    try:
        while True:
            y = hp.switch(x, src, dst, mesh).tanh()
            y = hp.switch(y, dst, src, mesh, wait=False).wait()
            loss = hp.global_mean((y**2).sum(), y.numel(), mesh)
            loss.backward()
    except CommError as error:
        write_down(folder, mesh.global_rank, error, time.time())
        raise


@pytest.mark.parametrize(("dp", "sp", "victim"), [(1, 2, 0), (1, 4, 3), (2, 2, 1)])
def test_a_rank_killed_in_the_middle_of_a_step(tmp_path, dp, sp, victim):
    with pytest.raises(RankFailure) as caught:
        launch(train_until_killed, dp * sp, tmp_path, victim, dp, sp, timeout_s=60, grace_s=15)
    assert (caught.value.rank, caught.value.signal) == (victim, signal.SIGKILL)
    killed = float((tmp_path / "killed").read_text())
    others = [rank for rank in range(dp * sp) if rank != victim]
    for seen in read_down(tmp_path, others):
        assert seen["kind"] == "CommError"
        assert "a peer is gone, did not answer within 60 s" in seen["message"]
        assert seen["end"] - killed < 10


def transfers(mesh: Mesh) -> dict:
    src, dst = Layout("t/sp s", t=6, s=6), Layout("t s/sp", t=6, s=6)
    x = part_of(uniform(6, 6), src, places(mesh))
    return {
        "switch": lambda: hp.switch(x, src, dst, mesh),
        "pending": lambda: hp.switch(x, src, dst, mesh, wait=False).wait(),
        "gather": lambda: hp.gather(x, src, mesh, grad="partial"),
        "reduce_scatter": lambda: hp.reduce_scatter(uniform(6, 6), src, mesh),
        "all_reduce": lambda: hp.all_reduce(x[:1], mesh, axis="sp", grad="partial"),
        "sync_grads": lambda: hp.sync_grads(torch.nn.Linear(2, 2), mesh),
        "agreement": lambda: require_agreement("the same", mesh, "sp"),
        "backward": lambda: None,
    }


def one_stays_away(folder: Path, name: str) -> None:
    joined = init_mesh(sp=3, timeout_s=60)  # joining may take a while on a busy machine
    mesh = init_mesh(sp=3, timeout_s=2)
    call = transfers(mesh)[name]
    if name == "backward":  # all do the forward, one leaves before the backward
        src, dst = Layout("t/sp s", t=6, s=6), Layout("t s/sp", t=6, s=6)
        x = part_of(uniform(6, 6), src, places(mesh)).clone().requires_grad_()
        y = hp.switch(x, src, dst, mesh)
        call = y.sum().backward
    if joined.global_rank == 1:
        end = time.monotonic() + 20
        while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        return
    start = time.time()
    try:
        call()
    except CommError as error:
        write_down(folder, mesh.global_rank, error, start)


@pytest.mark.parametrize("name", ["switch", "all_reduce", "agreement", "backward"])
def test_a_rank_that_never_calls(tmp_path, name):
    launch(one_stays_away, 3, tmp_path, name, timeout_s=60)
    for rank, seen in zip((0, 2), read_down(tmp_path, [0, 2]), strict=True):
        assert seen["kind"] == "CommError"
        assert f"rank {rank} of 3 on mesh axis 'sp'" in seen["message"]
        assert "did not answer within 2 s" in seen["message"]
        assert "raise timeout_s in init_mesh" in seen["message"]
        # the deadline, or at once where the other waiting rank has given up first
        assert 0 < seen["end"] - seen["start"] < 8
    assert max(s["end"] - s["start"] for s in read_down(tmp_path, [0, 2])) > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pending", "gather", "reduce_scatter", "sync_grads"])
def test_a_rank_that_never_calls_the_other_verbs(tmp_path, name):
    test_a_rank_that_never_calls(tmp_path, name)


# Ranks that were given different work, by hand, without the agreement of a plan


def different_work(folder: Path, name: str) -> None:
    init_mesh(sp=2, timeout_s=60)
    mesh = init_mesh(sp=2, timeout_s=2)
    odd = mesh.global_rank == 0
    t, s, dtype = 4, 8, torch.float32
    if name == "longer":
        t = 6 if odd else 4
    if name == "as many bytes":
        t, s = (8, 4) if odd else (4, 8)
    if name == "another dtype":
        dtype = torch.float64 if odd else torch.float32
    src, dst = Layout("t/sp s", t=t, s=s), Layout("t s/sp", t=t, s=s)
    x = part_of(uniform(t, s), src, places(mesh)).to(dtype)
    start = time.time()
    try:
        if name == "all_reduce":
            hp.all_reduce(uniform(5 if odd else 4), mesh, axis="sp", grad="partial")
        elif name == "another verb":
            hp.switch(x, src, dst, mesh) if odd else hp.gather(x, src, mesh, grad="partial")
        else:
            hp.switch(x, src, dst, mesh)
    except CommError as error:
        write_down(folder, mesh.global_rank, error, start)


@pytest.mark.parametrize(
    "name", ["longer", "as many bytes", "another dtype", "another verb", "all_reduce"]
)
def test_ranks_that_disagree_get_an_error_and_no_rank_a_wrong_tensor(tmp_path, name):
    launch(different_work, 2, tmp_path, name, timeout_s=60)  # no rank may be aborted
    for seen in read_down(tmp_path, [0, 1]):
        assert "or moved other sizes" in seen["message"]
        assert seen["end"] - seen["start"] < 8


# Leaks


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def state() -> tuple[int, int, int, int]:
    gc.collect()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    return resident_bytes(), tensors, open_files, threading.active_count()


def many_steps(*, early: bool) -> list[tuple[int, int, int, int]]:
    mesh = line()
    src, dst = Layout("t/sp s", t=61, s=67), Layout("t s/sp", t=61, s=67)  # 16 KiB per rank
    x = part_of(uniform(61, 67), src, places(mesh)).clone().requires_grad_()
    states = []
    for step in range(601):
        if early:
            pending = hp.switch(x, src, dst, mesh, wait=False)
            if step % 10 == 0:
                hp.switch(x, src, dst, mesh, wait=False)  # and some that nobody awaits
            y = pending.wait()
        else:
            y = hp.switch(x, src, dst, mesh)
        (y * 2).sum().backward()
        x.grad = None
        if step in {150, 600}:
            del y
            states.append(state())
    return states


@pytest.mark.parametrize("early", [slow(False), True], ids=["at once", "started early"])
def test_six_hundred_steps_leave_nothing_behind(early):
    for before, after in launch(many_steps, 2, early=early, timeout_s=100):
        assert after[1] == before[1]  # live tensors
        assert after[2] <= before[2]  # open files
        assert after[3] <= before[3]  # threads
        # 450 steps that each kept one 16 KiB tensor would add 7 MB
        assert after[0] - before[0] < 3 * 2**20
