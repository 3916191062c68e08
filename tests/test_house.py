"""What the code promises of itself: which way imports go, and that files are data and not programs."""

import ast
import re
from pathlib import Path

import pytest

import gdjax

FOLDER = Path(gdjax.__file__).parent
FILES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
ORDER = re.findall(r"^    (\w+)  ", gdjax.__doc__ or "", re.MULTILINE)


def tree(name):
    return ast.parse(FILES[name].read_text())


def imported(nodes):
    """Return the modules of gdjax that these statements import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "gdjax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gdjax."):
            yield (node.module or "").split(".")[1]


def parts_of(names):
    """Return the files of modules that are one in the table: ghost_rules of ghost."""
    return {file for file in FILES if file not in ORDER and any(file.startswith(f"{name}_") for name in names)}


def test_the_table_of_contents_names_every_module_once():
    assert sorted([*ORDER, *parts_of(ORDER)]) == sorted(FILES)
    assert sorted({*ORDER, *gdjax.__all__}) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_above_it(name):
    above = set(ORDER[: ORDER.index(name)])
    assert set(imported(tree(name).body)) <= above | parts_of({*above, name}) | {"__version__"}


def test_nothing_that_a_file_holds_is_executed():
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml"}
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {part.split(".")[0] for part in names} & {*forbidden, "experiments"}, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__"}, name
                if called in {"np.load", "np.save", "numpy.load", "numpy.save"}:
                    assert "allow_pickle=False" in ast.unparse(node), name
