"""A checkpoint is whole or not there; a wrong or damaged one is named."""

import json
import os
import signal
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from hairpin.errors import CheckpointError, OutputError
from hairpin.run import checkpoint
from hairpin.run.checkpoint import TrainState
from hairpin.run.launch import RankFailure, launch

RECIPE = {"name": "test", "lr": 0.1}


def new_state(*, width: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return TrainState(model, optimizer, ema)


def train(state: TrainState, steps: int = 2) -> TrainState:
    dtype = next(state.model.parameters()).dtype
    for _ in range(steps):
        state.model(torch.ones(1, 3, dtype=dtype)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        for name, p in state.model.named_parameters():
            state.ema[name].lerp_(p.detach(), 0.5)
    return state


def contents(state: TrainState) -> list[torch.Tensor]:
    moments = [v for s in state.optimizer.state.values() for v in s.values()]
    return [*state.model.state_dict().values(), *state.ema.values(), *moments]


def equal(a: TrainState, b: TrainState) -> bool:
    pairs = list(zip(contents(a), contents(b), strict=True))
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    state = train(new_state())
    return checkpoint.save(tmp_path / "checkpoints", state, step=2, recipe=RECIPE), state


# --------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, dtype):
    state = train(new_state(dtype=dtype))
    path = checkpoint.save(tmp_path, state, step=2, recipe=RECIPE)
    other = new_state(seed=1, dtype=dtype)
    assert not torch.equal(contents(other)[0], contents(state)[0])
    checkpoint.load(path, other)
    assert equal(other, state)
    assert equal(train(other, 3), train(state, 3))


def test_a_checkpoint_tells_its_step_recipe_and_files(saved):
    path, _ = saved
    info = checkpoint.read_info(path)
    assert (info.step, info.recipe, info.ranks) == (2, RECIPE, 1)
    assert set(info.files) == {".metadata", "__0_0.distcp"}


def test_the_average_alone_can_be_loaded(saved):
    path, state = saved
    model = new_state(seed=1).model
    checkpoint.load_average(path, model)
    assert all(torch.equal(p, state.ema[n]) for n, p in model.named_parameters())


def save_from_ranks(folder: Path) -> None:
    from hairpin.comm.mesh import init_mesh

    init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=20)
    checkpoint.save(folder, train(new_state()), step=2, recipe=RECIPE)


def load_on_ranks(path: Path) -> bool:
    from hairpin.comm.mesh import init_mesh

    init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=20)
    state = new_state(seed=1)
    checkpoint.load(path, state)
    return equal(state, train(new_state()))


@pytest.mark.parametrize(("writers", "readers"), [(3, 2), (1, 3)])
def test_another_number_of_ranks_reads_the_same(tmp_path, writers, readers):
    launch(save_from_ranks, writers, tmp_path, timeout_s=60)
    path = checkpoint.find(tmp_path)
    assert checkpoint.read_info(path).ranks == writers
    assert launch(load_on_ranks, readers, path, timeout_s=60) == [True] * readers


def sharded_state(seed: int) -> TrainState:
    from torch.distributed.fsdp import fully_shard

    from hairpin.comm.mesh import init_mesh

    mesh = init_mesh(dp=2, timeout_s=20)
    state = new_state(seed=seed)
    fully_shard(state.model, mesh=mesh.device_mesh)
    optimizer = torch.optim.AdamW(state.model.parameters(), lr=0.1)
    ema = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    return TrainState(state.model, optimizer, ema)


def save_sharded(folder: Path) -> None:
    checkpoint.save(folder, train(sharded_state(0)), step=2, recipe=RECIPE)


def load_sharded(path: Path) -> float:
    state = sharded_state(1)
    checkpoint.load(path, state)
    return state.model(torch.ones(1, 3)).sum().item()


def test_fsdp2_and_one_process_read_each_others_checkpoints(tmp_path):
    launch(save_sharded, 2, tmp_path / "sharded", timeout_s=60)
    state = new_state(seed=1)
    checkpoint.load(checkpoint.find(tmp_path / "sharded"), state)
    truth = train(new_state())
    for ours, theirs in zip(contents(state), contents(truth), strict=True):
        torch.testing.assert_close(ours, theirs)

    path = checkpoint.save(tmp_path / "whole", truth, step=2, recipe=RECIPE)
    expected = truth.model(torch.ones(1, 3)).sum().item()
    assert launch(load_sharded, 2, path, timeout_s=60) == pytest.approx([expected] * 2)


# ------------------------------------------------------------------------------------ whole or none


