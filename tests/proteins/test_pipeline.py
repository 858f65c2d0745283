"""From files to batches: names and shapes as DeepMind's, reproducible, with warnings as data."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hairpin.errors import FoldInputError, RecipeError
from hairpin.models.alphafold.config import DataConfig
from hairpin.proteins import pipeline
from hairpin.proteins.alignments import read_a3m
from hairpin.proteins.labels import label_features
from hairpin.proteins.residues import RESTYPES
from hairpin.proteins.sizes import Sizes
from hairpin.proteins.structures import read_structure
from hairpin.proteins.templates import Template
from proteins.tiny import names_of, simple

SEQUENCE = "ACDEFGHIKLMNPQRSTVWY"
SIZES = Sizes(max_msa_clusters=8, max_extra_msa=12, max_templates=4, recycles=2)
ORACLE = Path(__file__).parents[3] / "shared" / "data" / "alphafold_oracle"


@pytest.fixture
def alignment(write):
    rng = np.random.default_rng(0)
    text = f">target\n{SEQUENCE}\n"
    for i in range(40):
        row = [a if rng.random() < 0.6 else rng.choice([*"ACDW-"]) for a in SEQUENCE]
        row.insert(int(rng.integers(0, 20)), "kk" if i % 3 else "")
        text += f">tr|A0A0A0{i:03}|X_S{i}\n{''.join(row)}\n"
    return read_a3m(write("a.a3m", text))


def template(name="1abc_A", residues=20):
    return Template(
        name, SEQUENCE[:residues], np.ones((residues, 37, 3), np.float32),
        np.ones((residues, 37), np.float32), 9.0,
    )  # fmt: skip


def test_names_types_and_shapes(alignment):
    first, *others = pipeline.monomer_features(SEQUENCE, [alignment], [template()], sizes=SIZES)
    assert len(others) == 2
    shapes = {name: tuple(value.shape) for name, value in first.items()}
    assert shapes["msa_feat"] == (8, 20, 49)
    assert shapes["extra_msa"] == (12, 20)
    assert shapes["target_feat"] == (20, 22)
    assert shapes["template_all_atom_positions"] == (4, 20, 37, 3)
    assert {value.dtype for value in first.values()} == {torch.int64, torch.float32}
    assert first["target_feat"].argmax(-1).tolist() == [1 + RESTYPES.index(a) for a in SEQUENCE]


@pytest.mark.skipif(not ORACLE.is_dir(), reason="needs ../shared/data/alphafold_oracle")
def test_the_batch_has_every_feature_that_the_oracle_has(alignment, write):
    pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
    oracle = np.load(ORACLE / "monomer_ptm_templates_recycle1.npz")
    wanted = {key[5:]: oracle[key] for key in oracle if key.startswith("feat/")}
    structure = read_structure(write("1abc.cif", simple(SEQUENCE)))
    labels = label_features(SEQUENCE, structure, structure.chain("A"))
    batch = pipeline.monomer_target(SEQUENCE, [alignment], [template()], labels=labels).batches(
        SIZES, 0
    )[0]
    from_labels = {name for name in wanted if name.startswith(("atom14_gt", "atom14_alt", "chi_"))}
    from_labels |= {name for name in wanted if name.startswith(("rigidgroups", "backbone"))}
    from_labels |= {"atom14_atom_is_ambiguous"}  # the model derives these from the labels
    assert set(wanted) - set(batch) == from_labels
    residues = len(wanted["aatype"])
    for name in set(wanted) & set(batch):
        assert batch[name].dim() == wanted[name].ndim, name
        assert batch[name].is_floating_point() == (wanted[name].dtype.kind == "f"), name
    numbers = "".join((RESTYPES + "X")[a] for a in wanted["aatype"])
    again = pipeline.monomer_features(numbers, sizes=SIZES)[0]
    assert residues == len(numbers)
    of_sequence = ("aatype", "residue_index", "seq_mask", "target_feat", "residx", "atom14_atom_ex")
    for name in (name for name in wanted if name.startswith((*of_sequence, "atom37_atom_exists"))):
        np.testing.assert_array_equal(again[name].numpy(), wanted[name], err_msg=name)


@pytest.mark.skipif(not ORACLE.is_dir(), reason="needs ../shared/data/alphafold_oracle")
def test_a_complex_has_every_feature_that_the_oracle_has(alignment):
    oracle = np.load(ORACLE / "multimer_v3_three_chains.npz")
    wanted = {key[5:]: oracle[key] for key in oracle if key.startswith("feat/")}
    chain = pipeline.ChainInput(SEQUENCE, [alignment], templates=[template()])
    (batch,) = pipeline.multimer_features([chain], sizes=SIZES)
    assert set(wanted) - set(batch) == {"all_atom_positions", "all_atom_mask"}  # labels
    for name in set(wanted) & set(batch):
        assert batch[name].dim() == wanted[name].ndim, name
        assert batch[name].is_floating_point() == (wanted[name].dtype.kind == "f"), name


def test_sizes_take_the_settings_of_a_model():
    config = DataConfig(max_msa_clusters=9, max_templates=4, crop_size=7, same=0.2)
    assert asdict(Sizes.of(config, recycles=5)) == asdict(config) | {"recycles": 5}


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_msa_clusters": 4, "max_templates": 4, "clusters_hold_templates": True},
        {"crop_size": -1},
        {"recycles": -1},
    ],
)
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(RecipeError, match="at least one cluster row must be left"):
        Sizes(**sizes)


def test_recycles_differ_in_the_msa_alone_and_seeds_reproduce(alignment):
    one = pipeline.monomer_features(SEQUENCE, [alignment], [template()], sizes=SIZES, seed=3)
    two = pipeline.monomer_features(SEQUENCE, [alignment], [template()], sizes=SIZES, seed=3)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    differ = {name for name in one[0] if not torch.equal(one[0][name], one[1][name])}
    assert {"msa_feat", "true_msa", "bert_mask", "extra_msa"} <= differ
    assert not any(name.startswith(("template", "aatype", "target", "residx")) for name in differ)
    other = pipeline.monomer_features(SEQUENCE, [alignment], [template()], sizes=SIZES, seed=4)
    assert not torch.equal(one[0]["msa_feat"], other[0]["msa_feat"])


def test_template_rows_may_take_the_place_of_clusters(alignment):
    sizes = Sizes(max_msa_clusters=8, max_templates=3, clusters_hold_templates=True)
    batch = pipeline.monomer_features(SEQUENCE, [alignment], sizes=sizes)[0]
    assert batch["msa_feat"].shape[0] == 5
    assert batch["template_mask"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("sequence", ["A", "X", "G"])
def test_length_one_works(sequence):
    (batch, *_) = pipeline.monomer_features(sequence, sizes=SIZES)
    assert batch["msa_feat"].shape == (1, 1, 49)
    assert all(torch.isfinite(value).all() for value in batch.values() if value.is_floating_point())


def test_a_single_sequence_is_warned_of_in_data(alignment):
    (warning,) = pipeline.monomer_target(SEQUENCE).warnings
    assert "no alignment" in warning
    assert "accuracy will suffer" in warning
    assert pipeline.monomer_target(SEQUENCE, [alignment]).warnings == ()
    (shallow,) = pipeline.monomer_target(SEQUENCE, [alignment.first(5)]).warnings
    assert "5 different sequences" in shallow


def test_unknown_residues_are_warned_of_and_folded_as_unknown(write):
    a = read_a3m(write("a.a3m", ">t\nAXU\n"), "AXU")
    target = pipeline.monomer_target("AXU", [a])
    assert "2 residues are none of the twenty amino acids (X2, U3)" in target.warnings[1]
    batch = target.batches(SIZES, 0)[0]
    assert batch["aatype"].tolist() == [0, 20, 20]
    assert batch["atom37_atom_exists"][1:].sum() == 0


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "the sequence is empty"),
        ("AC DE", "' ' at letter 3 is no amino acid"),
        ("ACDEF", r"a.a3m: the first row has 20 columns and the target 5 residues"),
    ],
)
def test_bad_targets(alignment, sequence, message):
    with pytest.raises(FoldInputError, match=message):
        pipeline.monomer_features(sequence, [alignment], sizes=SIZES)


def test_crops_are_alike_in_every_recycle(alignment):
    sizes = Sizes(max_msa_clusters=8, max_extra_msa=12, max_templates=2, crop_size=7)
    batches = pipeline.monomer_features(SEQUENCE, [alignment], [template()], sizes=sizes, seed=5)
    assert len({tuple(batch["residue_index"].tolist()) for batch in batches}) == 1
    batch = batches[-1]
    assert batch["msa_feat"].shape == (8, 7, 49)
    assert batch["template_all_atom_positions"].shape == (2, 7, 37, 3)
    assert batch["seq_length"] == 7
    assert (batch["true_msa"][0] == batch["aatype"]).all()


# ---------------------------------------------------------------------------------------- labels


def test_labels_of_the_chain_itself_and_of_a_relative(write):
    pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
    structure = read_structure(write("1abc.cif", simple("WW" + SEQUENCE.replace("M", "V"))))
    labels = label_features(SEQUENCE, structure, structure.chain("A"), clamped=False)
    assert labels["all_atom_mask"].shape == (20, 37)
    np.testing.assert_allclose(
        labels["all_atom_positions"][:, 1, 0], 3.8 * (2 + np.arange(20)), 1e-5
    )
    assert labels["pseudo_beta_mask"].all()
    assert labels["resolution"] == np.float32(1.8)
    assert labels["use_clamped_fape"] == 0
    with pytest.raises(
        FoldInputError, match=r"chain A has another sequence: .* agree .* name another"
    ):
        label_features("WYWYWYWYWYWYWYWYWYWY", structure, structure.chain("A"))
    assert names_of("AX") == ["ALA", "UNK"]


# --------------------------------------------------------------------------------------- multimer


def test_a_complex_has_its_chains_told_apart(alignment, write):
    b = read_a3m(write("b.a3m", ">t\nACDE\n>tr|A0A0A0001|X_S1\nACWE\n>tr|A0A0A0002|X_S2\nkAC-E\n"))
    a_chain = pipeline.ChainInput(SEQUENCE, [alignment], templates=[template()])
    b_chain = pipeline.ChainInput("ACDE", [b])
    (batch,) = pipeline.multimer_features([a_chain, b_chain, a_chain], sizes=SIZES)
    assert batch["asym_id"].tolist() == [1] * 20 + [2] * 4 + [3] * 20
    assert batch["entity_id"].tolist() == [1] * 20 + [2] * 4 + [1] * 20
    assert batch["sym_id"].tolist() == [1] * 20 + [1] * 4 + [2] * 20
    assert batch["residue_index"].tolist() == [*range(20), *range(4), *range(20)]
    assert batch["msa"].shape == batch["deletion_matrix"].shape == batch["msa_mask"].shape
    assert batch["msa"][0].tolist() == batch["aatype"].tolist()
    assert batch["template_all_atom_mask"].shape == (4, 44, 37)
    assert batch["template_aatype"][0, :20].tolist() == batch["aatype"][:20].tolist()
    assert not batch["template_all_atom_mask"][:, 20:24].any()
    paired = (batch["msa"] != 21).any(-1) & (batch["msa"][:, 20:24] != 21).any(-1)
    assert paired.sum() == 3  # the targets, S1 and S2
    assert batch["deletion_matrix"][:, 20].max() == 1


def test_own_alignments_for_pairing(alignment, write):
    plain = read_a3m(write("p.a3m", ">t\nACDE\n>one\nACWE\n"))
    named = read_a3m(write("n.a3m", ">t\nACDE\n>tr|A0A0A0001|X_S1\nGGDE\n"))
    a = pipeline.ChainInput(SEQUENCE, [alignment])
    (batch,) = pipeline.multimer_features(
        [a, pipeline.ChainInput("ACDE", [plain], [named])], sizes=SIZES
    )
    assert batch["msa"][1, 20:].tolist() == [7, 7, 3, 6]


def test_warnings_name_the_chain(alignment):
    chains = [pipeline.ChainInput(SEQUENCE, [alignment]), pipeline.ChainInput("ACDE")]
    (warning,) = pipeline.multimer_warnings(chains)
    assert warning.startswith("chain 2: no alignment")
    with pytest.raises(FoldInputError, match="a complex of no chains"):
        pipeline.multimer_features([], sizes=SIZES)


def test_crops_of_complexes_follow_the_labels(alignment, write):
    pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
    structure = read_structure(write("1abc.cif", simple(SEQUENCE)))
    labels = label_features(SEQUENCE, structure, structure.chain("A"))
    chain = pipeline.ChainInput(SEQUENCE, [alignment], labels=labels)
    sizes = Sizes(max_templates=1, crop_size=9)
    for seed in range(4):
        (batch,) = pipeline.multimer_features([chain, chain], sizes=sizes, seed=seed)
        assert len(batch["aatype"]) == 9
        assert batch["all_atom_positions"].shape == (9, 37, 3)
        assert batch["msa"].shape[1] == 9
        assert batch["resolution"] == np.float32(1.8)
