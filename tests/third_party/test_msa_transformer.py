"""fair-esm's MSA Transformer, unmodified: row and column attention, padding, a free batch."""

import argparse

import pytest
import torch

import hairpin as hp
from hairpin.errors import HairpinError
from hairpin.models.third_party.msa_transformer import ATTENDS
from marks import slow
from planning.truth import Case, check, randomised

esm = pytest.importorskip("esm", reason="fair-esm is not installed (pip install hairpin[hf])")


def build():
    """Two layers with tied row attention, column attention and feed-forward."""
    from esm.model.msa_transformer import MSATransformer

    alphabet = esm.data.Alphabet.from_architecture("msa_transformer")
    sizes = argparse.Namespace(
        embed_dim=16,
        layers=2,
        ffn_embed_dim=32,
        attention_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_tokens=2**14,
        max_tokens_per_msa=2**14,
        max_positions=64,
        embed_positions_msa=True,
        embed_positions_msa_dim=16,
    )
    return randomised(MSATransformer(sizes, alphabet))


def tokens(b: int, r: int, c: int, *, padded: bool):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(4, 24, (b, r, c), generator=generator)
    if padded:
        x[0, :, -2:] = 1
        x[0, -1] = 1
    return (x,), {}


def msa(b: int, r: int, c: int, *, padded: bool = False, free_dims=()) -> Case:
    return Case(
        f"MSA of {b, r, c}, padded: {padded}",
        build,
        lambda: tokens(b, r, c, padded=padded),
        ATTENDS,
        free_dims=free_dims,
    )


CASES = (
    msa(1, 5, 7),
    msa(2, 3, 9, padded=True),
    msa(1, 4, 13, padded=True),
    msa(3, 5, 7, padded=True, free_dims=("b",)),
)


@pytest.mark.parametrize("ranks", [1, slow(2), slow(3), 4])
def test_values_and_gradients_equal_one_process(ranks):
    plans = check(CASES, ranks)
    if ranks > 1:
        held = {stage.module.rpartition(".")[2]: stage.held for stage in plans[0].stages}
        assert held["column_self_attention"] == "c"
        assert held["row_self_attention"] is None


def test_a_free_batch_needs_no_switch():
    plan = hp.plan(
        build(), tokens(4, 5, 7, padded=True)[0], hp.Mesh(sp=2), attends=ATTENDS, free_dims=("b",)
    )
    attentions = [s for s in plan.stages if "attention" in s.module]
    assert {stage.held for stage in attentions} == {"b"}


def test_attention_maps_are_refused():
    example = (tokens(1, 5, 7, padded=False)[0], {"need_head_weights": True})
    with pytest.raises(HairpinError):
        hp.plan(build(), example, hp.Mesh(sp=2), attends=ATTENDS)
