"""The benchmark of axial parallelism: peers are right, a played device is faithful, bytes agree."""

import json
import os
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from hairpin.bench import axial as bench
from hairpin.bench import axial_scaling as scaling
from hairpin.bench.axial_counted import all_methods, memory, published_bytes
from hairpin.bench.axial_ways import (
    Size,
    Trial,
    build_block,
    fastfold,
    linked,
    ours,
    rehearsed,
    tensor_parallel,
    triangles,
)
from hairpin.bench.played import PlayedDevice
from hairpin.cli.app import app
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.models.alphafold import presets
from hairpin.planning.axial.choose import Manner
from hairpin.run.launch import launch

TINY = Size(7, 9, c_m=16, c_z=16, c=16)

COUNTED = (ours(Manner("channels", "ring", 2)), tensor_parallel())


@pytest.fixture
def _no_network(monkeypatch):
    monkeypatch.setattr(bench, "why_not", lambda: "no tools")
    monkeypatch.setitem(bench.open_network.__globals__, "why_not", lambda: "no tools")


def tiny_block():
    return build_block(presets.tiny().evoformer)


def live(world):
    return init_mesh(sp=world, timeout_s=60) if world > 1 else Mesh(sp=1)


# ---------------------------------------------------------------------------------------- peers


def run_whole_and_split(method):
    """Largest difference to one process of outputs and gradients, each over its largest value."""
    mesh = live(int(os.environ["WORLD_SIZE"]))
    way = method.way(mesh, TINY)
    torch.manual_seed(1)
    m, z = (torch.randn(s, dtype=torch.float64) for s in ((7, 9, 16), (9, 9, 16)))
    cotangents = [torch.randn_like(x) for x in (m, z)]
    masks = [(torch.rand(s) > 0.2).double() for s in ((7, 9), (9, 9))]
    whole, split = tiny_block().double(), tiny_block().double()
    held = [dim for _, dim in method.inputs]

    def mine(x, pattern, dim):
        return x if dim is None else way.part(x, pattern, dim)

    patterns = ("s r c", "i j c")
    inputs = [x.clone().requires_grad_() for x in (m, z)]
    truth = whole(*inputs, *masks)
    torch.autograd.backward(truth, cotangents)
    parts = [
        mine(x, p, d).clone().requires_grad_()
        for x, p, d in zip((m, z), patterns, held, strict=True)
    ]
    out = method.run(split, parts, tuple(masks), way)
    own = [mine(x, p, d) for x, p, d in zip(cotangents, patterns, held, strict=True)]
    torch.autograd.backward(list(out), own)
    pairs = [
        (got.detach(), mine(want.detach(), p, d))
        for got, want, p, d in zip(out, truth, patterns, held, strict=True)
    ]
    pairs += [
        (x.grad, mine(w.grad, p, d))
        for x, w, p, d in zip(parts, inputs, patterns, held, strict=True)
    ]
    for (name, part), (_, one) in zip(
        split.named_parameters(), whole.named_parameters(), strict=True
    ):
        total = part.grad.clone()
        if held[0] is not None or shared_out(name):
            torch.distributed.all_reduce(total)
        pairs.append((total, one.grad))
    # A constant added to logits has no gradient but rounding: hence the least scale.
    return max(
        float((got - want).abs().max() / want.abs().max().clamp(min=1e-3)) for got, want in pairs
    )


def shared_out(name):
    """Whether tensor parallelism gives each rank a part of the parameter."""
    layer, _, kind = name.rpartition(".")
    if layer.endswith(("attention.output", "transition.linear_2")):
        return kind == "weight"
    return ".attention." in f".{layer}." or layer.endswith("transition.linear_1")


@pytest.mark.parametrize("method", [fastfold(), tensor_parallel(), tensor_parallel(gloo=True)])
def test_peers_equal_one_process(method):
    assert max(launch(run_whole_and_split, 2, method)) < 1e-11


# --------------------------------------------------------------------------------- played device


