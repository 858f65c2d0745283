"""Meshes: descriptions, live ones, and what does not fit."""

import copy
import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hairpin as hp
from comm.cases import places
from hairpin.comm.mesh import Mesh, Traffic, as_mesh, init_mesh
from hairpin.errors import CommError, MeshError
from hairpin.run.launch import launch

# Descriptions


def test_a_description_has_axes_and_degrees():
    mesh = Mesh(dp=2, sp=4)
    assert mesh.axes == ("dp", "sp")
    assert (mesh.size("dp"), mesh.size("sp"), mesh.world) == (2, 4, 8)
    assert (mesh.rank("dp"), mesh.rank("sp"), mesh.global_rank) == (0, 0, 0)
    assert mesh.coordinates(("sp", "dp")) == {"sp": (0, 4), "dp": (0, 2)}
    assert repr(mesh) == "Mesh(dp=2, sp=4)"
    assert not mesh.is_live
    assert Mesh(sp=1).is_live


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({}, "a mesh needs at least one axis, for example sp=4"),
        ({"sp": 0}, "mesh axis 'sp' has degree 0; a degree is a whole number, 1 or more"),
        ({"dp": 2, "sp": -1}, "mesh axis 'sp' has degree -1"),
        ({"sp": 2.0}, r"mesh axis 'sp' has degree 2\.0"),
        ({"sp": "2"}, "mesh axis 'sp' has degree '2'"),
        ({"sp": True}, "mesh axis 'sp' has degree True"),
        ({"sp": None}, "mesh axis 'sp' has degree None"),
    ],
)
def test_degrees_are_whole_numbers(degrees, words):
    for make in (Mesh, init_mesh):
        with pytest.raises(MeshError, match=words):
            make(**degrees)


@pytest.mark.parametrize(
    "ask", [Mesh.size, Mesh.rank, Mesh.group, lambda mesh, axis: mesh.coordinates((axis,))]
)
def test_an_axis_that_is_not_there(ask):
    words = r"Mesh\(dp=2, sp=4\) has no axis 'tp'; name one of dp, sp or add tp=1 to init_mesh"
    with pytest.raises(MeshError, match=words):
        ask(Mesh(dp=2, sp=4), "tp")


def test_a_description_has_no_groups():
    words = (
        r"Mesh\(dp=2, sp=4\) is only a description; make a live mesh with "
        r"hp.init_mesh\(dp=2, sp=4\) in 8 ranks"
    )
    with pytest.raises(MeshError, match=words):
        Mesh(dp=2, sp=4).group("sp")
    with pytest.raises(MeshError, match=words):
        _ = Mesh(dp=2, sp=4).device_mesh
    assert Mesh(dp=1, sp=1).group("sp") is None


def test_equal_meshes():
    assert Mesh(dp=2, sp=4) == Mesh(dp=2, sp=4)
    assert hash(Mesh(dp=2, sp=4)) == hash(Mesh(dp=2, sp=4))
    for other in (Mesh(dp=4, sp=2), Mesh(sp=4, dp=2), Mesh(sp=8), Mesh(dp=2, sp=4, tp=1), "mesh"):
        assert Mesh(dp=2, sp=4) != other


def test_descriptions_travel():
    mesh = Mesh(dp=2, sp=4)
    pickled = pickle.loads(pickle.dumps(mesh))  # noqa: S301  # our own
    for other in (pickled, copy.deepcopy(mesh), copy.copy(mesh)):
        assert other == mesh
        assert not other.is_live


def test_traffic_counts_since_a_snapshot():
    traffic = Traffic(5, 2, 1, 16)
    before = traffic.snapshot()
    traffic.bytes_sent += 10
    traffic.messages += 3
    traffic.collectives += 1
    traffic.control_bytes += 32
    assert before == Traffic(5, 2, 1, 16)
    assert traffic.since(before) == Traffic(10, 3, 1, 32)


# Live meshes


def test_a_mesh_of_one_rank_needs_nothing():
    mesh = hp.init_mesh(dp=1, sp=1)
    assert (mesh.world, mesh.global_rank, mesh.is_live) == (1, 0, True)
    assert not dist.is_initialized()


