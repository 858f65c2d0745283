"""The whole model: recycling, sampling, dropout, precision, what it refuses."""

import weakref
from dataclasses import replace

import pytest
import torch

from hairpin.errors import DataError
from hairpin.models.alphafold import AlphaFold, presets
from hairpin.models.alphafold.config import DataConfig
from hairpin.models.alphafold.primitives import SharedDropout
from hairpin.models.alphafold.sampling import FirstRows, SampleMSA, cluster_means, msa_features
from trunk_oracle import random_features, randomize


def built(*, multimer=False, rows=6):
    config = presets.tiny(multimer=multimer)
    config = replace(config, data=replace(config.data, max_msa_clusters=rows))
    return config, randomize(AlphaFold(config)).eval()


@pytest.mark.parametrize("multimer", [False, True])
def test_outputs_have_their_shapes_and_precision(multimer):
    config, model = built(multimer=multimer)
    model = model.double()
    with torch.no_grad():
        out = model(random_features(config, residues=7), recycles=1)
    shapes = {name: tuple(value.shape) for name, value in out["representations"].items()}
    assert shapes == {
        "single": (7, 16), "pair": (7, 7, 16), "msa": (6, 7, 16), "msa_first_row": (7, 16),
        "structure_module": (7, 16),
    }  # fmt: skip
    assert out["structure_module"]["final_atom_positions"].shape == (7, 37, 3)
    assert out["predicted_aligned_error"]["logits"].shape == (7, 7, 64)
    assert out["masked_msa"]["logits"].shape == (6, 7, 22 if multimer else 23)
    assert out["representations"]["pair"].dtype == torch.float64
    assert int(out["num_recycles"]) == 1


def test_one_batch_a_recycle_is_used_in_turn():
    config, model = built()
    batches = [random_features(config, seed=seed) for seed in range(3)]
    batches = [batches[0] | {k: b[k] for k in ("msa_feat", "extra_msa")} for b in batches]
    with torch.no_grad():
        several = model(batches, recycles=1)["representations"]["pair"]
        same = model(batches[1], recycles=1)["representations"]["pair"]
        again = model([batches[0], batches[1]], recycles=1)["representations"]["pair"]
    assert torch.equal(several, again)
    assert not torch.allclose(several, same)
    with pytest.raises(DataError, match=r"3 recycles need 4 batches .* but 3 were given"):
        model(batches, recycles=3)


@pytest.mark.parametrize("multimer", [False, True])
def test_a_recycle_hands_on_three_tensors_and_keeps_nothing_else(multimer):
    """When the next run begins, the MSA of the run before is gone, and the row is a copy."""
    config, model = built(multimer=multimer)
    msas, alive, handed = [], [], []

    def begins(_, args):
        handed.append(args[1:])
        alive.append(sum(msa() is not None for msa in msas))

    def ends(_, __, out):
        msas.append(weakref.ref(out[0].untyped_storage()))

    model.recycling_embedder.register_forward_pre_hook(begins)
    model.evoformer.register_forward_hook(ends)
    with torch.no_grad():
        out = model(random_features(config), recycles=2)
    assert alive == [0, 0, 0]
    assert msas[-1]() is not None  # the last one is an output
    assert out["representations"]["msa"].untyped_storage().nbytes() > handed[-1][1].nbytes
    for positions, row, pair in handed:
        for tensor in (positions, row, pair):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_only_the_last_recycle_carries_gradients():
    config, model = built()
    seen = []
    model.evoformer.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    out = model(random_features(config), recycles=2)
    assert seen == [False, False, True]
    heads = [head for head in out.values() if isinstance(head, dict) and "logits" in head]
    sum(head["logits"].sum() for head in heads).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("structure_module" in name for name in unused)


def test_recycling_stops_when_distances_no_longer_change():
    config, model = built()
    features = random_features(config)
    counts = {}
    for tolerance in (None, 1e-9, 1e9):
        model.config = replace(config, recycle_tolerance=tolerance)
        with torch.no_grad():
            counts[tolerance] = int(model(features, recycles=3)["num_recycles"])
    assert counts == {None: 3, 1e-9: 3, 1e9: 1}


def test_templates_that_do_not_exist_change_nothing():
    config, model = built()
    features = random_features(config)
    absent = features | {"template_mask": torch.zeros(2)}
    absent["template_all_atom_masks"] = torch.zeros_like(features["template_all_atom_masks"])
    other = absent | {"template_aatype": absent["template_aatype"] * 0}
    none = {k: v[:0] if k.startswith("template") else v for k, v in features.items()}
    with torch.no_grad():
        pairs = [model(f, recycles=0)["representations"]["pair"] for f in (absent, other, none)]
        present = model(features, recycles=0)["representations"]["pair"]
    torch.testing.assert_close(pairs[0], pairs[1])
    torch.testing.assert_close(pairs[0], pairs[2])
    assert not torch.allclose(pairs[0], present)


def test_features_that_are_missing_are_named():
    config, model = built()
    features = random_features(config)
    del features["msa_feat"], features["template_mask"]
    with pytest.raises(
        DataError, match="the batch lacks msa_feat, template_mask, which tiny needs"
    ):
        model(features)
    config, model = built(multimer=True)
    features = random_features(config, templates=0)
    with pytest.raises(DataError, match="features of 0 templates; give at least one, masked"):
        model(features, recycles=0)


# ---------------------------------------------------------------------------------- sampling