def test_only_the_newest_are_kept(tmp_path):
    state = new_state()
    for step in range(1, 6):
        checkpoint.save(tmp_path, state, step=step, recipe=RECIPE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert checkpoint.find(tmp_path).name == "step-00000005"


def test_a_run_taken_back_drops_what_came_later(tmp_path):
    state = new_state()
    for step in (10, 20, 30, 12):
        checkpoint.save(tmp_path, state, step=step, recipe=RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000012"]


def test_a_step_saved_again_replaces_the_old(tmp_path):
    checkpoint.save(tmp_path, new_state(), step=1, recipe=RECIPE)
    state = train(new_state(), 1)
    path = checkpoint.save(tmp_path, state, step=1, recipe=RECIPE)
    other = new_state(seed=3)
    checkpoint.load(path, other)
    assert equal(other, state)


def die_while_writing(folder: Path, stage: str) -> None:
    """Save step 1, then be killed in the save of step 2."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    state = train(new_state(), 1)
    checkpoint.save(folder, state, step=1, recipe=RECIPE)
    setattr(checkpoint, stage, die)
    checkpoint.save(folder, train(state, 1), step=2, recipe=RECIPE)


@pytest.mark.parametrize("stage", ["_write", "_finish", "_digest", "_sync", "_keep_newest"])
def test_a_kill_at_any_point_of_a_save_leaves_a_good_checkpoint(tmp_path, stage):
    with pytest.raises(RankFailure, match="killed by SIGKILL"):
        launch(die_while_writing, 1, tmp_path, stage, timeout_s=60)
    step = 2 if stage == "_keep_newest" else 1
    path = checkpoint.find(tmp_path)
    assert checkpoint.read_info(path).step == step
    state = new_state(seed=5)
    checkpoint.load(path, state)
    assert equal(state, train(new_state(), step))
    checkpoint.save(tmp_path, state, step=3, recipe=RECIPE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]  # nothing half done stays


# ----------------------------------------------------------------------------------- wrong, damaged


def test_a_checkpoint_of_another_model_lists_what_differs(saved):
    path, _ = saved
    other = new_state(width=5)
    layers = {"0": nn.Linear(3, 5), "extra": nn.Linear(2, 2)}
    other.model = nn.Sequential(OrderedDict(layers))
    with pytest.raises(CheckpointError) as info:
        checkpoint.load(path, other)
    message = str(info.value)
    assert "another model than this Sequential" in message
    assert "it lacks extra.weight, extra.bias" in message
    assert "it has besides 1.weight, 1.bias" in message
    assert "0.weight (saved [4, 3], model [5, 3])" in message


def data_file(path: Path) -> Path:
    return path / "__0_0.distcp"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_cut_short_is_named(saved, name):
    path, state = saved
    file = path / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{name} has \d+ bytes instead of \d+"):
        checkpoint.load(path, state)


def test_a_changed_byte_is_noticed(saved):
    path, state = saved
    data = bytearray(data_file(path).read_bytes())
    data[len(data) // 2] ^= 1
    data_file(path).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp was changed since it was written"):
        checkpoint.load(path, state)


def test_a_missing_file_is_named(saved):
    path, state = saved
    data_file(path).unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        checkpoint.load(path, state)


def test_a_damaged_description_is_named(saved):
    path, _ = saved
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged"):
        checkpoint.find(path)


def test_another_format_is_refused(saved):
    path, _ = saved
    file = path / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this Hairpin reads format 1"):
        checkpoint.find(path)


def test_an_older_one_is_taken_only_when_asked(tmp_path):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, new_state(), step=step, recipe=RECIPE)
    data_file(path).unlink()
    with pytest.raises(CheckpointError, match="step-00000001 is older: --fallback goes on from it"):
        checkpoint.find(tmp_path)
    assert checkpoint.find(tmp_path, fallback=True).name == "step-00000001"


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.find(tmp_path)


# ------------------------------------------------------------------------------------------ output


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .*file/out: Not a directory; choose"):
        checkpoint.require_writable(tmp_path / "file" / "out")


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, new_state(), step=1, recipe=RECIPE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OutputError, match=r"the checkpoint of step 2 .*No space left"):
        checkpoint.save(tmp_path, new_state(), step=2, recipe=RECIPE)
    assert checkpoint.find(tmp_path).name == "step-00000001"


# ------------------------------------------------------------------------------------------ export


def test_a_slim_copy_keeps_weights_exact_and_rounds_moments(saved, tmp_path):
    path, state = saved
    rows = "".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    slim = checkpoint.export(path, tmp_path / "slim")
    other = new_state(seed=1)
    checkpoint.load(slim, other)
    for (name, p), q in zip(other.model.named_parameters(), state.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(other.ema[name], state.ema[name])
        ours, theirs = other.optimizer.state[p], state.optimizer.state[q]
        assert torch.equal(ours["step"], theirs["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert ours[moment].dtype == torch.float32
            assert torch.equal(ours[moment], theirs[moment].bfloat16().float())
    history = checkpoint.history_of(slim)
    assert [json.loads(row)["step"] for row in history.read_text().splitlines()] == [1, 2]


def test_an_export_does_not_overwrite(saved):
    path, _ = saved
    with pytest.raises(OutputError, match="is there already"):
        checkpoint.export(path, path)
