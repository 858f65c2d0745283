"""Ranks start, return in order, fail loudly, and are never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hairpin.comm.mesh import init_mesh
from hairpin.errors import DataError, HairpinError, MeshError
from hairpin.run.launch import RankFailure, launch, user_error

SOURCE = Path(__file__).parents[2] / "src"


def environment() -> tuple[str, ...]:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"
    return tuple(os.environ[name] for name in names)


def sum_of_ranks(factor: float) -> tuple[int, torch.Tensor]:
    mesh = init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=20)
    x = torch.ones(3) * mesh.global_rank * factor
    if mesh.world > 1:
        dist.all_reduce(x)
    return mesh.global_rank, x


def rank() -> int:
    return int(os.environ["RANK"])


def raise_on(bad: int, error: Exception) -> None:
    mesh = init_mesh(sp=3, timeout_s=20)
    if mesh.global_rank == bad:
        raise error
    dist.barrier()  # ends when the bad rank has gone


def kill_on(bad: int) -> None:
    init_mesh(sp=3, timeout_s=20)
    if rank() == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def tell_pid_and_sleep(folder: Path) -> None:
    (folder / f"{rank()}.{os.getpid()}").touch()
    time.sleep(60)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that nobody has waited for has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until(condition, *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def pids(folder: Path, ranks: int) -> list[int]:
    assert wait_until(lambda: len(list(folder.iterdir())) == ranks, within_s=20)
    return [int(path.suffix[1:]) for path in folder.iterdir()]


# ---------------------------------------------------------------------------------------- success


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_results_come_by_rank(ranks):
    results = launch(sum_of_ranks, ranks, 2.0, timeout_s=60)
    assert [r for r, _ in results] == list(range(ranks))
    expected = 2.0 * sum(range(ranks))
    assert all(torch.equal(x, torch.full((3,), expected)) for _, x in results)


def test_each_rank_finds_what_torchrun_would_set():
    found = launch(environment, 3, timeout_s=60)
    assert found == [(str(r), str(r), "3", "3", "127.0.0.1") for r in range(3)]


def test_the_parents_environment_is_untouched():
    before = dict(os.environ)
    launch(environment, 2, timeout_s=60)
    assert dict(os.environ) == before


def test_threads_and_keyword_arguments_reach_the_ranks():
    def threads(*, plus: int) -> int:
        return torch.get_num_threads() + plus

    assert launch(threads, 2, threads=2, plus=10, timeout_s=60) == [12, 12]


def test_a_large_result_does_not_block():
    assert [x.sum().item() for x in launch(large, 2, timeout_s=60)] == [2**20, 2**20]


def large() -> torch.Tensor:
    return torch.ones(2**20)


def test_four_ranks_start_within_a_second_or_so():
    launch(rank, 1)  # warm
    start_s = time.perf_counter()
    launch(rank, 4, timeout_s=60)
    assert time.perf_counter() - start_s < 3  # 0.1 s when the machine is idle


@pytest.mark.slow
def test_spawned_ranks_do_the_same():
    results = launch(sum_of_ranks_by_name, 2, timeout_s=100, start="spawn")
    assert results == [1.0, 1.0]


def sum_of_ranks_by_name() -> float:
    return sum_of_ranks(1.0)[1][0].item()


# ---------------------------------------------------------------------------------------- failure


def test_no_ranks_is_an_error():
    with pytest.raises(MeshError, match="got ranks=0"):
        launch(rank, 0)


def test_the_rank_that_raised_is_named_with_its_traceback():
    with pytest.raises(
        RankFailure, match="rank 1 of 3 failed: ZeroDivisionError: my words"
    ) as info:
        launch(raise_on, 3, 1, ZeroDivisionError("my words"), timeout_s=60)
    failure = info.value
    assert (failure.rank, failure.exit_code, failure.signal) == (1, 1, None)
    assert isinstance(failure.__cause__, ZeroDivisionError)
    assert "in raise_on" in failure.traceback
    assert "in raise_on" in str(failure)


def test_the_other_ranks_tell_what_they_saw():
    with pytest.raises(RankFailure, match=r"also:\n  rank 0 failed: .*\n  rank 2 failed: "):
        launch(raise_on, 3, 1, ZeroDivisionError("my words"), timeout_s=60)


def test_a_killed_rank_is_an_error_within_ten_seconds():
    start_s = time.perf_counter()
    with pytest.raises(RankFailure, match="rank 2 of 3 was killed by SIGKILL") as info:
        launch(kill_on, 3, 2, timeout_s=60)
    assert time.perf_counter() - start_s < 10
    assert (info.value.rank, info.value.signal) == (2, signal.SIGKILL)


def test_a_rank_that_leaves_without_a_result_is_an_error():
    with pytest.raises(RankFailure, match="rank 0 of 1 ended with exit code 3 and no result"):
        launch(os._exit, 1, 3, timeout_s=60)


def test_an_error_that_cannot_be_pickled_still_arrives_as_text():
    class Local(Exception):
        pass

    with pytest.raises(RankFailure, match="rank 0 of 1 failed: Local: words") as info:
        launch(raise_, 1, Local("words"), timeout_s=60)
    assert info.value.__cause__ is None


def raise_(error: Exception) -> None:
    raise error


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RankFailure, match="the rank's result cannot be pickled"):
        launch(lambda: lambda: 0, 1, timeout_s=60)


def test_a_users_error_is_handed_on_as_it_is():
    with pytest.raises(RankFailure) as info:
        launch(raise_, 1, DataError("no clips"), timeout_s=60)
    assert isinstance(user_error(info.value), DataError)
    with pytest.raises(RankFailure) as info:
        launch(raise_, 1, KeyError("bug"), timeout_s=60)
    error: HairpinError = user_error(info.value)
    assert error is info.value


# ----------------------------------------------------------------------------- nobody stays behind


def test_ranks_that_are_not_done_in_time_are_ended(tmp_path, capfd):
    start_s = time.perf_counter()
    with pytest.raises(RankFailure, match="rank 0 of 2 was not done within 1 s and was stopped"):
        launch(tell_pid_and_sleep, 2, tmp_path, timeout_s=1)
    assert time.perf_counter() - start_s < 8
    assert all(is_gone(pid) for pid in pids(tmp_path, 2))
    assert "in tell_pid_and_sleep" in capfd.readouterr().err  # where each of them hung


def fail_or_sleep(folder: Path) -> None:
    if rank() == 0:
        assert wait_until(lambda: any(folder.iterdir()), within_s=20)
        raise ValueError("first")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell_pid_and_sleep(folder)


def test_ranks_that_ignore_a_failure_and_sigterm_are_killed(tmp_path):
    start_s = time.perf_counter()
    with pytest.raises(RankFailure, match="rank 0 of 2 failed: ValueError: first"):
        launch(fail_or_sleep, 2, tmp_path, timeout_s=60, grace_s=0.2)
    assert time.perf_counter() - start_s < 10
    assert is_gone(*pids(tmp_path, 1))


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from pathlib import Path
from hairpin.run.launch import launch
import os

def sleep():
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.{os.getpid()}").touch()
    time.sleep(60)

launch(sleep, 2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="a killed parent takes its ranks on Linux only")
def test_ranks_go_with_their_parent(tmp_path, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stderr=subprocess.DEVNULL,
    )
    children = pids(tmp_path, 2)
    parent.send_signal(number)
    assert parent.wait(10) != 0
    assert wait_until(lambda: all(is_gone(pid) for pid in children), within_s=5)