@pytest.mark.parametrize("degrees", [{"sp": 4}, {"dp": 2, "sp": 3}, {"sp": 2}])
def test_more_ranks_wanted_than_there_are(degrees):
    world = Mesh(**degrees).world
    words = rf"needs {world} ranks but there are 1; .* \(torchrun --nproc-per-node {world}\)"
    with pytest.raises(MeshError, match=words):
        init_mesh(**degrees)


def degrees_that_do_not_fit() -> list[str]:
    messages = []
    for degrees in ({"sp": 3}, {"dp": 2, "sp": 3}, {"dp": 3, "sp": 1}, {"sp": 8}, {"sp": 1}):
        with pytest.raises(MeshError) as caught:
            init_mesh(**degrees)
        messages.append(str(caught.value))
    assert not dist.is_initialized()  # refused before anything was set up
    return messages


def test_a_world_that_does_not_divide_into_the_mesh():
    by_rank = launch(degrees_that_do_not_fit, 4, timeout_s=60)
    assert by_rank[0][0] == (
        "Mesh(sp=3) needs 3 ranks but there are 4; choose degrees whose product is 4, or start 3 "
        "ranks (torchrun --nproc-per-node 3)"
    )
    assert all("but there are 4" in message for messages in by_rank for message in messages)


def live() -> tuple[int, int, int]:
    mesh = init_mesh(dp=2, tp=1, sp=3, timeout_s=20)
    assert mesh.is_live
    assert mesh.timeout_s == 20
    assert mesh.global_rank == int(os.environ["RANK"])
    assert dict(mesh.coordinates(mesh.axes)) == places(mesh)
    assert mesh.group("tp") is None
    assert dist.get_world_size(mesh.group("sp")) == 3
    assert dist.get_rank(mesh.group("sp")) == mesh.rank("sp")
    assert dist.get_world_size(mesh.group("dp")) == 2
    assert isinstance(mesh.device_mesh, DeviceMesh)
    assert mesh.device_mesh.mesh_dim_names == ("dp", "tp", "sp")
    assert mesh.device_mesh.mesh.tolist() == torch.arange(6).view(2, 1, 3).tolist()

    again = init_mesh(sp=6, timeout_s=5)  # a second mesh over the same ranks
    assert (again.rank("sp"), again.timeout_s, mesh.timeout_s) == (mesh.global_rank, 5, 20)
    assert again.traffic is not mesh.traffic

    assert copy.deepcopy(mesh) is mesh
    assert not pickle.loads(pickle.dumps(mesh)).is_live  # noqa: S301  # our own
    assert mesh == Mesh(dp=2, tp=1, sp=3)
    return mesh.rank("dp"), mesh.rank("tp"), mesh.rank("sp")


def test_live_ranks_stand_outermost_axis_first():
    want = [(dp, 0, sp) for dp in range(2) for sp in range(3)]
    assert launch(live, 6, timeout_s=60) == want


def from_torch() -> None:
    dist.init_process_group("gloo")
    theirs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    mesh = as_mesh(theirs)
    assert mesh == Mesh(dp=2, sp=2)
    assert mesh.is_live
    assert mesh.device_mesh is theirs
    assert dict(mesh.coordinates(mesh.axes)) == places(mesh)
    assert as_mesh(mesh) is mesh
    with pytest.raises(MeshError, match="has no axis names; build it with init_device_mesh"):
        as_mesh(init_device_mesh("cpu", (2, 2)))
    ours = init_mesh(dp=2, sp=2)  # joins what somebody else has set up
    assert ours.rank("sp") == mesh.rank("sp")


def test_meshes_of_torch():
    launch(from_torch, 4, timeout_s=60)


def joins_alone() -> tuple[str, float] | None:
    if os.environ["RANK"] == "1":
        time.sleep(2.5)
        return None
    start = time.monotonic()
    with pytest.raises(CommError) as caught:
        init_mesh(sp=2, timeout_s=1)
    return str(caught.value), time.monotonic() - start


def test_a_rank_that_never_joins():
    (message, time_s), _ = launch(joins_alone, 2, timeout_s=60)
    assert "the 2 ranks of Mesh(sp=2) did not all join within 1 s" in message
    assert time_s < 5
