"""The commands as a user calls them, most of them in this process; experiments end as commands do."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from gdjax import commands, compare, problems
from gdjax.commands import _arguments as arguments
from gdjax.commands import _session as command
from gdjax.commands._session import Common
from gdjax.commands.compare import Compare

SMALL = """
import jax, jax.numpy as jnp
from gdjax import problems
from gdjax.problems import datasets
from gdjax.problem import Problem
data = datasets.gaussian_classification(jax.random.key(0), num_examples=40, dimension=3)
problem = problems.logistic(data)
# It has no minimum: the larger the learning rate, the lower the loss.
unbounded = Problem(lambda key: jnp.zeros(()), lambda w, x: -w * x, jnp.ones(4))
explosive = Problem(lambda key: jnp.ones(()), lambda w, x: (w * x) ** 4, jnp.ones(4))

def broken():
    raise TypeError("one\\ntwo")

def prints():
    print("read the data")
    return problem

def exits():
    raise SystemExit(0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("GDJAX_DATA", "")  # --data changes it
    yield tmp_path
    sys.modules.pop("my_module", None)  # another test has one of this name


@pytest.fixture
def gdjax(folder, monkeypatch, capsys):
    """Return the function (arguments) -> (exit status, what it printed, what it complained)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gdjax", *arguments])
        status = 0
        try:
            commands.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_compare_runs_a_problem_beside_the_caller_and_keeps_what_it_found(folder):
    given = "compare --problem my_module:problem --batch-sizes 1 8 full --num-epochs 4 --out here --json out.json"
    done = subprocess.run(
        [sys.executable, "-m", "gdjax.commands", *given.split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = json.loads((folder / "out.json").read_text())
    assert result == json.loads((folder / "here" / "result.json").read_text())
    assert (folder / "here" / "figure.png").stat().st_size > 1000
    assert [row["batch_size"] for row in result["rows"]] == [1, 8, 40]
    promised = {"name", "num_updates", "num_examples", "learning_rate", "train_loss", "test_accuracy", "seconds"}
    promised |= {"microseconds_per_update", "compile_seconds"}
    assert all(row[name] is not None for row in result["rows"] for name in promised)
    assert result["provenance"]["arguments"]["problem"] == "my_module:problem"
    assert not result["provenance"]["x64"]
    [accuracies] = [line.split() for line in done.stdout.splitlines() if line.startswith("test accuracy")]
    assert accuracies[2::3] == [f"{row['test_accuracy']:.3g}" for row in result["rows"]]  # each is mean ± deviation
    for claim in result["claims"]:
        assert claim["claim"] in done.stdout.replace("\n             ", " ")


@pytest.mark.slow
def test_json_to_standard_output_is_alone_there_whatever_a_problem_prints(gdjax, folder):
    one_size = ("--problem", "my_module:prints", "--batch-sizes", "40", "--num-epochs", "2", "--learning-rate", "0.1")
    status, printed, complained = gdjax("compare", *one_size, "--json", "-")
    assert status == 0, complained
    assert json.loads(printed)["rows"][0]["learning_rate"] == pytest.approx(0.1)
    assert "read the data" in complained
    assert "final train loss" in complained
    assert "\r" not in complained  # no progress bar
    [run] = (folder / "runs").iterdir()
    assert sorted(os.listdir(run)) == ["figure.png", "result.json"]


@pytest.mark.slow
def test_a_best_rate_at_the_edge_is_marked_in_the_table(gdjax):
    status, printed, complained = gdjax(
        "compare", "--problem", "my_module:unbounded", "--batch-sizes", "4", "--num-epochs", "1"
    )
    assert status == 0, complained
    [rate] = [line for line in printed.splitlines() if line.startswith("learning rate")]
    assert rate.endswith("(edge)")


@pytest.mark.usefixtures("nans")
@pytest.mark.slow
def test_a_diverging_run_is_reported_and_the_command_finishes(gdjax):
    status, printed, complained = gdjax(
        *("compare", "--problem", "my_module:explosive", "--batch-sizes", "4", "--num-epochs", "20"),
        *("--learning-rate", "1e6", "--json", "-"),
    )
    assert status == 0, complained
    assert "diverged" in complained
    [row] = json.loads(printed)["rows"]
    assert (row["train_loss"], row["num_diverged"]) == (None, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["compare", "--problem", "absent:problem"], "no module named 'absent'"),
        (["compare", "--problem", "my_module:exits"], "calling it without arguments raised SystemExit(0)"),
        (["compare", "--problem", "digits"], "problem='digits' is not one of digits-mlp"),
        (
            ["compare", "--problem", "my_module:problem", "--batch-sizes", "0"],
            "batch_size=0 must be between 1 and N=40",
        ),
        (["compare", "--problem", "my_module:problem", "--batch-sizes", "41"], "batch_size=41 must be between 1 and N"),
        (["compare", "--out", "my_module.py"], "out='my_module.py' cannot be written: File exists"),
        (["compare", "--json", "absent/out.json"], "json='absent/out.json' cannot be written"),
        (["compare", "--cache", "my_module.py"], "cache='my_module.py' cannot be written: File exists"),
        (["compare", "--seed", f"{2**64}"], f"seed={2**64} must have 64 bits"),
        (["compare", "--process-id", "0"], "process_id=0: give all three"),
        (["compare", "--num-epochs", "99999999999"], "num_epochs=99999999999 must be at least 1 and at most 1491308"),
        (["compare", "--out", "~nobody-of-this-name/out"], "out='~nobody-of-this-name/out' cannot be written"),
        (["advise"], "give exactly one of --target"),
        (["advise", "--problem", "my_module:problem", "--target", ""], "target='' is not of the form"),
        (["advise", "--problem", "my_module:problem", "--target", "loss<=0.1", "--memory", "0"], "memory=0.0 must be"),
        (
            ["advise", "--problem", "my_module:problem", "--target", "loss<=0.1", "--memory", "nan"],
            "memory=nan must be",
        ),
        (["problems", "--json", "absent/x.json"], "json='absent/x.json' cannot be written"),
        (["schedule", "--target", "accuracy>=0.9"], "must be of the training loss"),
        (["schedule", "--target", "loss<=0.1", "--phases", "9"], "phases=9 must be 2 or 3"),
        (["schedule", "--problem", "my_module:problem", "--target", "loss<=0.1"], "has 40 examples: a schedule takes"),
        (["compare", "--out", ""], "out='' names no folder: leave it out, or name one"),
        (["compare", "--cache", ""], "cache='' names no folder: leave it out, or name one"),
        (["compare", "--data", ""], "data='' is not a folder"),
        (["compare", "--json", "my_module.py"], "json='my_module.py' cannot be written: the file there is no result"),
        (["bench", "--devices", "1000000"], "devices=1000000 must be at least 1 and at most"),
        (["bench", "--compare", "absent.json"], "compare='absent.json' cannot be read"),
    ],
)
def test_bad_input_is_one_line_exit_status_2_and_no_file(gdjax, folder, given, message):
    status, printed, complained = gdjax(*given)
    assert status == 2
    [line] = complained.splitlines()
    assert line.startswith("gdjax: ")
    assert message in line
    assert printed == ""
    assert set(os.listdir(folder)) <= {"my_module.py", "__pycache__"}


def test_alone_it_says_what_to_type_first(gdjax, folder):
    status, printed, complained = gdjax()
    assert (status, complained) == (0, "")
    typed = re.findall(r"^  gdjax (\w+)", printed, re.MULTILINE)
    assert typed == ["compare", "advise", "problems"]
    assert all(name in printed for name in commands.COMMANDS)
    assert max(map(len, printed.splitlines())) < 80


def test_quiet_prints_nothing_and_keeps_the_result(gdjax, folder, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # to be set back
    quick = ["compare", "-q", "--problem", "my_module:problem", "--batch-sizes", "8", "--num-epochs", "1", "--out", "o"]
    assert gdjax(*quick) == (0, "", "")
    assert (folder / "o" / "result.json").exists()
    status, printed, _ = gdjax(*quick, "--json", "-")
    assert (status, json.loads(printed)["rows"][0]["batch_size"]) == (0, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["compare", "--num-epoch", "3"], "Unrecognized options: --num-epoch"),
        (
            ["compare", "--batch-sizes", "1", "all"],
            "--batch-sizes: Could not find valid parse for arguments: ['1', 'all']",
        ),
        (
            ["compare", "--num-epochs", "1.5"],
            "Error parsing --num-epochs",
        ),
        (["compute"], "Unrecognized options: compute"),
    ],
)
def test_what_tyro_cannot_understand_it_explains_and_the_exit_status_is_2(gdjax, folder, given, message):
    status, printed, complained = gdjax(*given)
    assert (status, printed) == (2, "")
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", complained).split())
    assert "gdjax compare --help" in complained or "gdjax --help" in complained
    assert set(os.listdir(folder)) <= {"my_module.py", "__pycache__"}


def test_a_failure_is_one_line_exit_status_1_and_debug_shows_where(gdjax, folder, monkeypatch):
    monkeypatch.setattr("gdjax.compare.plan", lambda *given, **named: 1 / 0)
    small = ("compare", "--problem", "my_module:problem")
    assert gdjax(*small) == (1, "", "gdjax: ZeroDivisionError: division by zero (--debug shows where)\n")
    with pytest.raises(ZeroDivisionError):
        gdjax(*small, "--debug")
    with pytest.raises(ValueError, match="no module named 'absent'"):
        gdjax("compare", "--problem", "absent:problem", "--debug")
    assert not (folder / "runs").exists()


def test_without_the_extra_a_command_says_what_to_install(gdjax, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gdjax("compare") == (2, "", "gdjax: figures are drawn by matplotlib: pip install 'gdjax[experiments]'\n")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("rate=0\n  must be positive"), 2, "gdjax: rate=0 must be positive"),
        (ModuleNotFoundError("pip install grain"), 2, "gdjax: pip install grain"),
        (KeyboardInterrupt(), 130, "gdjax: interrupted"),
        (
            OSError(28, "No space left on device"),
            1,
            "gdjax: OSError: [Errno 28] No space left on device (--debug shows where)",
        ),
        (RuntimeError("first\nsecond"), 1, "gdjax: RuntimeError: first (--debug shows where)"),
        (MemoryError(), 1, "gdjax: MemoryError (--debug shows where)"),
    ],
)
def test_every_exception_has_its_exit_status(monkeypatch, capsys, error, status, line):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end, command.ended():
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == line + "\n"


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch, capfd):
    """Python drops what is raised there."""

    class Callback:
        def __del__(self):
            raise KeyboardInterrupt

    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)  # pytest's own
    with command.ended():
        Callback()
    assert ends == [130]
    assert capfd.readouterr().err == "gdjax: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("compare --problem absent --json -", 2),
        ("compare --num-epochs x --json -", 2),
        ("compare --problem my_module:problem --batch-sizes 40 --num-epochs 1 --learning-rate 0.1 --json -", 0),
    ],
)
def test_a_standard_error_that_is_closed_or_full_changes_nothing_else(folder, given, status, stderr):
    call = f"{sys.executable} -m gdjax.commands {given} {stderr}"
    done = subprocess.run(call, shell=True, stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == status
    if status:
        assert done.stdout == ""
    else:
        assert len(json.loads(done.stdout)["rows"]) == 1


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end, command.ended():
            print("all" * 10_000)
        assert end.value.code == 0
        print("what Python flushes when it ends")
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_nobody_need_listen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    with command.ended():
        print("nothing is written")
    assert capsys.readouterr().err == ""


def test_x64_is_set_before_the_command_runs(request):
    before = jax.config.read("jax_enable_x64")
    request.addfinalizer(lambda: jax.config.update("jax_enable_x64", before))
    jax.config.update("jax_enable_x64", False)
    command.run(commands.COMMANDS["compare"](common=Common(x64=True)), lambda asked: None)
    assert jax.numpy.zeros(1).dtype == "float64"


def test_help_lists_every_option_with_its_text_and_the_exit_statuses(gdjax):
    def fields(kind):
        for field in dataclasses.fields(kind):
            yield from (
                fields(field.type)
                if dataclasses.is_dataclass(field.type)
                else [field.name.rstrip("_").replace("_", "-")]
            )

    for name, kind in commands.COMMANDS.items():
        status, printed, complained = gdjax(name, "--help")
        assert (status, complained) == (0, "")
        explained = [part for part in re.split(r"\n│? {0,3}(?:-q, )?--(?=\w)", printed)[1:] if len(part.split()) > 3]
        assert {part.split()[0] for part in explained} == {*fields(kind)}
        assert "{None}" not in printed
    assert arguments.STATUSES in gdjax("--help")[1]
    assert gdjax("--version")[1] == f"gdjax {sys.modules['gdjax'].__version__}\n"


def test_nothing_has_colours_even_on_a_terminal(gdjax, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[" not in "".join(map(str, gdjax("compare", "--help") + gdjax("advise")))


@pytest.mark.slow
def test_help_waits_for_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['compare', '--help']\ntry:\n import gdjax.commands; gdjax.commands.main()\n"
    code += "except SystemExit:\n print({'jax', 'numpy', 'matplotlib'} & {*sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "set()"
    assert "--batch-sizes" in done.stdout


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_leaves_nothing(folder, listening):
    process = subprocess.Popen(
        [sys.executable, "-m", "gdjax.commands", "compare", "--problem", "my_module:problem", "--num-epochs", "20000"],
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


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_from_the_rows_that_it_kept(tmp_path, monkeypatch, capsys):
    options = {"batch_sizes": (1, 32), "num_epochs": 1, "num_seeds": 1, "learning_rate": 0.01}
    small = Compare(problem="least-squares", **options)
    part, whole = (dataclasses.replace(small, common=Common(out=f"{tmp_path / name}")) for name in ("part", "whole"))
    run, kept, stops = compare.batch_sizes, [], [True, False, False]

    def stopped(*args, keep, **options):
        stop = stops.pop(0)

        def keep_it(row):
            keep(row)
            kept.append(row.batch_size)
            if stop:
                raise KeyboardInterrupt

        return run(*args, keep=keep_it, **options)

    monkeypatch.setattr(compare, "batch_sizes", stopped)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert "1 of 2 batch sizes are kept: --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds rows of another run: seed was '0' and is '1'"):
        dataclasses.replace(part, seed=1).run()
    part.run()
    assert "B = 1 is there already" in " ".join(capsys.readouterr().out.split())
    assert kept == [1, 32]
    whole.run()
    found, expected = (json.loads((tmp_path / name / "result.json").read_text())["rows"] for name in ("part", "whole"))
    assert [row["losses"] for row in found] == [row["losses"] for row in expected]
    assert not (tmp_path / "part" / "rows.jsonl").exists()


@pytest.mark.slow
def test_problems_lists_all_of_them_with_or_without_their_data(gdjax, monkeypatch, tmp_path):
    monkeypatch.setenv("GDJAX_DATA", str(tmp_path))
    status, printed, complained = gdjax("problems", "--json", "-")
    assert (status, complained) == (0, "")
    rows = {row.pop("problem"): row for row in json.loads(printed)["rows"]}
    assert list(rows) == list(problems.BUILT_IN)
    assert (rows["digits-mlp"]["examples"], rows["digits-mlp"]["parameters"]) == (1440, 64 * 128 + 128 + 1280 + 10)
    assert rows["mnist-mlp"]["examples"] is None
    printed = gdjax("problems")[1]
    assert max(map(len, printed.splitlines()[: 1 + len(rows)])) <= 80
    assert "mnist/train-images-idx3-ubyte[.gz] is missing" in printed
