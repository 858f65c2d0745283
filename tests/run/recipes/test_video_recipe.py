"""The video recipes: settings that fit together, and the schedule they describe."""

from dataclasses import replace

import pytest

from hairpin.errors import RecipeError
from hairpin.run.recipes import VideoRecipe, tiny, video_digits


@pytest.mark.parametrize("recipe", [tiny(), video_digits()], ids=lambda recipe: recipe.name)
def test_learning_rate_rises_falls_and_stays(recipe: VideoRecipe):
    rates = [recipe.learning_rate(step) for step in range(recipe.steps + 50)]
    top = recipe.warmup_steps
    assert rates[0] == pytest.approx(recipe.lr / recipe.warmup_steps)
    assert max(rates) == pytest.approx(recipe.lr)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[recipe.steps :] == pytest.approx([recipe.min_lr] * 50)


def test_average_forgets_the_start_first():
    recipe = video_digits()
    assert recipe.ema_decay_at(0) == pytest.approx(0.1)
    assert recipe.ema_decay_at(10**6) == recipe.ema_decay


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"given_frames": 8}, "given_frames=8 of 8 frames leaves nothing to predict"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
        ({"steps": 0}, "steps=0"),
        ({"data": replace(tiny().data, height=10)}, "10 x 8 pixels is not whole patches of 4 x 4"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        replace(tiny(), **settings)
