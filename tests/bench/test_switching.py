"""The switch benchmark: counts agree with the formula, figures mean what they say."""

import pytest

from hairpin.bench.switching import Settings, crossing_bytes, hidden_fraction, measure
from hairpin.layout import shard_sizes


@pytest.mark.parametrize(("t", "s"), [(16, 64), (17, 65), (1, 64), (5, 1), (3, 2), (0, 7)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_crossing_bytes_is_the_sum_over_pairs(t, s, ranks):
    rest_bytes = 12
    before, after = shard_sizes(t, ranks), shard_sizes(s, ranks)
    want = [
        sum(before[i] * after[j] * rest_bytes for j in range(ranks) if j != i) for i in range(ranks)
    ]
    assert crossing_bytes(t, s, rest_bytes, ranks) == want


@pytest.mark.parametrize(
    ("transfer_s", "work_s", "both_s", "fraction"),
    [(2, 3, 3, 1.0), (2, 3, 5, 0.0), (3, 2, 4, 0.5), (2, 2, 2.2, 0.9)],
)
def test_hidden_fraction(transfer_s, work_s, both_s, fraction):
    assert hidden_fraction(transfer_s, work_s, both_s) == pytest.approx(fraction)


@pytest.mark.root
def test_counts_on_the_wire():
    settings = Settings(
        ranks=4, rate="1gbit", whole_bytes=8 * 10**6, shapes=((17, 65), (5, 1)), rounds=1
    )
    result = measure(settings, say=lambda text: None)
    for shape in result["shapes"]:
        assert shape["payload_bytes"] == shape["expected_bytes"]
        assert 1 < shape["wire_over_expected"] < 1.01
    names = {"switch", "receive_first", "all_to_all_single", "dtensor"}
    figures = result["peers"]["figures"]
    assert set(figures) == names
    # DTensor falls back to an all-gather on CPU: N times the bytes.
    assert sum(figures["dtensor"]["wire_bytes"]) > 3 * sum(figures["switch"]["wire_bytes"])
    assert set(result["overlap"]["times_s"]) == {"transfer", "work", "both"}
