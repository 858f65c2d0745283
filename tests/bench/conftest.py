"""Fixtures of the benchmarks' tests."""

import pytest

from hairpin.bench import network


@pytest.fixture
def _no_network(monkeypatch):
    """No network can be emulated here."""
    monkeypatch.setattr(network, "why_not", lambda: "no tools")
