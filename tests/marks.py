"""Marks of tests."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A parameter's value with which the test is run by ``make test-slow`` alone."""
    return pytest.param(*values, marks=pytest.mark.slow)
