"""The picture of a budget: where two runs meet on one axis, what is named, what is drawn."""

import sys

import pytest

from hairpin.errors import MissingExtraError, OutputError
from hairpin.graph.meter import Held, Moment, Timeline
from hairpin.report.memory import (
    Section,
    draw_memory,
    name_held,
    places,
    require_matplotlib,
    sections,
)


def run_of(*labels: str) -> Timeline:
    moments = [Moment("aten.add", label, 2**20 * (1 + i % 3)) for i, label in enumerate(labels)]
    held = (Held("h.0.attn", "aten.bmm", 2**20, (8, 128, 256), "float32"),)
    return Timeline(3 * 2**20, moments, held, 2**20)


BEFORE = run_of("wte", "", "h.0.a", "h.0.b", "h.0", "h.1.a", "h.1", "")
AFTER = run_of("wte", "", *["h.0"] * 6, "h.1", "")


def test_sections_are_entries_of_stacks_or_outermost_modules():
    assert sections(BEFORE) == [
        Section("wte", 0, 1),
        Section("", 1, 2),
        Section("h.0", 2, 5),
        Section("h.1", 5, 7),
        Section("", 7, 8),
    ]
    labels = "encoder.layer.3.attention.0", "head.norm", "head (backward)", "a.1.b (backward)"
    assert [section.name for section in sections(run_of(*labels))] == [
        "encoder.layer.3",
        "head",
        "head (backward)",
        "a.1 (backward)",
    ]


def test_a_module_begins_and_ends_at_the_same_place_in_both_runs():
    assert places(BEFORE, AFTER) == [0, 1, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7]
    assert places(BEFORE, BEFORE) == list(range(8))


def test_runs_without_a_module_in_common_are_stretched_evenly():
    assert places(BEFORE, run_of("", "", "", "")) == [0, 2, 4, 6]


def test_modules_in_another_order_do_not_turn_time_back():
    found = places(run_of("a", "b", "c"), run_of("c", "a", "b", "c"))
    assert found == sorted(found)
    assert len(found) == 4


def test_what_is_alive_is_named_with_equal_ones_together():
    big = Held("h.0", "aten.bmm", 4096, (4, 256), "float32")
    work = Held("h.0", "aten.conv workspace", 2048, (2048,), "uint8")
    small = [Held("", "aten.add", n, (n,), "uint8") for n in (7, 6, 5, 4, 3)]
    run = Timeline(10265, [], (big, big, work, *small, Held("", "aten.t", 0, (), "uint8")), 0)
    assert name_held(run, "Model", most=3) == [
        ("8.00 KiB", "h.0", "bmm [4, 256]  x 2"),
        ("2.00 KiB", "h.0", "conv workspace"),
        ("7 B", "Model", "add [7]"),
        ("18 B", "", "in 4 more"),
    ]


@pytest.mark.parametrize("after", [None, AFTER])
def test_a_picture_is_drawn(tmp_path, after):
    pillow = pytest.importorskip("PIL.Image")
    path = draw_memory(
        BEFORE, tmp_path / "memory.png", model="Model", after=after, budget_bytes=2**21
    )
    with pillow.open(path) as picture:
        assert picture.width == 1500
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert (0xC0, 0x39, 0x2B) in colours  # the budget
    assert ((0x1F, 0x6F, 0xB2) in colours) == (after is not None)


@pytest.mark.parametrize("name", ["no/memory.png", "memory.txt"])
def test_a_picture_that_cannot_be_written(tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match=r"cannot write the picture to .*name a \.png file"):
        draw_memory(BEFORE, tmp_path / name, model="Model")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hairpin\[report\]'"):
        require_matplotlib()
