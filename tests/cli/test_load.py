"""Objects named on the command line, and what is said when they are not there."""

import pytest

from hairpin.cli.load import ObjectNameError, load_callable, load_object


def test_an_object_in_the_current_folder(model):
    assert load_object("small:NUMBER") == 3
    assert load_object("small:Model.forward").__name__ == "forward"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("small", "write module:name, for example mymodel:build"),
        (":build", "write module:name"),
        (
            "smal:build",
            "there is no module 'smal' in .*run the command in the folder that holds it",
        ),
        ("small.deep:build", "there is no module 'small.deep'"),
        ("small:modle", r"module 'small' \(.*small.py\) has no 'modle'; it has torch, nn, Along"),
    ],
)
def test_a_name_that_leads_nowhere(model, spec, message):
    with pytest.raises(ObjectNameError, match=message):
        load_object(spec)


def test_a_module_that_needs_something_absent(folder):
    (folder / "needy.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(
        ObjectNameError, match="needs 'nothing_of_this_name', which is not installed"
    ):
        load_object("needy:build")


def test_an_error_inside_a_module_is_shown_as_it_is(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_object("broken:build")


def test_a_value_where_a_function_is_needed(model):
    with pytest.raises(ObjectNameError, match="is of type int, which cannot be called"):
        load_callable("small:NUMBER")
