"""`hairpin fold`: what it writes, what it refuses, and how a folder of targets ends."""

import json

import gemmi
import pytest

from hairpin.cli import fold as command


@pytest.fixture
def target(folder):
    (folder / "small.fasta").write_text(">query\nMAAHKGAEHHHK\n")
    (folder / "small.a3m").write_text(">query\nMAAHKGAEHHHK\n>a\nMAAHKGWWHHHK\n")
    return folder


def test_every_file_is_written_and_marked_as_a_rehearsal(run, target):
    words = ("fold", "small.fasta", "--msa", "small.a3m", "--random-weights", "tiny", "-o", "out")
    done = run(*words, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["rehearsal"].startswith("REHEARSAL")
    written = {path.name for path in (target / "out").iterdir()}
    assert written == {
        "random_tiny.pdb",
        "random_tiny.cif",
        "random_tiny_pae.png",
        "plddt.png",
        "msa_coverage.png",
        "distogram.png",
        "scores.json",
        "index.html",
    }
    assert {f"out/{name}" for name in written} == set(data["files"])
    for name in ("random_tiny.pdb", "random_tiny.cif"):
        structure = gemmi.read_structure(str(target / "out" / name))
        assert len(structure[0][0]) == 12
    for name in written - {path for path in written if path.endswith(".png")}:
        assert "REHEARSAL" in (target / "out" / name).read_text()
    for name in (path for path in written if path.endswith(".png")):
        assert (target / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_the_text_names_the_page(run, target):
    done = run("fold", "small.fasta", "--random-weights", "tiny", "--recycles", 0)
    assert done.code == 0
    assert done.out.splitlines()[0].startswith("REHEARSAL")
    assert done.out.splitlines()[-1] == "fold_small/index.html"
    assert "accuracy will suffer" in done.err


def test_a_trace_that_cannot_be_written_costs_nothing_else(run, target):
    (target / "out/random_tiny_trace.json").mkdir(parents=True)
    words = ("fold", "small.fasta", "--random-weights", "tiny", "--recycles", 0, "-o", "out")
    done = run(*words, "--trace", "--json")
    assert done.code == 0, done.err
    assert "the fold is not traced: cannot write out/random_tiny_trace.json" in done.err
    files = json.loads(done.out)["files"]
    assert "out/random_tiny.pdb" in files
    assert not any("trace" in file for file in files)


def test_without_weights_it_says_what_to_download(run, target):
    done = run("fold", "small.fasta")
    assert (done.code, done.out) == (2, "")
    for words in ("storage.googleapis.com/alphafold/alphafold_params_2022-12-06.tar", "CC BY 4.0"):
        assert words in done.err
    done = run("fold", "small.fasta", "--params", "params_model_1.npz")
    assert done.code == 2
    assert "params_model_1.npz: there is no such file" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--params", "x.npz", "--random-weights", "tiny"), "exclude each other"),
        (("--random-weights", "huge"), "there is no model 'huge'"),
        (("--random-weights", "tiny", "--memory", "lots"), "cannot read 'lots'"),
        (("--random-weights", "tiny", "--device", "abacus"), "no such device"),
        (("--random-weights", "tiny", "--msa", "none.a3m"), "none.a3m"),
        (("--random-weights", "tiny", "-o", "small.fasta"), "cannot write to small.fasta"),
    ],
)
def test_what_cannot_be_is_one_message(run, target, words, message):
    done = run("fold", "small.fasta", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("more", [(), ("--estimate",)])
@pytest.mark.parametrize("way", [("--product", "ring"), ("--passing", "ring")])
def test_one_rank_has_nobody_to_meet(run, target, monkeypatch, way, more):
    words = ("fold", "small.fasta", "--random-weights", "tiny", *way, *more)
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert f"{' '.join(way)}: one rank alone splits nothing; take --ranks of 2" in done.err
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):  # as torchrun starts one rank
        monkeypatch.setenv(name, value)
    assert run(*words) == done


def test_a_folder_goes_on_after_a_bad_target(run, target):
    (target / "all").mkdir()
    (target / "all/bad.fasta").write_text(">query\nMAA1\n")
    (target / "all/good.fasta").write_text(">query\nMAAG\n")
    (target / "all/pair.fa").write_text(">a\nMAAG\n>b\nMAAG\n")
    done = run("fold", "all", "--random-weights", "tiny", "--recycles", 0, "-o", "out")
    assert done.code == 1
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["target", "bad", "good", "pair"]
    assert "failed: all/bad.fasta, line 2" in lines[1]
    assert "random_tiny_multimer" in lines[3]
    assert "1 of 3 targets failed" in done.err
    assert (target / "out/good/index.html").is_file()


def test_an_estimate_needs_no_weights(run, target, monkeypatch):
    from hairpin.run.fold_count import Curve

    curve = Curve((1, 10, 100, 1000), (10**6, 10**7, 10**8, 10**9))
    monkeypatch.setattr(Curve, "of", lambda *_, **__: curve)
    done = run("fold", "small.fasta", "--estimate", "--random-weights", "tiny", "--json")
    data = json.loads(done.out)
    assert data["need"]["residues"] == 12
    assert data["rows"][0]["device"] == "NVIDIA H100 SXM 80 GB"
    assert data["rows"][0]["longest"] == 78_000
    assert not (target / "fold_small").exists()


def test_relaxing_without_openmm_is_skipped_with_a_reason(run, target, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmm", None)
    words = ("fold", "small.fasta", "--random-weights", "tiny", "--recycles", 0, "--relax")
    done = run(*words)
    assert done.code == 0
    assert "random_tiny.pdb is not relaxed: relaxing needs OpenMM" in done.err


def test_help_says_what_wishes_there_are(run):
    assert command.fold.__doc__.startswith("Fold proteins")
    done = run("fold", "--help")
    assert done.code == 0
    assert "--estimate" in done.out