def batch_of(rows=40, residues=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "aatype": torch.zeros(residues).long(),
        "msa": torch.randint(21, (rows, residues), generator=g),
        "deletion_matrix": torch.randint(3, (rows, residues), generator=g).float(),
        "msa_mask": torch.ones(rows, residues),
    }


def test_sampling_keeps_the_first_row_draws_without_replacement_and_obeys_its_seed():
    batch = batch_of()
    batch["msa"][:, 0] = torch.arange(40) % 21
    batch["deletion_matrix"][:, 1] = torch.arange(40).float()  # marks every row
    sample = SampleMSA(DataConfig(max_msa_clusters=8, replace_fraction=0.0))
    out = sample(batch, torch.Generator().manual_seed(3))
    marks = torch.cat([out["deletion_matrix"][:, 1], out["extra_deletion_matrix"][:, 1]])
    assert marks[0] == 0
    assert sorted(marks.tolist()) == list(range(40))
    assert marks.tolist() != list(range(40))
    again = sample(batch, torch.Generator().manual_seed(3))
    assert all(torch.equal(out[name], again[name]) for name in out)
    other = sample(batch, torch.Generator().manual_seed(4))
    assert not torch.equal(out["msa"], other["msa"])


def test_rows_that_are_empty_come_last():
    batch = batch_of()
    batch["msa_mask"][5:35] = 0
    out = SampleMSA(DataConfig(max_msa_clusters=10))(batch, torch.Generator().manual_seed(0))
    assert out["msa_mask"].min() == 1
    assert out["extra_msa_mask"].max() == 0


def test_letters_are_masked_as_often_as_told():
    batch = batch_of(rows=200, residues=200)
    out = SampleMSA(DataConfig(max_msa_clusters=200))(batch, torch.Generator().manual_seed(0))
    hidden = out["bert_mask"] == 1
    assert abs(hidden.float().mean() - 0.15) < 0.01
    assert torch.equal(out["msa"][~hidden], out["true_msa"][~hidden])
    assert abs((out["msa"][hidden] == 22).float().mean() - 0.7) < 0.03
    kept = (out["msa"] == out["true_msa"])[hidden].float().mean()
    assert abs(kept - (0.1 + 0.1 / 20 + 0.1 / 20)) < 0.02


def test_letters_that_tell_nothing_are_hidden_but_not_asked_for():
    """The mask of the pipeline goes with its rows and changes nothing that the model sees."""
    batch = batch_of(rows=60, residues=40)
    telling = (torch.rand(60, 40, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    batch["deletion_matrix"][:, 0] = torch.arange(60).float()  # marks every row
    sample = SampleMSA(DataConfig(max_msa_clusters=20))
    plain = sample(batch, torch.Generator().manual_seed(0))
    out = sample(batch | {"bert_mask": telling}, torch.Generator().manual_seed(0))
    order = out["deletion_matrix"][:, 0].long()
    assert torch.equal(out["bert_mask"], plain["bert_mask"] * telling[order])
    assert 0 < out["bert_mask"].sum() < plain["bert_mask"].sum()
    assert torch.equal(out["msa"], plain["msa"])
    assert torch.equal(out["extra_msa"], plain["extra_msa"])
    assert ((out["msa"] != out["true_msa"]) & (out["bert_mask"] == 0)).any()


def test_clusters_by_hand():
    """The extra row is nearer the first row, so that one alone takes it, with DeepMind's weight."""
    batch = {
        "msa": torch.tensor([[0, 1, 2], [5, 6, 7]]),
        "msa_mask": torch.ones(2, 3),
        "deletion_matrix": torch.tensor([[0.0, 0, 0], [0, 0, 3]]),
        "extra_msa": torch.tensor([[0, 1, 9]]),
        "extra_msa_mask": torch.ones(1, 3),
        "extra_deletion_matrix": torch.tensor([[4.0, 0, 0]]),
    }
    profile, deletions = cluster_means(batch)
    # a row that joins weighs as much as the residues the two rows share: 3
    assert profile[0, 2, 9] == pytest.approx(0.75)
    assert profile[0, 2, 2] == pytest.approx(0.25)
    assert profile[0, 0, 0] == pytest.approx(1.0)
    assert profile[1, 2, 7] == pytest.approx(1.0)
    assert deletions[0].tolist() == pytest.approx([3.0, 0, 0])
    assert deletions[1].tolist() == pytest.approx([0, 0, 3.0])


def test_extra_rows_beyond_the_limit_are_left_out_of_the_stack():
    config = DataConfig(max_msa_clusters=8, max_extra_msa=5)
    out = msa_features(FirstRows(config)(batch_of()), config)
    assert out["extra_msa"].shape == (5, 30)
    assert out["msa_feat"].shape == (8, 30, 49)
    assert not out["bert_mask"].any()


# ---------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dim", [0, 1])
def test_shared_dropout_is_alike_along_its_dim(dim):
    torch.manual_seed(0)
    drop = SharedDropout(0.25, dim=dim)
    x = torch.ones(50, 60, 8)
    residual = torch.full_like(x, 2.0)
    out = drop(x, residual) - residual
    assert torch.equal(out, out.narrow(dim, 0, 1).expand_as(out))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs((out == 0).float().mean() - 0.25) < 0.06
    assert torch.equal(drop.eval()(x, residual), residual + x)


def test_dropout_is_for_training_only():
    config, model = built()
    features = random_features(config)
    with torch.no_grad():
        first, second = (model(features, recycles=0)["representations"]["pair"] for _ in "12")
        assert torch.equal(first, second)
        model.train()
        assert not torch.equal(first, model(features, recycles=0)["representations"]["pair"])
