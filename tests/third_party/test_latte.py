"""diffusers' Latte, unmodified, split with the table kept in the project: one process's numbers.

Its forward says `if num_frame > 1`, so a rank left with one frame would drop its positions.
"""

import pytest
import torch

import hairpin as hp
from hairpin.errors import HairpinError
from hairpin.models.third_party.latte import ATTENDS
from marks import slow
from planning.truth import Case, check, randomised, seeded

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed (pip install hairpin[hf])"
)


def build(frames: int, *, checkpointed: bool = False):
    """A small Latte with every part in it and every parameter random."""
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=frames,
        attention_bias=True,
    )
    model = randomised(model)
    if checkpointed:
        model.enable_gradient_checkpointing()
    return model.train()


def arguments(frames: int, b: int = 2, size: int = 8):
    return (), {
        "hidden_states": seeded((b, 4, frames, size, size)),
        "timestep": torch.tensor([3, 7, 11])[:b],
        "encoder_hidden_states": seeded((b, 5, 12), 4),
        "return_dict": False,
    }


def latte(frames: int, *, checkpointed: bool = False) -> Case:
    return Case(
        f"Latte of {frames} frames, checkpointed: {checkpointed}",
        lambda: build(frames, checkpointed=checkpointed),
        lambda: arguments(frames),
        ATTENDS,
    )


CASES = tuple(latte(frames, checkpointed=mode) for frames in (16, 7) for mode in (False, True))


@pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4)])
def test_values_and_gradients_equal_one_process(ranks):
    plans = check(CASES, ranks)
    assert plans[0] == plans[1]  # checkpointing changes no plan
    if ranks > 1:
        for plan in plans:
            held = {stage.module: stage.held for stage in plan.stages}
            assert held["transformer_blocks.0"] == "t"
            assert held["temporal_transformer_blocks.0"] == "s"


def test_the_trap_of_one_frame():
    """With 7 frames over 4 ranks the last has one: there the plan may not leave t split."""
    x = arguments(7)
    for ranks in (2, 3, 4):
        plan = hp.plan(build(7), x, hp.Mesh(sp=ranks), attends=ATTENDS)
        smallest = 7 // ranks
        branch = plan.stages[1]
        assert plan.stages[0].module == "transformer_blocks.0"
        if smallest == 1:
            assert plan.stages[0].leave != "t"
        assert branch.module == "temporal_transformer_blocks.0"
    without = {key: seam for key, seam in ATTENDS.items() if key != "temp_pos_embed"}
    plan = hp.plan(build(16), arguments(16), hp.Mesh(sp=4), attends=without)
    assert plan.stages[0].leave != "t"  # whole positions cannot be added to a part of the frames


def test_the_state_dict_and_the_outputs_survive_detach():
    model = build(7)
    kwargs = arguments(7)[1]
    with torch.no_grad():
        wanted = model(**kwargs)[0]
        names = list(model.state_dict())
        hp.parallelize(model, hp.plan(model, kwargs, hp.Mesh(sp=1), attends=ATTENDS))
        assert list(model.state_dict()) == names
        assert torch.equal(model(**kwargs)[0], wanted)
        hp.detach(model)
        assert torch.equal(model(**kwargs)[0], wanted)


@pytest.mark.parametrize("drop", ["args", "inputs"])
def test_a_table_that_forgets_something_is_refused(drop):
    table = dict(ATTENDS)
    if drop == "args":
        table["transformer_blocks.*"] = "(b t) [s] c"
    else:
        del table[""]
    with pytest.raises(HairpinError) as caught:
        hp.plan(build(16), arguments(16), hp.Mesh(sp=4), attends=table)
    assert "transformer_blocks.0" in str(caught.value)


OTHER = (
    latte(16).but(
        "other size", arguments=lambda: arguments(16, 3, 12), example=lambda: arguments(16)
    ),
)


@pytest.mark.parametrize("ranks", [3])
def test_another_batch_and_another_picture_size_than_planned(ranks):
    check(OTHER, ranks)
