"""Folding with a tiny model: targets from files, predictions, memory counted before and after."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hairpin as hp
from hairpin.errors import FoldInputError, MemoryBudgetError, RecipeError, WeightsError
from hairpin.models.alphafold import AlphaFold, presets, weights
from hairpin.planning.axial.attach import AxialSplit
from hairpin.planning.axial.plan import AxialPlan
from hairpin.run import fold_count, fold_estimate
from hairpin.run.fold import (
    FoldModel,
    digest,
    expected_distances,
    features_of,
    model_from_file,
    out_of_memory,
    predict,
    random_model,
    ranked,
    scores_of,
    write_structures,
)
from hairpin.run.fold_inputs import coverage_letters, read_fold_target, targets_in
from hairpin.run.launch import launch

PROTEINS = Path(__file__).parents[2] / "../shared/data/proteins"
SEQUENCE = "MAAHKGAEHHHKAAEHH"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "one.fasta").write_text(f">query\n{SEQUENCE}\n")
    (tmp_path / "one.a3m").write_text(
        f">query\n{SEQUENCE}\n>a\n{SEQUENCE[:10]}-------\n>b\nMAAHKaaGAEWWWKAAEHH\n"
    )
    (tmp_path / "two.fasta").write_text(f">x\n{SEQUENCE}\n>y\nGAVLIM\n>z\n{SEQUENCE}\n")
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny")


@pytest.fixture(scope="module")
def tiny_multimer():
    return random_model("tiny", multimer=True, recycle_tolerance=None)


# ---------------------------------------------------------------------------------------- inputs


def test_an_alignment_belongs_to_the_chain_that_is_its_first_row(files):
    target = read_fold_target(files / "two.fasta", [files / "one.a3m"])
    assert target.names == ("A", "B", "C")
    assert [len(chain.alignments) for chain in target.chains] == [1, 0, 1]
    letters = coverage_letters(target)
    assert letters.shape == (1 + 2 + 2, 2 * len(SEQUENCE) + 6)
    rows = [row.tobytes().decode() for row in letters]
    assert rows[0] == SEQUENCE + "GAVLIM" + SEQUENCE
    assert rows[1] == SEQUENCE[:10] + "-" * (7 + 6 + len(SEQUENCE))
    assert rows[4] == "-" * (len(SEQUENCE) + 6) + "MAAHKGAEWWWKAAEHH"


def test_alignments_are_found_by_name_in_a_folder(files):
    target = read_fold_target(files / "one.fasta", [files])
    assert len(target.chains[0].alignments) == 1
    assert any("below 30" in note for note in target.notes)


def test_without_an_alignment_a_note_says_what_that_costs(files):
    target = read_fold_target(files / "one.fasta")
    assert any("accuracy will suffer" in note for note in target.notes)
    assert coverage_letters(target) is None


def test_an_alignment_of_none_of_the_chains_is_refused(files):
    (files / "other.a3m").write_text(">q\nWWWWWW\n")
    with pytest.raises(FoldInputError, match=r"other\.a3m: the first row is none of the 3 chains"):
        read_fold_target(files / "two.fasta", [files / "other.a3m"])


def test_hits_need_the_folder_of_structures(files):
    with pytest.raises(FoldInputError, match="give their folder with --templates"):
        read_fold_target(files / "one.fasta", hits=files / "x.hhr")
    with pytest.raises(FoldInputError, match="no such folder"):
        read_fold_target(files / "one.fasta", templates=files / "none")


def test_a_folder_without_fasta_files(tmp_path):
    with pytest.raises(FoldInputError, match="no FASTA file in this folder"):
        targets_in(tmp_path)


@pytest.mark.skipif(not PROTEINS.is_dir(), reason="shared/data/proteins is absent")
def test_templates_from_a_folder(tiny):
    folder = PROTEINS / "short73"
    msas = [folder / "mgnify_hits.sto"]
    target = read_fold_target(
        folder / "target.fasta", msas, templates=folder, hits=folder / "pdb70_hits.hhr"
    )
    assert len(target.chains[0].templates) > 0
    assert predict(tiny, target, recycles=0).plddt.shape == (73,)


# ----------------------------------------------------------------------------------- predictions


def test_a_prediction_has_every_score_and_every_block_is_told(files, tiny):
    target = read_fold_target(files / "one.fasta", [files / "one.a3m"])
    told = []
    found = predict(tiny, target, recycles=2, on_block=lambda *where: told.append(where))
    n = len(SEQUENCE)
    assert found.plddt.shape == (n,)
    assert ((found.plddt >= 0) & (found.plddt <= 100)).all()
    assert found.pae.shape == found.distances.shape == (n, n)
    assert 0 < found.ptm < 1
    assert found.iptm is None
    assert found.ranking == pytest.approx(found.mean_plddt, abs=1e-4)
    assert found.recycles == 2
    assert found.chains[0].sequence == SEQUENCE
    np.testing.assert_allclose(found.chains[0].b_factors[:, 1], found.plddt, atol=1e-4)
    blocks = tiny.config.evoformer_blocks + tiny.config.extra_msa_blocks + 1
    assert told == [(r, b, blocks) for r in range(3) for b in range(1, blocks + 1)]


def test_the_seed_decides(files, tiny):
    target = read_fold_target(files / "one.fasta", [files / "one.a3m"])
    first, again, other = (digest(predict(tiny, target, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert digest(predict(random_model("tiny"), target, seed=3)) == first


def test_a_complex_has_chains_and_an_interface_score(files, tiny_multimer):
    target = read_fold_target(files / "two.fasta", [files / "one.a3m"])
    found = predict(tiny_multimer, target, recycles=1)
    assert [chain.sequence for chain in found.chains] == [SEQUENCE, "GAVLIM", SEQUENCE]
    assert found.ranking == pytest.approx(0.8 * found.iptm + 0.2 * found.ptm)


def test_recycling_stops_early(files):
    model = random_model("tiny", recycle_tolerance=1e9)
    target = read_fold_target(files / "one.fasta")
    assert predict(model, target, recycles=5).recycles == 1


def test_a_model_for_one_chain_refuses_several(files, tiny):
    with pytest.raises(FoldInputError, match=r"two has 3 chains and tiny folds one"):
        predict(tiny, read_fold_target(files / "two.fasta"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_budget_below_what_chunks_reach_is_kept_by_loops(files, tiny):
    target = read_fold_target(files / "one.fasta", [files / "one.a3m"])
    whole = predict(tiny, target, recycles=1)
    budget = whole.peak_bytes * 8 // 10
    found = predict(tiny, target, recycles=1, memory=budget)
    assert found.peak_bytes <= budget
    np.testing.assert_allclose(found.plddt, whole.plddt, atol=1e-3)
    assert digest(predict(tiny, target, recycles=1)) == digest(whole)


def test_running_out_of_memory_says_what_to_do(files):
    target = read_fold_target(files / "one.fasta")
    where = torch.device("cpu")
    with (
        pytest.raises(MemoryBudgetError, match=r"17 residues need more memory.*--estimate"),
        out_of_memory(target, where),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), out_of_memory(target, where):
        raise RuntimeError("something else")


def test_distances_of_a_distogram_by_hand():
    """Edges 2, 4, 6: bins at 1, 3, 5, 7."""
    edges = torch.tensor([2.0, 4, 6])
    logits = torch.full((1, 2, 4), -1e9)
    logits[0, 0, 1] = 0
    logits[0, 1, 2:] = 0
    found = expected_distances({"logits": logits, "bin_edges": edges})
    torch.testing.assert_close(found, torch.tensor([[3.0, 6.0]]))


def test_the_best_is_first_and_scores_are_plain(files, tiny):
    target = read_fold_target(files / "one.fasta")
    found = predict(tiny, target, recycles=0)
    low, high = replace(found, ranking=1.0), replace(found, ranking=2.0, pae=None, ptm=None)
    assert ranked([low, high]) == [high, low]
    data = json.loads(json.dumps(scores_of(target, [high, low])))
    assert data["rehearsal"].startswith("REHEARSAL WITH RANDOM WEIGHTS (tiny)")
    assert [model["rank"] for model in data["models"]] == [1, 2]
    assert data["models"][0]["pae"] is None
    assert len(data["models"][1]["pae"]) == len(SEQUENCE)


def test_structures_of_a_rehearsal_say_so(files, tiny):
    found = predict(tiny, read_fold_target(files / "one.fasta"), recycles=0)
    for path in write_structures(found, files):
        text = " ".join(path.read_text().replace("REMARK   1", "").split())
        assert "REHEARSAL WITH RANDOM WEIGHTS (tiny): the structure and its scores" in text


# ---------------------------------------------------------------------------------------- models


def test_weights_are_read_and_the_model_told_from_them(files, tiny, tmp_path):
    weights.save_npz(tiny.network, tmp_path / "params_mine_ptm.npz")
    model = model_from_file(tmp_path / "params_mine_ptm.npz")
    assert (model.name, model.rehearsal) == ("mine_ptm", "")
    assert model.config.c_m == tiny.config.c_m
    told = {name: getattr(tiny.config, name) for name in ("structure", "data", "recycles")}
    model = model_from_file(tmp_path / "params_mine_ptm.npz", **told)
    target = read_fold_target(files / "one.fasta", [files / "one.a3m"])
    assert digest(predict(model, target)) == digest(predict(tiny, target))


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"alphafold_params_2022-12-06\.tar"):
        model_from_file(tmp_path / "params_model_1.npz")


def test_an_unknown_preset():
    with pytest.raises(RecipeError, match="there is no model 'huge'"):
        random_model("huge")


# -------------------------------------------------------------------------------------- estimate


def test_the_count_is_what_a_run_holds(files, tiny):
    """Counted on shapes against measured in the run, and features against the real ones."""
    target = read_fold_target(files / "one.fasta", [files / "one.a3m"])
    need = fold_count.count(tiny.config, len(SEQUENCE), rows=3, recycles=1)
    assert need.activation_bytes == predict(tiny, target, recycles=1).peak_bytes
    assert need.parameter_bytes == 4 * sum(p.numel() for p in tiny.network.parameters())
    names = fold_count.shapes_of(tiny.config, len(SEQUENCE), 3)
    assert set(names) == set(tiny.network.needed_features)
    for batch in features_of(tiny.config, target, 1, 0):
        for name, shape in names.items():
            assert batch[name].shape == shape.shape, name
            assert batch[name].dtype == shape.dtype, name


@pytest.mark.parametrize("recycles", [0, 1, 3])
def test_the_count_holds_for_any_number_of_recycles(tiny, recycles, tmp_path):
    """With a deep alignment, where a row that keeps its MSA alive would show."""
    rows = "".join(f">r{i}\n{SEQUENCE[: i % 17]}{'G' * (17 - i % 17)}\n" for i in range(1, 17))
    (tmp_path / "one.fasta").write_text(f">query\n{SEQUENCE}\n")
    (tmp_path / "one.a3m").write_text(f">query\n{SEQUENCE}\n{rows}")
    target = read_fold_target(tmp_path / "one.fasta", [tmp_path / "one.a3m"])
    deep = len(target.chains[0].alignments[0].letters)
    need = fold_count.count(
        tiny.config, len(SEQUENCE), rows=deep, recycles=recycles, with_flops=False
    )
    assert need.activation_bytes == predict(tiny, target, recycles=recycles).peak_bytes


def test_the_count_of_one_rank_does_not_depend_on_how_it_would_meet_others(tiny):
    shapes = fold_count.shapes_of(tiny.config, 17, 3)
    ways = [AxialPlan(), AxialPlan(product="ring", passing="ring")]
    alone, ring = (
        fold_count.activation_bytes(tiny.config, shapes, recycles=0, over=way) for way in ways
    )
    assert ring == alone


def deep_case(folder):
    """A model whose stacks hold most, with three Evoformer blocks, and a target for it."""
    config = presets.tiny()
    config = replace(
        config,
        template=None,
        evoformer_blocks=3,
        evoformer=replace(config.evoformer, pair_heads=16, msa_heads=16),
        data=replace(config.data, max_extra_msa=64, max_msa_clusters=48),
    )
    rows = "".join(f">r{i}\n{'G' * i}{'A' * (23 - i)}\n" for i in range(1, 23))
    more = "".join(f">s{i}\n{'W' * i}{'L' * (23 - i)}\n" for i in range(1, 23))
    (folder / "deep.fasta").write_text(f">query\n{SEQUENCE}GAVLIM\n")
    (folder / "deep.a3m").write_text(f">query\n{SEQUENCE}GAVLIM\n{rows}{more}")
    return config, read_fold_target(folder / "deep.fasta", [folder / "deep.a3m"])


def predict_over(config, target, over, memory=None):
    """What this rank predicts and has sent."""
    mesh = hp.init_mesh(sp=over.ranks)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FoldModel("deep", AlphaFold(config).eval().requires_grad_(False))
    split = AxialSplit(over, mesh)
    found = predict(model, target, recycles=1, memory=memory, split=split)
    return found, mesh.traffic.bytes_sent


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "product", "passing"),
    [
        (2, "ring", "ring"),
        pytest.param(3, "channels", "gather", marks=pytest.mark.slow),
        pytest.param(4, "gather", "gather", marks=pytest.mark.slow),
    ],
)
def test_the_count_of_a_split_model_is_what_its_first_rank_holds_and_sends(
    tmp_path, ranks, product, passing
):
    config, target = deep_case(tmp_path)
    over = AxialPlan(degree=ranks, product=product, passing=passing)
    need = fold_count.count(config, 23, rows=45, recycles=1, over=over)
    found = launch(predict_over, ranks, config, target, over, timeout_s=200)
    prediction, sent_bytes = found[0]
    assert need.sent_bytes == sent_bytes
    scratch_bytes = need.activation_bytes - prediction.peak_bytes  # of kernels, which no run sees
    assert 0 <= scratch_bytes < 0.005 * need.activation_bytes
    alone = fold_count.count(config, 23, rows=45, recycles=1)
    assert need.activation_bytes < 0.7 * alone.activation_bytes
    assert need.flops < 0.7 * alone.flops
    assert alone.sent_bytes == 0
    assert {digest(one) for one, _ in found} == {digest(prediction)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_budget_is_kept_in_chunks(tmp_path, ranks):
    config, target = deep_case(tmp_path)
    over = AxialPlan(degree=ranks)
    whole = fold_count.count(config, 23, rows=45, recycles=1, with_flops=False, over=over)
    budget = whole.activation_bytes * 9 // 10
    one, *others = launch(predict_over, ranks, config, target, over, budget, timeout_s=200)
    assert one[0].peak_bytes <= budget
    truth, _ = predict_over(config, target, AxialPlan())
    assert digest(one[0]) == digest(truth)
    assert all(digest(other) == digest(truth) for other, _ in others)


def test_a_budget_that_chunks_do_not_reach(tiny):
    shapes = fold_count.shapes_of(tiny.config, 17, 3)
    with pytest.raises(MemoryBudgetError, match=r"17 residues .* each of 2 ranks.*reach") as got:
        fold_count.within(tiny.config, shapes, 9999, recycles=0, over=AxialPlan(degree=2))
    least = fold_count.activation_bytes(tiny.config, shapes, recycles=0, over=AxialPlan(degree=2))
    assert 9999 < got.value.floor_bytes <= least


def test_the_count_of_a_complex(files, tiny_multimer):
    """The model chooses its rows itself; what sorting them takes is counted, not measured."""
    target = read_fold_target(files / "two.fasta", [files / "one.a3m"])
    (batch,) = features_of(tiny_multimer.config, target, 1, 0)
    rows, residues = batch["msa"].shape
    names = fold_count.shapes_of(tiny_multimer.config, residues, rows)
    assert set(names) == set(tiny_multimer.network.needed_features)
    for name, shape in names.items():
        assert batch[name].shape == shape.shape, name
        assert batch[name].dtype == shape.dtype, name
    need = fold_count.count(tiny_multimer.config, residues, rows=rows, recycles=1)
    real = predict(tiny_multimer, target, recycles=1)
    assert need.activation_bytes == pytest.approx(real.peak_bytes, rel=0.005)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_count_of_one_block_of_full_width():
    """At 300 residues with 384 sequences and a recycle, by the profiler of this library."""
    residues, rows = 300, 384
    config = replace(presets.named("model_3_ptm"), evoformer_blocks=1, extra_msa_blocks=1)
    need = fold_count.count(config, residues, rows=rows, recycles=1, with_flops=False)
    network = AlphaFold(config).eval().requires_grad_(False)
    batch = {
        name: torch.ones(shape.shape, dtype=shape.dtype)
        for name, shape in fold_count.shapes_of(config, residues, rows).items()
    }
    batches = [batch, dict(batch)]
    found = hp.profile(network, ((batches,), {"recycles": 1}), repeats=1)
    assert need.activation_bytes == found.peak_bytes
    assert need.parameter_bytes == 4 * sum(p.numel() for p in network.parameters())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_longest_that_fits_is_near_what_is_counted():
    """Room for exactly so many residues: the cubic finds that length, within 5 %."""
    config = presets.named("model_1_ptm")
    curve = fold_count.Curve.of(config)
    for residues in (500, 700, 1200, 2000, 3000):
        need = fold_count.count(config, residues, with_flops=False)
        assert curve.longest(need.total_bytes) == pytest.approx(residues, rel=0.05)


def test_a_run_surely_takes_less_than_the_quick_bound(tiny):
    need = fold_count.count(tiny.config, 150, rows=60, recycles=1, with_flops=False)
    assert need.total_bytes < fold_estimate._surely_less(tiny.config, 150, 60)


def test_flops_grow_by_the_same_with_every_block(tiny):
    shapes = fold_count.shapes_of(tiny.config, 20, 4)
    two, three, five = (
        fold_count._flops(replace(tiny.config, evoformer_blocks=n), shapes) for n in (2, 3, 5)
    )
    assert five - three == 2 * (three - two) > 0


def test_flops_of_attention_are_counted(tiny):
    """Two products of 2 x 3 x 5 x 5 x 4 multiplications and additions each."""
    q = torch.empty(2, 3, 5, 4)
    assert fold_count._attention_flops(q.shape, q.shape, q.shape) == 2 * (2 * 2 * 3 * 5 * 5 * 4)


def test_the_table_says_what_fits():
    need = fold_count.Need(100, 508, 920, 3, 2**20, 2**20, 2**30, 10**13)
    rows = (
        fold_estimate.Row("big", 2**40, True, 12.0, 5000),
        fold_estimate.Row("small", 2**20, False, 99.0, 7),
    )
    text = fold_estimate.table(fold_estimate.FoldEstimate("x", "model_1", need, rows))
    big, small = (
        next(li for li in text.splitlines() if li.startswith(n)) for n in ("big", "small")
    )
    assert big.split() == ["big", "1.00", "TiB", "yes", "12.00", "s", "5,000", "residues"]
    assert small.split() == ["small", "1.00", "MiB", "no", "7", "residues"]
    assert "10.0 TFLOP" in text


def test_the_curve_goes_through_a_cubic():
    lengths = (10, 20, 40, 80)
    curve = fold_count.Curve(lengths, tuple(7 + 3 * n + 2 * n**2 + n**3 for n in lengths))
    assert curve.at(60) == pytest.approx(7 + 180 + 7200 + 216000)
    assert curve.longest(7 + 3 * 55 + 2 * 55**2 + 55**3) == 55
    assert curve.longest(7 + 3 * 55 + 2 * 55**2 + 55**3 - 1) == 54


def test_ranks_share_the_room_of_a_machine(files, monkeypatch):
    over = AxialPlan(degree=3, product="ring", passing="ring")
    curve = fold_count.Curve((1, 10, 100, 1000), (10**6, 10**7, 10**8, 10**9))
    monkeypatch.setattr(fold_count.Curve, "of", lambda *_, **__: curve)
    monkeypatch.setattr(fold_estimate, "free_bytes", lambda _: 3 * 10**5)
    given = (files / "one.fasta", [files / "one.a3m"])
    with pytest.raises(MemoryBudgetError, match=r"for each of 3 ranks, and cpu has 97\.66 KiB"):
        fold_estimate.require_room_for_ranks(*given, over, preset="tiny")
    monkeypatch.setattr(fold_estimate, "free_bytes", lambda _: 3 * 10**9)
    fold_estimate.require_room_for_ranks(*given, over, preset="tiny")


def test_no_room_is_an_error_with_what_would_fit(files, tiny, monkeypatch):
    target = read_fold_target(files / "one.fasta")
    monkeypatch.setattr(fold_estimate, "free_bytes", lambda _: 2**18)
    monkeypatch.setattr(fold_count, "_NODES", (16, 32))
    with pytest.raises(MemoryBudgetError, match=r"17 residues need .* about \d+ res") as got:
        fold_estimate.require_room(tiny.config, target, torch.device("cpu"), recycles=1)
    assert got.value.floor_bytes > 2**18
    monkeypatch.setattr(fold_estimate, "free_bytes", lambda _: 2**40)
    fold_estimate.require_room(tiny.config, target, torch.device("cpu"), recycles=1)


def test_the_table_of_devices():
    devices = {device.name: device for device in fold_estimate.known_devices()}
    assert devices["NVIDIA H100 SXM 80 GB"].memory_bytes == 78 * 10**9
    assert len(devices) >= 5
    assert fold_estimate.this_device().flops_per_s > 0


def test_ranks_share_the_cores_of_a_machine(monkeypatch):
    """As many threads for each as there are cores, and no less than one."""
    monkeypatch.setattr(fold_estimate, "_product_flops_per_s", lambda threads: threads * 1e9)
    monkeypatch.setattr(fold_estimate, "usable_cores", lambda: 6)
    speeds = {n: fold_estimate.this_device(n).flops_per_s for n in (2, 3, 4, 12)}
    once = fold_estimate._CPU_EFFICIENCY * 1e9
    assert speeds == {2: 3 * once, 3: 2 * once, 4: once, 12: once / 2}
    assert fold_estimate.this_device(2).name == "this CPU, 3 threads for each of 2 ranks"


def test_presets_have_shapes_for_the_features_they_need():
    for config in (presets.tiny(), presets.tiny(multimer=True), presets.model_3()):
        network = fold_count._on_meta(fold_count._short(config, 1))
        names = fold_count.shapes_of(config, 10, None)
        assert set(network.needed_features) <= set(names)
