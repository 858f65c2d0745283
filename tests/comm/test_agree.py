"""Ranks that were given different work all learn it at once, and from one another."""

import time

import pytest

from comm.cases import line
from hairpin.comm.agree import require_agreement
from hairpin.comm.mesh import init_mesh
from hairpin.errors import DisagreementError
from hairpin.run.launch import launch


def statements(said: list[str]) -> tuple[str, float] | None:
    mesh = line()
    start = time.monotonic()
    try:
        require_agreement(said[mesh.global_rank], mesh, "sp")
    except DisagreementError as error:
        return str(error), time.monotonic() - start
    assert mesh.traffic.bytes_sent == mesh.traffic.collectives == 0  # it is not payload
    assert mesh.traffic.control_bytes == 16 * (mesh.world - 1)
    return None


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_agree_go_on(world):
    assert launch(statements, world, ["t=16"] * world, timeout_s=60) == [None] * world


@pytest.mark.parametrize("odd", range(4))
def test_one_rank_with_another_length(odd):
    said = [f"x of 't/sp s' (t={17 if rank == odd else 16}, s=64)" for rank in range(4)]
    for message, time_s in launch(statements, 4, said, timeout_s=60):
        assert message.startswith("the ranks of mesh axis 'sp' were given different work:\n")
        for rank, line_ in enumerate(said):
            assert f"  rank {rank}: {line_}\n" in message
        assert message.endswith("Give every rank of this axis the same inputs, plan and mode")
        assert time_s < 10


def test_all_ranks_differ():
    said = ["", "train", "plan of another model: é 中"]
    for message, _ in launch(statements, 3, said, timeout_s=60):
        assert all(f"  rank {rank}: {words}\n" in message for rank, words in enumerate(said))


def test_a_long_statement_shows_where_it_differs():
    said = ["same words " * 200 + f"t={16 + rank}" for rank in range(2)]
    for message, _ in launch(statements, 2, said, timeout_s=60):
        assert "t=16" in message
        assert "t=17" in message


def axis_by_axis() -> list[bool]:
    """On dp x sp: dp ranks may hold other lengths, sp ranks may not."""
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    require_agreement(f"t={mesh.rank('dp')}", mesh, "sp")
    found = []
    for said in (f"t={mesh.rank('dp')}", "same"):
        try:
            require_agreement(said, mesh, "dp")
        except DisagreementError:
            found.append(True)
        else:
            found.append(False)
    return found


def test_agreement_is_asked_along_one_axis():
    assert launch(axis_by_axis, 4, timeout_s=60) == [[True, False]] * 4
