"""A trace has what every rank computed and sent, in the right order."""

import json
import os
from itertools import pairwise

import pytest
import torch

import hairpin as hp
from hairpin.errors import OutputError
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.run.launch import launch


def traced_step(path):
    """Split a stack, trace a step; the transfers and bytes that this rank counted meanwhile."""
    mesh = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=60)
    torch.manual_seed(0)
    stack = EvoformerStack(presets.tiny().evoformer, 2)
    hp.parallelize(stack, hp.plan_axial(mesh, product="ring"), mesh)
    config = presets.tiny()
    m, z = torch.randn(5, 7, config.c_m), torch.randn(7, 7, config.c_z)
    before = mesh.traffic.snapshot()
    with hp.trace(stack, mesh, path):
        m, z = stack(m, z, torch.ones(5, 7), torch.ones(7, 7))
        (m.sum() + z.sum()).backward()
    return mesh.traffic.since(before)


def spans_of(path, rank):
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["pid"] == rank and e["ph"] == "X"]
    return {kind: [e for e in spans if e["cat"] == kind] for kind in ("work", "wait", "transfer")}


def end(span):
    return span["ts"] + span["dur"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_transfer_of_every_rank_is_shown(tmp_path, world):
    path = tmp_path / "trace.json"
    for rank, traffic in enumerate(launch(traced_step, world, path, timeout_s=100)):
        spans = spans_of(path, rank)
        transfers = spans["transfer"]
        assert len(transfers) == traffic.collectives
        assert sum(e["args"]["sent bytes"] for e in transfers) == traffic.bytes_sent
        assert (len(transfers) > 0) == (world > 1)
        for transfer in transfers:
            (wait,) = (w for w in spans["wait"] if abs(end(w) - end(transfer)) < 1e-3)
            assert wait["name"] == f"wait: {transfer['name']}"
            assert wait["ts"] >= transfer["ts"]
            hidden = 1 - wait["dur"] / transfer["dur"]
            assert transfer["args"]["hidden"] == pytest.approx(hidden, abs=1e-3)


def test_work_has_the_names_of_modules_one_after_another(tmp_path):
    path = tmp_path / "trace.json"
    launch(traced_step, 2, path, timeout_s=100)
    spans = spans_of(path, 1)
    names = [e["name"] for e in spans["work"]]
    assert "blocks.1.msa_transition.linear_1" in names
    assert "blocks.0.pair_stack.pair_transition.linear_1 (backward)" in names
    work = spans["work"]
    assert all(end(one) <= following["ts"] for one, following in pairwise(work))
    lines = {}
    for transfer in sorted(spans["transfer"], key=lambda e: e["ts"]):
        assert lines.get(transfer["tid"], 0) <= transfer["ts"]
        lines[transfer["tid"]] = end(transfer)
    assert len(lines) > 1  # some were under way at once
    assert 0 not in lines


def test_ranks_are_named_and_time_begins_at_zero(tmp_path):
    path = tmp_path / "trace.json"
    launch(traced_step, 2, path, timeout_s=100)
    events = json.loads(path.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1"]
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def test_nothing_is_watched_after_the_block(tmp_path):
    mesh, model = hp.Mesh(sp=1), torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), hp.trace(model, mesh, tmp_path / "no.json"):
        raise ZeroDivisionError
    assert not (tmp_path / "no.json").exists()
    with hp.trace(model, mesh, tmp_path / "one.json"):
        model(torch.ones(1, 2))
    spans = spans_of(tmp_path / "one.json", 0)
    assert [e["name"] for e in spans["work"]][-1] == "outside the model's modules"
    assert spans["transfer"] == []


def tried(path, spoil):
    """What became of a block on this rank: whether it ran, and what was raised."""
    mesh, ran = hp.init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=60), False
    try:
        with hp.trace(torch.nn.Linear(2, 2), mesh, path):
            ran = True
            if spoil and mesh.global_rank == 0:
                path.mkdir()
    except OutputError as error:
        return ran, str(error)
    return ran, ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_file_that_cannot_be_written_is_refused_before_the_block_on_all_ranks(tmp_path, world):
    path = tmp_path / "no/such/trace.json"
    found = launch(tried, world, path, spoil=False, timeout_s=100)
    message = f"cannot write {path}: No such file or directory; name a file in a folder you may "
    assert found == [(False, f"{message}write to")] * world


def test_a_file_that_can_no_longer_be_written_is_an_error_of_all_ranks(tmp_path):
    path = tmp_path / "trace.json"
    found = launch(tried, 2, path, spoil=True, timeout_s=100)
    assert found[0] == found[1]
    assert found[0][0]
    assert f"cannot write {path}: Is a directory" in found[0][1]


def test_a_file_that_is_there_is_kept_until_the_block_is_done(tmp_path):
    path, model = tmp_path / "trace.json", torch.nn.Linear(2, 2)
    path.write_text("before")
    with hp.trace(model, hp.Mesh(sp=1), path):
        assert path.read_text() == "before"
    assert json.loads(path.read_text())["traceEvents"]