class Recorder(TorchDispatchMode):
    """Notes every operation and how its results lie in memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [
            (tuple(x.shape), x.stride(), x.dtype)
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor)
        ]
        self.calls.append((str(func), results))
        return out


def recorded(method, *, played):
    trial = Trial(method, tiny_block(), Mesh(sp=1), TINY)
    trial.forward()
    trial.backward()  # makes the random gradients, in the first backward
    with PlayedDevice(1e15, 1e15) if played else Recorder(), Recorder() as recorder:
        trial.forward()
        trial.backward()
        with torch.no_grad():
            trial.forward()
    return recorder.calls


@pytest.mark.parametrize("method", [ours(Manner()), ours(Manner("ring")), tensor_parallel()])
def test_a_played_device_gives_what_a_real_one_does(method):
    """The same operations, with results of the same shapes, strides and dtypes."""
    real, played = (recorded(method, played=p) for p in (False, True))
    assert len(real) > 500
    assert played == real


def test_a_played_device_does_the_rehearsed_work():
    method, device = ours(Manner()), PlayedDevice(1e15, 1e15)
    trial = Trial(method, tiny_block(), Mesh(sp=1), TINY)
    trial.forward()
    trial.backward()
    with device:
        trial.forward()
        trial.backward()
    block = build_block(presets.tiny().evoformer, device="meta")
    done = rehearsed(method, TINY, 1, block=block).done
    assert device.flops == done.flops
    assert device.touched_bytes == pytest.approx(done.touched_bytes, rel=0.01)


def test_a_played_device_takes_its_time_and_writes_nothing():
    x, y = torch.ones(10, 100), torch.ones(100, 50)
    into, total = torch.zeros(10, 50), torch.zeros(10, 50)
    with PlayedDevice(1e6, float("inf")) as device:
        start_s = time.perf_counter()
        out = x @ y
        took_s = time.perf_counter() - start_s
        assert torch.mm(x, y, out=into) is into
        assert total.add_(1.0) is total
        assert out.t().data_ptr() == out.data_ptr()
        assert out.shape == (10, 50)
    assert took_s >= 0.1  # 2 x 10 x 100 x 50 operations
    assert device.flops == 2e5
    assert not into.any()
    assert not total.any()


# ---------------------------------------------------------------------------------------- bytes


def test_the_formula_is_that_of_the_published_order():
    """Lengths that are padded to 8 and 12 send what lengths of 8 and 12 do, unpadded."""
    run = rehearsed(fastfold(), Size(8, 12), 4)
    assert published_bytes(Size(7, 9), 4) == run.forward.sent_bytes
    assert published_bytes(Size(8, 12), 4) > run.forward.sent_bytes
    assert run.backward.sent_bytes == run.forward.sent_bytes


def bytes_by_links(size):
    mesh, found = live(int(os.environ["WORLD_SIZE"])), {}
    block = tiny_block()
    with PlayedDevice(float("inf"), float("inf")):
        for method in COUNTED:
            for links in ("as they are", "at once", "none"):
                trial = Trial(method, block, mesh, size)
                before = mesh.traffic.snapshot()
                with linked(links):
                    trial.forward()
                    trial.backward()
                found[method.name, links] = mesh.traffic.since(before).bytes_sent
    return found


def test_bytes_are_as_rehearsed_and_do_not_depend_on_when_they_are_awaited():
    sent = launch(bytes_by_links, 2, TINY)[1]
    block = build_block(presets.tiny().evoformer, device="meta")
    for method in COUNTED:
        told = rehearsed(method, TINY, 2, rank=1, block=block).sent_bytes
        assert sent[method.name, "as they are"] == told, method.name
        assert sent[method.name, "at once"] == told, method.name
        assert sent[method.name, "none"] == 0, method.name


# ------------------------------------------------------------------------------- the whole of it


@pytest.mark.usefixtures("_no_network")
def test_command(tmp_path):
    sizes = "--sequences 4 --residues 6 --ranks 2 --counted 2 --rehearsed 4x6:2 --rounds 1"
    words = ["bench", "axial", *sizes.split(), "--out", str(tmp_path)]
    some = ["--parts", "bytes,time", "--manners", "ring ring"]
    done = CliRunner().invoke(app, [*words, *some])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "axial-bytes-time.json").read_text())
    rows = result["bytes"][0]["methods"]
    names = ["ring, ring", "FastFold's order", "tensor parallel"]
    assert [row["method"] for row in rows] == names
    assert all(row[part]["exact"] for row in rows for part in ("forward", "backward"))
    for row in result["time"]["methods"]:
        assert row["time_s"] > 0.3  # of the half second that work takes where links are unlimited
    assert "NOT limited" in done.output


def test_what_cannot_be_run_is_refused():
    for words, reason in (
        (["--rehearsed", "4", "--parts", "memory"], "is not of the form 64x128:2/4"),
        (["--manners", "rings gather"], "product='rings'"),
    ):
        refused = CliRunner().invoke(app, ["bench", "axial", *words])
        assert refused.exit_code != 0
        assert reason in refused.output + str(refused.exception)


def test_hidden_shares_are_of_what_they_say():
    plan = rehearsed(triangles(Manner("ring"))["products"], Size(4, 8), 2)
    link = plan.forward.sent_bytes
    balance = bench._Balance(1e30, plan.forward.done.touched_bytes, link)
    times = {"as they are": 1.75, "at once": 2.0, "none": 1.0}
    found = bench._overlap(times, plan.forward, balance.speeds())
    assert found["predicted_none_s"] == pytest.approx(1.0)
    assert found["predicted_at_once_s"] == pytest.approx(2.0)
    assert found["hidden"] == 0.25
    assert 0 < found["hideable_s"] < 1
    assert found["hidden_of_hideable"] == pytest.approx(0.25 / found["hideable_s"])


def test_memory_is_over_an_nth_of_one_rank():
    rows = memory([(Size(32, 64), (4,))], all_methods(), say=print)
    assert len(rows) == len({row["method"] for row in rows}) == 8
    row = next(row for row in rows if row["method"] == ours(Manner("ring", "ring")).name)
    assert 0.7 < row["forward_over_part"] < 1.15
    assert 0.7 < row["step_over_part"] < 1.15


# -------------------------------------------------------------------------------------- scaling


def test_a_training_step_shrinks_with_dap_and_waits_for_its_links():
    small = scaling.Phase(32, 64, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scaling.PHASES, "initial", small)
        one, two = (scaling.step_of(fastfold(), scaling.Setup("initial", 8, dap)) for dap in (1, 2))
    assert 0.4 < two.work_s / one.work_s < 0.6
    assert one.waits_s == 0 < two.waits_s
    assert two.time_s(2.0) == 2 * two.work_s + two.waits_s + two.gradients_s
    assert two.flops == pytest.approx(one.flops, rel=0.05)


def test_without_a_table_nothing_is_compared(tmp_path):
    said = []
    result = scaling.predict_published(str(tmp_path / "none.csv"), say=said.append)
    assert result["rows"] == []
    assert "no published figures at" in said[0]
