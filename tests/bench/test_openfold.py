"""Our Evoformer block beside OpenFold's: the same numbers, and a table of what each costs."""

import os
import sys
from pathlib import Path

import pytest
import torch

from hairpin.bench import openfold
from hairpin.errors import MissingExtraError
from hairpin.models.alphafold.config import BlockConfig
from hairpin.models.alphafold.evoformer import EvoformerBlock

TINY = BlockConfig(c_m=16, c_z=8, msa_heads=2, pair_heads=2, c_outer=4, c_triangle=8)
CHECKOUT = os.environ.get("HAIRPIN_OPENFOLD", "")
needs_openfold = pytest.mark.skipif(
    not (Path(CHECKOUT) / "openfold/model/evoformer.py").is_file() or not CHECKOUT,
    reason="HAIRPIN_OPENFOLD names no checkout of OpenFold",
)


class StandIn(EvoformerBlock):
    """Our own block behind OpenFold's arguments, wasteful where not asked to save."""

    def forward(self, m, z, msa_mask, pair_mask, chunk_size=None, inplace_safe=False, **_):
        waste = None if chunk_size or inplace_safe else [torch.zeros(200_000) for _ in range(2)]
        done = super().forward(m, z, msa_mask, pair_mask)
        del waste
        return done


@pytest.fixture
def stand_in(monkeypatch):
    def blocks(folder, config):
        assert folder == "somewhere"
        theirs, ours = StandIn(config).eval(), EvoformerBlock(config).eval()
        openfold.randomise(ours)
        theirs.load_state_dict(ours.state_dict())
        return theirs, ours

    monkeypatch.setattr(openfold, "blocks", blocks)
    monkeypatch.setattr(openfold, "_as_theirs", dict)


def test_every_way_is_measured_against_the_first(stand_in):
    settings = openfold.Settings(openfold="somewhere", sizes=((4, 16),), rounds=1, config=TINY)
    lines = []
    table = openfold.measure(settings, say=lines.append)["table"]
    assert len(lines) == len(table)
    assert {row["direction"] for row in table} == set(openfold.DIRECTIONS)
    for direction in openfold.DIRECTIONS:
        rows = [row for row in table if row["direction"] == direction]
        first, ours = rows[0], next(row for row in rows if row["whose"] == "ours")
        assert (first["whose"], first["peak_ratio"], first["time_ratio"]) == ("OpenFold", 1, 1)
        assert ours["setting"] == first["setting"] == "as it is"
        assert ours["peak_bytes"] < first["peak_bytes"]
        assert first["peak_bytes"] - ours["peak_bytes"] <= 2 * 800_000
        for row in rows:
            if row["peak_bytes"] is None:
                assert "Error: " in row["note"]
                continue
            assert row["relative_error"] < 1e-4
            if row["budget_bytes"] is not None:
                assert row["peak_bytes"] <= row["budget_bytes"]
        halves = [row for row in rows if row["setting"].startswith("within half of")]
        assert [row["budget_bytes"] for row in halves] == [first["peak_bytes"] // 2]


def test_gradients_are_compared_and_not_only_outputs(stand_in):
    theirs, ours = openfold.blocks("somewhere", TINY)
    bench = openfold._Bench.of(theirs, ours, (4, 16, 16, 8), grad=True)
    way = bench._their_ways()[0]
    before = bench._result(way)
    assert len(before) == 4 + len(list(theirs.parameters()))
    assert all(float(each.detach().abs().max()) > 0 for each in before)
    assert all(leaf.grad is None for leaf in theirs.parameters())


def test_a_folder_without_openfold_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match=r"holds no openfold/model.*--openfold"):
        openfold.blocks(tmp_path, TINY)


def test_a_library_that_openfold_lacks_is_named_and_nothing_stays_imported(tmp_path):
    model = tmp_path / "openfold" / "model"
    model.mkdir(parents=True)
    (model / "evoformer.py").write_text("import attn_core_inplace_cuda\nimport no_such_library\n")
    with pytest.raises(MissingExtraError, match=r"cannot be imported: .*no_such_library"):
        openfold.blocks(tmp_path, TINY)
    assert not [name for name in sys.modules if name.partition(".")[0] == "openfold"]


@needs_openfold
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("outer_first", [False, True])
def test_both_blocks_give_the_same(outer_first, grad):
    from dataclasses import replace

    config = replace(TINY, outer_first=outer_first)
    theirs, ours = openfold.blocks(CHECKOUT, config)
    bench = openfold._Bench.of(theirs, ours, (5, 17, 16, 8), grad=grad)
    wanted = bench._result(bench._their_ways()[0])
    found = bench._result(openfold._Way("ours", "", ours, ours, bench.args))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
