"""Quantities: text to numbers and back, and the words for text that is no quantity."""

import pytest

from hairpin.errors import HairpinError, UnitError
from hairpin.units import format_bytes, format_time, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "amount_bytes"),
    [
        (1, 1),
        (2**40, 2**40),
        ("1", 1),
        ("17b", 17),
        ("40GiB", 40 * 2**30),
        ("40 gib", 40 * 2**30),
        ("  1.5 KiB ", 1536),
        ("512 MB", 512 * 10**6),
        ("1kB", 1000),
        ("2GB", 2 * 10**9),
        ("0.5TB", 5 * 10**11),
        ("3TiB", 3 * 2**40),
        ("8MiB", 8 * 2**20),
    ],
)
def test_bytes_are_read(text, amount_bytes):
    assert parse_bytes(text) == amount_bytes


@pytest.mark.parametrize(
    "text",
    [
        "2 apples",
        "",
        "GiB",
        "GiB 2",
        "-5GiB",
        "1e9",
        "1,000",
        "0x10",
        "1 Gi B",
        "nan",
        "inf",
    ],
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UnitError, match=r"cannot read .* as an amount of memory") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "for example '40GiB'" in str(caught.value)
    assert isinstance(caught.value, HairpinError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("amount", [0, -1, -(2**30), "0", "0GiB", "0.4B"])
def test_nothing_is_no_amount(amount):
    with pytest.raises(UnitError, match="must be more than 0 bytes"):
        parse_bytes(amount)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("unlimited", None),
        (" Unlimited ", None),
        ("50mbit", 50e6),
        ("1 Gbit", 1e9),
        ("0.5gbit", 5e8),
        ("900kbit", 9e5),
        ("8bit", 8),
    ],
)
def test_rates_are_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["2 apples", "", "50", "50MB", "-1mbit", "0mbit", "fast", "mbit"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(UnitError, match=r"cannot read .* as a rate; write 'unlimited'") as caught:
        parse_rate(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (40 * 2**30, "40.00 GiB"),
        (2**40, "1.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_bytes_are_written(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0, "0.0 us"),
        (2.5e-6, "2.5 us"),
        (0.0042, "4.20 ms"),
        (1.5, "1.50 s"),
        (119, "119.00 s"),
        (120, "2 min 00 s"),
        (605.9, "10 min 05 s"),
    ],
)
def test_times_are_written(time_s, text):
    assert format_time(time_s) == text


@pytest.mark.parametrize("count", [1, 999, 1023, 1024, 1025, 123_456, 2**20 + 1, 7 * 10**9, 2**43])
def test_bytes_read_back_what_was_written(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize("count", [1, 1000, 4096, 40 * 2**30])
def test_whole_numbers_read_back_exactly(count):
    assert parse_bytes(str(count)) == count == parse_bytes(count)
