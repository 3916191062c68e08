import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from gdjax import report
from gdjax.commands import experiment
from gdjax.problems import datasets


def main(options):
    rows = [{"seed": options.seed, "smoke": options.smoke}]
    return experiment.Result(rows, "Not as predicted.", Figure(), {"path.gif": b"GIF89a", "table.csv": b"1,2\n"})


def wrong(options):
    raise ValueError("rates=[] must hold a rate")


def call(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    experiment.run(main)


def test_everything_that_an_experiment_returns_is_saved(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    call(monkeypatch, main, "--smoke", "--seed", "3", "--out", str(out))
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "path.gif", "result.json", "table.csv"]
    assert (out / "path.gif").read_bytes() == b"GIF89a"
    assert (out / "table.csv").read_bytes() == b"1,2\n"
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "result.json").read_text())
    assert content["rows"] == [{"seed": 3, "smoke": True}]
    assert content["verdict"] == "Not as predicted."
    assert content["provenance"]["seed"] == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Not as predicted."
    assert printed[1].endswith("result.json and figure.png, path.gif, table.csv")


def test_a_full_disk_does_not_lose_the_answer(tmp_path, monkeypatch, capsys):
    def full(figure, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(report, "save", full)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, main, "--out", str(tmp_path / "run"))
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["Not as predicted."]
    assert "No space left on device" in printed.err


def test_an_experiment_need_not_have_files_and_a_mistake_leaves_no_folder(tmp_path, monkeypatch, capsys):
    call(monkeypatch, lambda options: experiment.Result([], "", Figure()), "--out", str(tmp_path / "plain"))
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["figure.png", "result.json"]
    with pytest.raises(SystemExit) as failure:
        call(monkeypatch, wrong, "--out", str(tmp_path / "wrong"))
    assert failure.value.code == 2
    assert not (tmp_path / "wrong").exists()
    assert "rates=[] must hold a rate" in capsys.readouterr().err


def test_help_keeps_question_prediction_and_cost_apart(monkeypatch, capsys):
    monkeypatch.setattr(
        sys.modules[__name__], "__doc__", "Is it?\n\nQuestion    Is it\n            so?\nCost        1 s.\n"
    )
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, main, "--help")
    assert end.value.code == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()][1:5] == [
        *("Is it?", "Question    Is it", "so?", "Cost        1 s."),
    ]


@pytest.mark.slow
def test_ctrl_c_while_an_experiment_imports_jax_ends_it(tmp_path, listening):
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.three_ways", "--smoke"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gdjax: interrupted\n")


@pytest.mark.slow
def test_a_name_after_the_package_is_one_line_with_the_command_that_was_meant():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "three_ways", "--smoke"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.endswith("one experiment is python -m experiments.three_ways")


def test_the_folder_of_data_is_where_data_sets_are_read_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GDJAX_DATA", "/nowhere")  # and restores it at the end

    def reads(options):
        datasets.power_plant()

    for folder, message in {"absent": "data='absent' is not a folder", str(tmp_path): f"{tmp_path}/uci-reg"}.items():
        with pytest.raises(SystemExit) as failure:
            call(monkeypatch, reads, "--data", folder, "--out", str(tmp_path / "run"))
        assert failure.value.code == 2
        assert message in capsys.readouterr().err


NOTHING_STARTED = """
import importlib, pkgutil, sys
import jax
import experiments, gdjax
count = 1
for package in (gdjax, experiments):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            try:
                jax.config.update("jax_num_cpu_devices", count := count + 1)  # an error once JAX uses its devices
            except RuntimeError:
                sys.exit(f"{found.name} starts JAX's backend when it is imported")
print(count)
"""


@pytest.mark.slow
def test_no_module_starts_jax_when_it_is_imported():
    """For `--coordinator`, `--devices` and `--x64` come before anything else of JAX."""
    command = [sys.executable, "-W", "ignore", "-c", NOTHING_STARTED]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=root)
    assert done.stderr == ""
    assert int(done.stdout) > 80


def test_the_best_rate_is_of_the_mean_over_seeds_and_never_where_one_diverged():
    rates = [0.1, 0.2, 0.4, 0.8]
    best = experiment.best_rate(rates, [[4.0, 1.0, 2.0, 0.0], [4.0, 3.0, 1.0, float("inf")]])
    assert (best.position, best.rate, best.inside) == (2, 0.4, True)
    np.testing.assert_array_equal(best.values, [2.0, 1.0])
    assert not experiment.best_rate(rates[:3], [[4.0, 3.0, 2.0]]).inside


def test_the_standard_error_is_that_of_the_mean():
    mean, error = experiment.mean_and_error([1.0, 5.0])
    assert mean == 3.0
    assert error == pytest.approx(2.0)  # deviation sqrt(8) of one, over sqrt(2)
