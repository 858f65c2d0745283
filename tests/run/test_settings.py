"""Recipes survive the way through JSON, and only settings that do not matter may differ."""

import json
from dataclasses import replace

import pytest

from hairpin.errors import CheckpointError
from hairpin.models.alphafold import presets
from hairpin.run import settings
from hairpin.run.recipes import FoldRecipe, VideoRecipe, fold_tiny, tiny, video_digits


@pytest.mark.parametrize("recipe", [tiny(), video_digits()])
def test_a_recipe_survives_json(recipe):
    plain = json.loads(json.dumps(settings.to_plain(recipe)))
    assert settings.from_plain(VideoRecipe, plain) == recipe
    settings.require_same(recipe, plain)


@pytest.mark.parametrize("model", [presets.tiny(), presets.model_3()])
def test_a_part_that_may_be_absent_survives_json(model):
    """A model with templates has their settings, another has None."""
    recipe = replace(fold_tiny(), model=model)
    assert (
        settings.from_plain(FoldRecipe, json.loads(json.dumps(settings.to_plain(recipe)))) == recipe
    )


def test_settings_of_another_kind_are_named():
    plain = settings.to_plain(tiny()) | {"colour": 3}
    with pytest.raises(CheckpointError, match=r"not those of a VideoRecipe: .*'colour'"):
        settings.from_plain(VideoRecipe, plain)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (replace(tiny(), batch_size=6), "batch_size: saved 4, asked for 6"),
        (replace(tiny(), dtype="float64"), "dtype: saved 'float32', asked for 'float64'"),
        (replace(tiny(), data=replace(tiny().data, digits=2)), "data.digits: saved 1, asked for 2"),
    ],
)
def test_a_setting_that_matters_is_named(changed, name):
    with pytest.raises(CheckpointError, match=name):
        settings.require_same(changed, settings.to_plain(tiny()))


@pytest.mark.parametrize("change", [{"checkpoint_every": 7}, {"sample_steps": 3}, {"name": "x"}])
def test_a_setting_that_does_not_matter_may_differ(change):
    settings.require_same(replace(tiny(), **change), settings.to_plain(tiny()))
