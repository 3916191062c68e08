import json
import os
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest

import gdjax
from gdjax import _files as files
from gdjax import report as plots
from gdjax import report as records


def test_json_is_strict_and_holds_arrays_paths_and_scalars(tmp_path):
    value = {
        "nan": float("nan"),
        "infinite": np.asarray([1.0, np.inf]),
        "nested": [(jnp.int32(3), np.float32(0.5)), None, True],
        "path": tmp_path,
        "tricky": '[\n "text" ]',
        1: "key",
    }
    assert json.loads(files.to_json(value)) == {
        "nan": None,
        "infinite": [1.0, None],
        "nested": [[3, 0.5], None, True],
        "path": str(tmp_path),
        "tricky": '[\n "text" ]',
        "1": "key",
    }


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write_half():
        with files.atomic(path) as file:
            file.write(b"half of the n")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_written_file_has_ordinary_permissions(tmp_path):
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_a_run_folder_that_stays_empty_is_removed_when_the_run_fails(tmp_path):
    def fail(write):
        with records.run_folder(tmp_path / "a" / "b") as folder:
            if write:
                (folder / "kept").touch()
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        fail(write=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="no data"):
        fail(write=True)
    assert (tmp_path / "a" / "b" / "kept").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(ValueError, match=f"out='{path}' cannot be written: {reason}"), records.run_folder(path):
            pass
    with pytest.raises(ValueError, match=r"json=.* cannot be written: Is a directory"):
        files.check_replaceable(tmp_path, "json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"json=.* cannot be written: it is a device or a pipe"):
        files.check_replaceable(tmp_path / "pipe", "json")
    with pytest.raises(ValueError, match=r"json=.* cannot be written: No such file or directory"):
        files.check_replaceable(tmp_path / "absent" / "out.json", "json")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one file, and the caller standing in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tracked.txt").write_text("as committed")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_provenance_names_versions_device_seed_and_commit(repository, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    inside = records.provenance(arguments={}, seed=3, wall_seconds=0.5)
    assert inside["commit"] == head
    (repository / "tracked.txt").write_text("changed since")
    assert records.provenance(arguments={}, seed=3, wall_seconds=0.5)["commit"] == f"{head}-dirty"
    monkeypatch.chdir("/")
    assert records.provenance(arguments={"a": 1}, seed=3, wall_seconds=0.5)["commit"] is None
    assert inside["versions"]["jax"] == jax.__version__
    assert inside["versions"]["gdjax"] == gdjax.__version__
    assert (inside["device"]["platform"], inside["seed"], inside["x64"]) == (jax.default_backend(), 3, precision.X64)
    json.loads(files.to_json(inside))


@pytest.mark.slow
def test_asking_for_the_commit_runs_nothing_of_the_repository(repository, tmp_path_factory):
    """It may be anybody's: its settings name programs for git to run."""
    ran = tmp_path_factory.mktemp("ran")

    def program(name):
        path = repository / ".git" / name
        path.write_text(f"#!/bin/sh\ntouch {ran / path.name}\ncat\n")
        path.chmod(0o755)
        return str(path)

    (repository / ".git" / "hooks").mkdir(exist_ok=True)
    program("hooks/post-index-change")
    for name in ("core.fsmonitor", "filter.a=b.clean", "filter.c.process", "diff.external", "diff.d.textconv"):
        subprocess.run(["git", "config", name, program(name)], check=True)
    subprocess.run(["git", "config", "filter.a=b.required", "true"], check=True)
    (repository / ".git" / "info" / "attributes").write_text("tracked.txt filter=a=b\nother.txt filter=c\n* diff=d\n")
    (repository / "tracked.txt").write_text("as committed")  # another time, so that git compares what is in it
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert records.provenance(arguments={}, seed=0, wall_seconds=0.0)["commit"] == head
    (repository / "tracked.txt").write_text("changed since")
    assert records.provenance(arguments={}, seed=0, wall_seconds=0.0)["commit"] == f"{head}-dirty"
    assert os.listdir(ran) == []
    subprocess.run(["git", "status"], check=True, capture_output=True)
    assert os.listdir(ran) != []  # that it would be seen


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with records.run_folder(tmp_path / "run") as folder:
        with pytest.raises(ValueError, match=r"out='.*run' is in use by process \d+"):
            records.run_folder(tmp_path / "run").__enter__()
        (folder / "result.json").write_text("{}")
    assert os.listdir(tmp_path / "run") == ["result.json"]


def test_a_file_that_is_no_result_is_not_replaced_and_one_that_is_keeps_its_permissions(tmp_path):
    mine, earlier, empty = tmp_path / "mine.py", tmp_path / "earlier.json", tmp_path / "empty"
    mine.write_text("print()")
    empty.touch()
    files.write_json(earlier, {"provenance": {}})
    earlier.chmod(0o640)
    with pytest.raises(ValueError, match=r"json='.*mine.py' cannot be written: the file there is no result of gdjax"):
        files.check_replaceable(mine, "json")
    files.check_replaceable(empty, "json")
    files.check_replaceable(earlier, "json")
    files.write_json(earlier, {"provenance": {}})
    assert earlier.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*result.json'"):
            files.write_json(tmp_path / "result.json", ["x" * 10_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_journal_gives_back_what_was_kept_and_drops_what_was_cut_short(tmp_path):
    path, identity = tmp_path / "rows.jsonl", {"seed": 0, "problem": "digits-mlp"}
    first = plots.journal(path, identity)
    assert first.rows == []
    first.keep({"batch_size": 1, "losses": np.asarray([[1.5, np.nan]])})
    first.keep({"batch_size": 32, "losses": jnp.zeros((1, 2)), "name": "mini-batch"})
    content = path.read_bytes()
    rows = plots.journal(path, identity).rows
    np.testing.assert_array_equal(rows[0]["losses"], [[1.5, np.nan]])
    assert rows[1] == {"batch_size": 32, "losses": [[0, 0]], "name": "mini-batch"}
    path.write_bytes(content[:-3])
    again = plots.journal(path, identity)
    assert [row["batch_size"] for row in again.rows] == [1]
    again.keep({"batch_size": 32, "losses": jnp.zeros((1, 2)), "name": "mini-batch"})
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r"holds rows of another run: seed was 0 and is 1\. Use a folder"):
        plots.journal(path, identity | {"seed": 1})
    with pytest.raises(ValueError, match=r"holds rows of another run: problem was 'digits-mlp' and is None"):
        plots.journal(path, {"seed": 0})
    for content in (b"print()\n", b"[]\n", b"1\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no journal of gdjax"):
            plots.journal(path, identity)
        assert path.read_bytes() == content


def test_a_title_is_text_and_no_formula(tmp_path):
    """It names the user's own problem; as a formula, this one would fail to be drawn."""
    plots.save(plots.panels(1, title="$\\name$")[0], tmp_path / "panels.png")
    axes = {"xlabel": "x", "ylabel": "y", "title": "$\\name$"}
    plots.save(plots.curves([1, 2], {"a": [[1.0, 2.0]]}, **axes), tmp_path / "curves.png")
    plots.save(plots.agreement({"a": ([1.0], [1.0])}, **axes), tmp_path / "agreement.png")


def test_a_figure_leaves_out_what_is_not_finite_and_is_written_whole(tmp_path):
    values = {"a": np.asarray([[1.0, np.nan, 3.0], [1.0, 2.0, 4.0]]), "b": np.full((2, 3), np.inf)}
    figure = plots.curves([1, 2, 3], values, xlabel="updates", ylabel="loss", title="a title " * 30, log="y")
    first, second = figure.axes[0].lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 1], [3, 3.5]])
    assert len(second.get_xydata()) == 0
    assert figure.axes[0].get_yscale() == "log"
    plots.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    empty = plots.curves([1, 2, 3], {"b": values["b"]}, xlabel="updates", ylabel="loss", title="nothing", log="xy")
    plots.save(empty, tmp_path / "empty.png")


