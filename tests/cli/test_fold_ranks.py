"""`hairpin fold --ranks`: the structure of one rank, files of the first, one message on failure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gemmi
import numpy as np
import pytest

from hairpin.models.alphafold import weights
from hairpin.run import fold

ROOT = Path(__file__).parents[2]
SEQUENCE = "MAAHKGAEHHHKLVF"
ALONE = "PEPTIDE"
REHEARSED = ("--random-weights", "tiny", "--recycles", 0)
_real = fold.features_of


@pytest.fixture
def targets(folder):
    (folder / "all").mkdir()
    (folder / "all/bad.fasta").write_text(">query\nMAA1\n")
    (folder / "all/good.fasta").write_text(f">query\n{SEQUENCE}\n")
    (folder / "all/good.a3m").write_text(f">query\n{SEQUENCE}\n>a\n{SEQUENCE[::-1]}\n")
    (folder / "all/pair.fa").write_text(f">a\n{SEQUENCE}\n>b\n{ALONE}\n")
    return folder


def positions(path):
    """Atoms ``[atom, 3]`` in Angstrom, unrounded beyond what the file holds."""
    structure = gemmi.read_structure(str(path))
    atoms = [atom.pos.tolist() for chain in structure[0] for residue in chain for atom in residue]
    return np.array(atoms)


@pytest.mark.timeout(300)
def test_a_folder_over_ranks_gives_the_structures_of_one(run, targets):
    """A monomer, a complex of two chains, and a target that is refused."""
    words = ("fold", "all", "--msa", "all", *REHEARSED, "--trace", "--json")
    alone = run(*words, "-o", "alone")
    split = run(*words, "-o", "split", "--ranks", 2, "--product", "channels")
    assert (alone.code, split.code) == (1, 1), split.err
    ours, theirs = json.loads(split.out), json.loads(alone.out)
    assert [result["target"] for result in ours] == ["bad", "good", "pair"]
    assert ours[0] == theirs[0]
    assert "line 2" in ours[0]["error"]
    names = {"good": "random_tiny", "pair": "random_tiny_multimer"}
    for (target, name), mine, wanted in zip(names.items(), ours[1:], theirs[1:], strict=True):
        path = f"{target}/{name}.cif"
        found, truth = positions(targets / "split" / path), positions(targets / "alone" / path)
        assert np.abs(truth).max() > 0.5
        assert found == pytest.approx(truth, abs=1e-3)
        for figure in ("mean_plddt", "ptm", "ranking_score"):
            assert mine["models"][0][figure] == pytest.approx(wanted["models"][0][figure], abs=1e-3)
        assert [Path(file).name for file in mine["files"]] == [
            Path(file).name for file in wanted["files"]
        ]
        assert all((targets / file).is_file() for file in mine["files"])
        events = json.loads((targets / f"split/{target}/{name}_trace.json").read_text())
        ranks = {e["pid"] for e in events["traceEvents"] if e.get("cat") == "transfer"}
        assert ranks == {0, 1}


@pytest.mark.timeout(300)
def test_a_target_over_the_budget_does_not_stop_the_others(run, folder):
    (folder / "all").mkdir()
    (folder / "all/long.fasta").write_text(f">query\n{SEQUENCE * 4}\n")
    (folder / "all/short.fasta").write_text(f">query\n{SEQUENCE[:6]}\n")
    words = ("fold", "all", *REHEARSED, "--memory", "1MiB", "--ranks", 2, "-o", "out", "--json")
    done = run(*words)
    assert done.code == 1, done.err
    long, short = json.loads(done.out)
    assert "at 60 residues do not fit into 1.00 MiB on each of 2 ranks" in long["error"]
    assert 0 < short["models"][0]["peak_bytes"] <= 2**20
    assert "1 of 2 targets failed" in done.err


@pytest.mark.timeout(300)
def test_files_that_cannot_be_written_between_two_models_fail_one_target_alone(run, folder):
    network = fold.random_model("tiny").network
    words = ("fold", "all", "--recycles", 0, "--ranks", 2, "-o", "out", "--json")
    for name in ("first.safetensors", "second.safetensors"):
        weights.save_safetensors(network, folder / name)
        words += ("--params", name)
    (folder / "all").mkdir()
    for name in ("a", "b"):
        (folder / f"all/{name}.fasta").write_text(f">query\n{SEQUENCE[:6]}\n")
    (folder / "out/a/first.pdb").mkdir(parents=True)
    done = run(*words)
    assert done.code == 1, done.err
    spoilt, whole = json.loads(done.out)
    assert spoilt["error"].startswith("cannot write out/a/first.pdb: Is a directory")
    assert [row["model"] for row in whole["models"]] == ["first", "second"]
    assert "different work" not in done.err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_models_are_ranked_over_ranks(run, targets):
    for seed in (1, 2):
        network = fold.random_model("tiny", seed=seed).network
        weights.save_safetensors(network, targets / f"model_{seed}.safetensors")
    words = ("fold", "all/good.fasta", "--params", "model_1.safetensors", "--recycles", 0)
    words += ("--params", "model_2.safetensors", "--json")
    ours, theirs = (
        json.loads(run(*words, "-o", out, *more).out)["models"]
        for out, more in (("split", ("--ranks", 2, "--passing", "ring")), ("alone", ()))
    )
    assert [row["model"] for row in ours] == [row["model"] for row in theirs]
    assert ours[0]["ranking_score"] >= ours[1]["ranking_score"]
    assert ours[0]["ranking_score"] == pytest.approx(theirs[0]["ranking_score"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_only_the_first_rank_speaks(targets):
    words = ("fold", "all/good.fasta", *REHEARSED, "-o", "out", "--ranks", 2)
    done = subprocess.run(
        [sys.executable, "-m", "hairpin.cli", *map(str, words)],
        cwd=targets,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stderr.count("accuracy will suffer") == 1
    assert done.stderr.count("REHEARSAL") == 1
    assert done.stdout.splitlines()[-1] == "out/index.html"


def killed_on_the_second(*given):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return _real(*given)


def raising_on_the_second(*given):
    if os.environ["RANK"] == "1":
        raise MemoryError("no room at all")
    return _real(*given)


def other_on_the_second(*given):
    found = _real(*given)
    if os.environ["RANK"] == "1":
        found[0]["msa_feat"][0, 0, 0] += 1
    return found


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (killed_on_the_second, ["rank 1 of 2 was killed by SIGKILL"]),
        (raising_on_the_second, ["rank 1 of 2 failed: MemoryError: no room at all"]),
        (
            other_on_the_second,
            ["the ranks of mesh axis 'sp' were given different work", "'msa_feat'"],
        ),
    ],
)
def test_a_failure_of_one_rank_ends_all(run, targets, monkeypatch, change, messages):
    """Even in a folder, where a target that is refused would not stop the others."""
    monkeypatch.setattr(fold, "features_of", change)
    began = time.monotonic()
    done = run("fold", "all", "--msa", "all", *REHEARSED, "--ranks", 2, "-o", "out")
    assert time.monotonic() - began < 60
    assert (done.code, done.out) == (1, ""), done
    assert all(message in done.err for message in messages)
    assert not list((targets / "out").glob("*/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "1 banana"), "'1 banana'"),
        (("--device", "cuda:1"), "--device cuda:1: each of 2 ranks takes a device of its own"),
        (("--device", "cuda", "--ranks", 99), "--device cuda: 99 ranks need as many GPUs"),
        (("--passing", "teleport"), "passing='teleport': write one of gather, ring"),
    ],
)
def test_what_ranks_cannot_do_is_one_message(run, targets, words, message):
    done = run("fold", "all/good.fasta", *REHEARSED, "--ranks", 2, *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_ranks_of_other_machines_need_no_gpu_here(run, targets, monkeypatch):
    """Under torchrun on two machines of 8 GPUs each; what is wrong is found after that."""
    started = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    words = ("fold", "all/good.fasta", "--device", "cuda", "--params", "none.npz")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert "none.npz: there is no such file" in run(*words).err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert "--device cuda: 8 ranks need as many GPUs, and torch sees 7" in run(*words).err
