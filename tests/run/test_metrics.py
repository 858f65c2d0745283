"""One row a step, none twice, whatever a kill left in the file."""

import pytest

from hairpin.errors import DataError
from hairpin.run.metrics import MetricsLog, StepMetrics, read, thinned


def row(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        lr=0.1,
        grad_norm=2.0,
        samples_per_s=3.0,
        bytes_sent=[4, 5],
        peak_memory_bytes=[6, 7],
        time_s=0.5,
    )


def write(path, steps, *, after_step=0, loss=1.0, history=None):
    log = MetricsLog(path, after_step=after_step, history=history)
    for step in steps:
        log.write(row(step, loss))
    log.close()


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    assert [r["step"] for r in read(path)] == [1, 2]
    assert read(path)[0]["bytes_sent"] == [4, 5]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 10), after_step=5, loss=2.0)
    assert [r["step"] for r in read(path)] == list(range(1, 10))
    assert [r["loss"] for r in read(path)] == [1.0] * 5 + [2.0] * 4


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    write(path, [1])
    assert [r["step"] for r in read(path)] == [1]


def test_a_row_is_in_the_file_at_once(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(row(1))
    assert len(read(tmp_path / "m.jsonl")) == 1
    log.close()


def test_a_run_elsewhere_takes_its_history_along(tmp_path):
    write(tmp_path / "old.jsonl", range(1, 5))
    write(tmp_path / "new.jsonl", [4], after_step=3, history=tmp_path / "old.jsonl")
    assert [r["step"] for r in read(tmp_path / "new.jsonl")] == [1, 2, 3, 4]


def test_thinned_rows_are_few_and_end_with_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 1001), loss=1.23456789)
    (tmp_path / "thin.jsonl").write_text(thinned(read(path), most=100))
    rows = read(tmp_path / "thin.jsonl")
    assert [r["step"] for r in rows] == list(range(10, 1001, 10))
    assert rows[0]["loss"] == 1.235
    assert thinned([], most=5) == ""
    assert thinned(read(path)[:3], most=5).count("\n") == 3


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-20])
    assert [r["step"] for r in read(path)] == [1, 2]
    write(path, [3], after_step=2)
    assert [r["step"] for r in read(path)] == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1 is not JSON"):
        read(path)
