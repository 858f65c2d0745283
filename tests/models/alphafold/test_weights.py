"""Weights: the public layout read, written and refused; presets told from arrays."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hairpin.errors import RecipeError, WeightsError
from hairpin.models.alphafold import AlphaFold, presets, weights
from trunk_oracle import randomize

COUNTS = {  # in thousands, of the published models
    "model_3": 92_900,
    "model_1": 93_229,
    "model_1_ptm": 93_237,
    "model_1_multimer_v3": 93_224,
}


@pytest.mark.parametrize(("name", "thousands"), COUNTS.items())
def test_published_models_have_their_number_of_parameters(name, thousands):
    with torch.device("meta"):
        model = AlphaFold(presets.named(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands


@pytest.mark.parametrize("name", presets.NAMES)
def test_every_preset_is_what_its_name_says(name):
    config = presets.named(name)
    assert config.name == name
    assert config.multimer == ("multimer" in name)
    assert config.heads.aligned_error == ("ptm" in name or "multimer" in name)
    assert config.evoformer.fused == name.endswith("_v3")
    assert (config.data.max_templates > 0) == (config.template is not None)


def test_presets_by_function_and_stages_of_training():
    assert presets.model_2() == presets.named("model_2")
    assert presets.model_5_ptm() == presets.named("model_5_ptm")
    assert presets.multimer_v3(4).data.max_extra_msa == 1152
    assert presets.multimer_v1().data.max_msa_clusters == 252
    assert presets.multimer_v2(2).name == "model_2_multimer_v2"
    first = presets.initial_training(presets.model_1())
    assert (first.data.crop_size, first.data.max_msa_clusters, first.loss.violation) == (
        256,
        128,
        0,
    )
    second = presets.fine_tuning(first)
    assert (second.data.crop_size, second.data.max_extra_msa, second.loss.violation) == (
        384,
        5120,
        1,
    )
    with pytest.raises(RecipeError, match="no model 'model_9'; the models are model_1, "):
        presets.named("model_9")


@pytest.fixture(scope="module", params=[False, True], ids=["monomer", "multimer"])
def model(request):
    return randomize(AlphaFold(presets.tiny(multimer=request.param)))


def test_round_trips_are_exact(model, tmp_path):
    weights.save_npz(model, tmp_path / "params.npz")
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        config = weights.config_from(file)
    told = ("data", "name", "recycles", "structure")
    assert replace(config, **{k: getattr(model.config, k) for k in told}) == model.config
    assert replace(config.structure, layers=2) == model.config.structure

    second = AlphaFold(model.config)
    weights.load(second, tmp_path / "params.npz")
    weights.save_safetensors(second, tmp_path / "params.safetensors")
    assert weights.config_from_safetensors(tmp_path / "params.safetensors") == model.config
    third = AlphaFold(model.config)
    weights.load_safetensors(third, tmp_path / "params.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, third.get_parameter(name)), name


def test_the_file_name_tells_what_arrays_do_not():
    with torch.device("meta"):
        model = AlphaFold(presets.model_2_ptm())
    shapes = {
        name: np.broadcast_to(np.float32(0), array.shape)
        for name, array in weights.names(model).items()
    }
    assert weights.config_from(shapes, "down/params_model_2_ptm.npz") == presets.model_2_ptm()
    assert weights.config_from(shapes) == presets.model_1_ptm()
    assert weights.config_from(shapes, "params_model_5.npz") == presets.model_1_ptm()


def test_arrays_that_do_not_fit_are_listed(model):
    arrays = weights.to_arrays(model)
    head = f"{weights.ROOT}/distogram_head/half_logits//"
    del arrays[f"{head}bias"]
    arrays[f"{head}bais"] = np.zeros(64, np.float32)
    arrays[f"{head}weights"] = arrays[f"{head}weights"].T
    with pytest.raises(WeightsError) as caught:
        weights.load_arrays(model, arrays, source="renamed.npz")
    text = str(caught.value)
    assert text.startswith("renamed.npz does not fit the model:\n1 missing:\n")
    assert "1 missing:\n  distogram_head/half_logits//bias\n" in text
    assert "1 surplus:\n  distogram_head/half_logits//bais\n" in text
    assert "half_logits//weights is (64, 16), the model has (16, 64)" in text
    assert text.endswith("give the file of this model, or the model of this file")


def test_a_file_of_another_model_is_refused_and_the_list_is_short(tmp_path):
    weights.save_npz(AlphaFold(presets.tiny()), tmp_path / "monomer.npz")
    with pytest.raises(WeightsError, match=r"(?s)\d+ missing:.*and \d+ more\n\d+ surplus:"):
        weights.load(AlphaFold(presets.tiny(multimer=True)), tmp_path / "monomer.npz")


def test_what_is_no_weight_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read .*absent\.npz: No such file"):
        weights.open_npz(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(WeightsError, match="is not a whole npz file"):
        weights.open_npz(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(WeightsError, match="one array, not a npz file"):
        weights.open_npz(tmp_path / "one.npy")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with (
        weights.open_npz(tmp_path / "other.npz") as file,
        pytest.raises(WeightsError, match=r"no array .*, so it is of no AlphaFold model"),
    ):
        weights.config_from(file)
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], dtype=object))
    with (
        weights.open_npz(tmp_path / "pickle.npz") as file,
        pytest.raises(ValueError, match="pickle"),
    ):
        file["a"]
    with pytest.raises(WeightsError, match="cannot write"):
        weights.save_npz(AlphaFold(presets.tiny()), tmp_path / "nowhere" / "x.npz")
    (tmp_path / "bad.safetensors").write_text("x")
    with pytest.raises(WeightsError, match="cannot read"):
        weights.load_safetensors(AlphaFold(presets.tiny()), tmp_path / "bad.safetensors")