def test_bars_reach_from_low_to_high_with_the_first_at_the_top():
    axis: Any = plots.panels(1, title="ratios")[1][0]
    spreads = {"first": {"low": 1.0, "median": 2.0, "high": 4.0}, "second": {"low": 3.0, "median": 3.5, "high": 5.0}}
    plots.bars(axis, spreads, [plots.COLOURS[0], plots.COLOURS[1]])
    assert [bar.get_width() for bar in axis.patches] == [2.0, 3.5]
    [intervals] = axis.containers[0].lines[2]
    np.testing.assert_allclose([part[:, 0] for part in intervals.get_segments()], [[1, 4], [3, 5]])
    bottom, top = axis.get_ylim()
    assert bottom > top  # downwards
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]


@pytest.mark.parametrize("log", ["", "y"])
def test_a_curve_that_diverges_does_not_press_the_others_together(log):
    x = np.arange(1.0, 20.0)
    values = {f"B = {2**i}": [x ** (-0.1 * (i + 1))] for i in range(9)} | {"diverges": [np.exp(2 * x)]}
    [axis] = plots.curves(x, values, xlabel="epochs", ylabel="loss", title="ten", log=log).axes
    assert 1 < axis.get_ylim()[1] < 1.3
    looks = [(line.get_color(), line.get_linestyle()) for line in axis.lines]
    assert len(set(looks)) == 10


def test_a_long_title_stands_below():
    figure, _ = plots.panels(1, title="word " * 40)
    assert (figure.get_suptitle(), figure.get_supxlabel().split()) == ("", ["word"] * 40)


def test_panels_stand_in_rows_of_columns_and_leave_no_empty_axes():
    figure, axes = plots.panels(5, title="five", columns=3)
    places: list[Any] = [axis.get_subplotspec() for axis in axes]
    assert len(axes) == len(figure.axes) == 5
    assert [place.get_geometry()[:2] for place in places] == [(2, 3)] * 5
    [first, _] = plots.panels(2, title="two", columns=3)[1]
    narrow: Any = first.get_subplotspec()
    assert narrow.get_geometry()[:2] == (1, 2)


def test_many_labels_stand_beside_the_axes_and_a_long_verdict_below():
    points = {f"{i}": ([1.0], [2.0]) for i in range(7)}
    many: Any = plots.agreement(points, xlabel="predicted", ylabel="measured", title="word " * 40)
    assert [len(legend.get_texts()) for legend in many.legends] == [8]  # and that of the line of equal values
    assert many.axes[0].get_legend() is None
    assert many.axes[0].get_title() == ""
    assert many.get_supxlabel().startswith("word")
    few: Any = plots.agreement({"0": ([1.0], [2.0])}, xlabel="predicted", ylabel="measured", title="short")
    assert (few.legends, few.axes[0].get_title()) == ([], "short")
    assert few.axes[0].get_legend() is not None
