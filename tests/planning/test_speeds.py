"""Speeds of this machine: sane, kept on disk, and what the choice of chunks makes of them."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from hairpin.planning import speeds as module
from hairpin.planning.cache import Cache
from hairpin.planning.loops.choose import best_chunk, cost_s, largest_chunk
from hairpin.planning.loops.regions import Candidate, Seed
from hairpin.planning.speeds import Speeds, in_words, measure_speeds, speeds_of

REGION = Candidate(
    start=0,
    end=4,
    seed=Seed(3, 0),
    units=1000,
    ahead_bytes=0,
    fixed_bytes=0,
    moments=((0, 100_000.0),),
    saved_bytes=0,
    steps=10,
    reread_bytes=0,
    repeated_bytes=0,
    copied_bytes=0,
    thin_flops=0.0,
    product_flops=0.0,
    made_bytes=(0, 0),
    largest_bytes=0,
    kept_bytes=0,
    turn_bytes=0.0,
)


def test_what_is_measured_is_sane():
    found = measure_speeds()
    assert 1e-7 < found.step_s < 1e-3
    assert 1e-7 < found.turn_s < 1e-2
    assert 1e7 < found.fresh_bytes_per_s <= found.bytes_per_s <= found.cached_bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15
    assert 0.5 <= found.rows <= 1e3
    assert "GFLOP/s" in in_words(found)


def test_measured_once(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    monkeypatch.setattr(module, "measure_speeds", lambda device: Speeds(step_s=7e-6))
    assert speeds_of("cpu", cache) == Speeds(step_s=7e-6)
    monkeypatch.setattr(module, "measure_speeds", lambda device: pytest.fail("measured again"))
    assert speeds_of("cpu", cache) == Speeds(step_s=7e-6)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    monkeypatch.setattr(module, "measure_speeds", lambda device: Speeds(step_s=8e-6))
    assert speeds_of("cpu", cache) == Speeds(step_s=8e-6)


def bad_files():
    good = asdict(Speeds()) | {"of": "a machine"}
    yield ""
    yield "{"
    yield "[1]"
    yield json.dumps({key: value for key, value in good.items() if key != "rows"})
    for wrong in (0, -1.0, "fast", None, float("inf"), float("nan")):
        yield json.dumps(good | {"rows": wrong})
    yield json.dumps(good | {"surplus": 1.0})


@pytest.mark.parametrize("text", list(bad_files()))
def test_a_bad_file_is_measured_again_and_replaced(tmp_path, monkeypatch, text):
    cache = Cache(tmp_path)
    monkeypatch.setattr(module, "measure_speeds", lambda device: Speeds(step_s=7e-6))
    speeds_of("cpu", cache)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(text)
    assert speeds_of("cpu", cache) == Speeds(step_s=7e-6)
    assert file.read_text() == whole


def test_without_a_cache_speeds_are_the_fixed_ones():
    assert speeds_of() == Speeds()  # the tests run with the cache switched off


def test_a_loop_of_one_turn_costs_next_to_nothing():
    assert cost_s(REGION, 1000, Speeds()) == Speeds().turn_s


def test_more_turns_cost_more_where_nothing_is_gained():
    costs = [cost_s(REGION, chunk, Speeds()) for chunk in (1000, 500, 100, 10, 1)]
    assert costs == sorted(costs)
    assert best_chunk(REGION, 60_000_000, Speeds()) == 500  # two equal turns, not 600 and 400


def test_thin_products_cost():
    thin = replace(REGION, thin_flops=1e9)
    slower = [cost_s(thin, c, Speeds()) - cost_s(REGION, c, Speeds()) for c in (100, 10, 1)]
    assert slower[1] == pytest.approx(10 * slower[0])
    assert slower[2] == pytest.approx(100 * slower[0])


def test_a_smaller_chunk_is_taken_where_it_stays_in_the_cache():
    large = replace(REGION, made_bytes=(400_000_000, 0), largest_bytes=20_000_000)
    budget = 50_000_000
    chunk = best_chunk(large, budget, Speeds())
    assert chunk < largest_chunk(large, budget)
    assert large.turn(chunk) <= 2 * 2**20
    assert cost_s(large, chunk, Speeds()) < 0


def test_storages_given_back_each_time_are_worth_avoiding():
    fresh = replace(REGION, made_bytes=(0, 400_000_000), largest_bytes=100_000_000)
    assert cost_s(fresh, 500, Speeds()) > 0  # half of it is still as large
    assert cost_s(fresh, 250, Speeds()) < -0.1
    assert cost_s(fresh, 1000, Speeds()) == Speeds().turn_s


def test_no_chunk_under_too_small_a_budget():
    assert best_chunk(REGION, 50_000, Speeds()) == 0
