"""Errors: one root, and each also what Python calls that kind of error."""

import inspect
import pickle

import pytest

import hairpin
from hairpin import errors

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
PYTHONS = {
    "UnitError": ValueError,
    "LayoutError": ValueError,
    "SequenceError": ValueError,
    "MeshError": ValueError,
    "PlanError": ValueError,
    "SplitError": errors.PlanError,
    "CommError": RuntimeError,
    "DisagreementError": errors.CommError,
}


def test_all_have_one_root():
    assert hairpin.HairpinError is errors.HairpinError
    assert len(ALL) > 10
    assert all(issubclass(kind, errors.HairpinError) for kind in ALL)


@pytest.mark.parametrize(("name", "kind"), PYTHONS.items())
def test_each_is_also_an_error_that_python_knows(name, kind):
    assert issubclass(getattr(errors, name), kind)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_errors_travel_between_ranks(kind):
    error = pickle.loads(pickle.dumps(kind("what was got, what is wrong, the fix")))  # noqa: S301  # our own
    assert type(error) is kind
    assert str(error) == "what was got, what is wrong, the fix"
