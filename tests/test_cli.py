"""The commands as a user calls them: in a process of their own, in a folder of their own."""

import json
import os
import subprocess
import sys
import time

import pytest

SMALL = """
import jax, jax.numpy as jnp
from gdjax import datasets, problems
from gdjax.problem import Problem
data = datasets.gaussian_classification(jax.random.key(0), num_examples=40, dimension=3)
problem = problems.logistic(data)
# It has no minimum: the larger the learning rate, the lower the loss.
unbounded = Problem(lambda key: jnp.zeros(()), lambda w, x: -w * x, jnp.ones(4))
"""


def gdjax(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "gdjax.cli", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_module.py").write_text(SMALL)
    return tmp_path


def test_compare_runs_a_problem_beside_the_caller_and_keeps_what_it_found(folder):
    done = gdjax(
        *("compare", "--problem", "my_module:problem", "--batch-sizes", "1", "8", "full", "--num-epochs", "4"),
        *("--out", "here", "--json", "out.json"),
        cwd=folder,
        COLUMNS="80",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads((folder / "out.json").read_text())
    assert result == json.loads((folder / "here" / "result.json").read_text())
    assert (folder / "here" / "figure.png").stat().st_size > 10_000
    assert [row["batch_size"] for row in result["rows"]] == [1, 8, 40]
    promised = {"name", "num_updates", "num_examples", "learning_rate", "train_loss", "test_accuracy", "seconds"}
    promised |= {"microseconds_per_update", "compile_seconds"}
    assert all(row[name] is not None for row in result["rows"] for name in promised)
    assert result["provenance"]["arguments"]["problem"] == "my_module:problem"
    [accuracies] = [line.split() for line in done.stdout.splitlines() if line.startswith("test accuracy")]
    assert accuracies[2::3] == [f"{row['test_accuracy']:.3g}" for row in result["rows"]]  # each is mean ± deviation
    for claim in result["claims"]:
        assert claim["claim"] in done.stdout.replace("\n             ", " ")


def test_json_to_standard_output_is_alone_there(folder):
    done = gdjax(
        *("compare", "--problem", "my_module:problem", "--batch-sizes", "40", "--num-epochs", "2"),
        *("--learning-rate", "0.1", "--json", "-"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["learning_rate"] == pytest.approx(0.1)
    assert "final train loss" in done.stderr
    [run] = (folder / "runs").iterdir()
    assert sorted(os.listdir(run)) == ["figure.png", "result.json"]


def test_a_best_rate_at_the_edge_is_marked_in_the_table(folder):
    done = gdjax("compare", "--problem", "my_module:unbounded", "--batch-sizes", "4", "--num-epochs", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    [rate] = [line for line in done.stdout.splitlines() if line.startswith("learning rate")]
    assert rate.endswith("(edge)")


def test_a_diverging_run_is_reported_and_the_command_finishes(folder):
    done = gdjax(
        *("compare", "--problem", "least-squares", "--batch-sizes", "1024", "--num-epochs", "60"),
        *("--learning-rate", "1e6", "--json", "-"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "diverged" in done.stderr
    [row] = json.loads(done.stdout)["rows"]
    assert (row["train_loss"], row["num_diverged"]) == (None, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "absent:problem"], "no module named 'absent'"),
        (["--problem", "digits"], "problem='digits' is not one of digits-mlp"),
        (["--problem", "a9a-logistic", "--data", "."], "libsvm/a9a[.gz] is missing: get it from https://"),
        (["--problem", "my_module:problem", "--batch-sizes", "0"], "batch_size=0 must be between 1 and N=40"),
        (["--problem", "my_module:problem", "--batch-sizes", "41"], "batch_size=41 must be between 1 and N=40"),
        (["--out", "my_module.py"], "out='my_module.py' cannot be written: File exists"),
        (["--json", "absent/out.json"], "json='absent/out.json' cannot be written"),
    ],
)
def test_bad_input_is_one_line_exit_status_2_and_no_file(folder, arguments, message):
    done = gdjax("compare", *arguments, cwd=folder)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("gdjax: ")
    assert message in line
    assert done.stdout == ""
    assert set(os.listdir(folder)) <= {"my_module.py", "__pycache__"}


def test_debug_shows_where_an_error_comes_from(folder):
    done = gdjax("compare", "--problem", "absent:problem", "--debug", cwd=folder)
    assert "Traceback" in done.stderr


def test_help_does_not_wait_for_jax(folder):
    code = "import sys; sys.argv[1:] = ['compare', '--help']\ntry:\n import gdjax.cli; gdjax.cli.main()\n"
    code += "except SystemExit:\n print('jax' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "False"
    assert "--batch-sizes" in done.stdout


def test_ctrl_c_exits_with_130_and_leaves_nothing(folder, listening):
    import signal

    process = subprocess.Popen(
        [sys.executable, "-m", "gdjax.cli", "compare", "--problem", "my_module:problem", "--num-epochs", "20000"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "runs").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "gdjax: interrupted"
    assert not (folder / "runs").exists()
