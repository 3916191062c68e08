"""Words of the command line become objects, or errors that say which part of them is wrong."""

import sys

import optax
import pytest

from gdjax.bench import VARIANTS
from gdjax.commands import _specs as specs


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with a module in it, and the caller standing in that folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(
        "from gdjax import problems\nproblem = problems.least_squares()\nmake = problems.least_squares\nother = 3\n"
        "import optax\nadam = optax.adam\ndef exits(*rate): raise SystemExit(0)\ndef two(rate): return 2\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("spec", ["my_module:problem", "my_module:make"])
def test_a_problem_is_found_beside_the_caller_and_leaves_the_path_as_it_was(spec):
    path = list(sys.path)
    assert specs.problem(spec).name == "least-squares"
    assert sys.path == path


def test_the_current_folder_is_searched_first(tmp_path, monkeypatch):
    for folder in ("installed", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "found_twice.py").write_text(
            f"import dataclasses\nfrom gdjax import problems\n"
            f"problem = dataclasses.replace(problems.least_squares(), name={folder!r})\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.chdir(tmp_path / "here")
    assert specs.problem("found_twice:problem").name == "here"


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent:problem", "no module named 'absent' here or in this environment"),
        ("needy:problem", "no module named 'a_package_that_is_not_there'"),
        ("broken:problem", "importing 'broken' raised ZeroDivisionError"),
        ("my_module:absent", "module 'my_module' has no 'absent'; the nearest that it has: "),
        ("my_module:other", "is a int, not a gdjax.problem.Problem"),
        ("my_module:", "is not of the form package.module:attribute"),
        (":problem", "is not of the form package.module:attribute"),
        ("no-such-name", "is not one of digits-mlp, least-squares"),
    ],
)
def test_it_is_said_which_part_of_a_spec_is_wrong(spec, message):
    path = list(sys.path)
    with pytest.raises(ValueError, match=message):
        specs.problem(spec)
    assert sys.path == path


@pytest.mark.usefixtures("beside")
def test_what_is_built_in_is_found_by_its_name_and_the_rest_is_imported():
    assert specs.optimizer("sgd") == "sgd"  # of the table that the library has
    assert specs.optimizer("my_module:adam") is optax.adam
    assert specs.variant("scan") is VARIANTS["scan"]
    assert specs.variant("lanes") is None
    assert specs.variant("my_module:two")(0.1) == 2
    assert specs.model("mlp-small").num_examples == specs.model("my_module:problem").num_examples == 1024


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("optimizer", "absent:adam", "optimizer='absent:adam': no module named 'absent'"),
        ("optimizer", "my_module:exits", r"optimizer='my_module:exits': calling it .* raised SystemExit\(0\)"),
        ("optimizer", "my_module:two", "optimizer='my_module:two' returned a int, not an optax.Gradient"),
        ("optimizer", "my_module:other", "optimizer='my_module:other': calling it .* raised TypeError"),
        ("problem", "my_module:exits", r"problem='my_module:exits': calling it .* raised SystemExit\(0\)"),
        ("model", "mlp-medium", "models: problem='mlp-medium' is not one of .*; or of mlp-small, mlp-large"),
        ("variant", "scam", "variant='scam' is not one of python-loop, scan, .*, lanes; one of your own"),
        ("variant", "absent:run", "variant='absent:run': no module named 'absent'"),
        ("variant", "math:pi", "variant='math:pi' is a float"),
    ],
)
def test_a_word_that_is_no_such_object_is_refused(kind, spec, message):
    with pytest.raises(ValueError, match=message):
        getattr(specs, kind)(spec)
