import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gdjax.commands import _hosts as hosts

CHILD = """
import json, sys
from pathlib import Path
import jax
from gdjax.commands import _hosts as hosts
jax.config.update("jax_num_cpu_devices", 2)
out = Path(sys.argv[1])
with hosts.joined(hosts.Hosts(**json.loads(sys.argv[2]))) as aside:
    print(jax.process_count(), jax.device_count(), float(jax.jit(lambda x: 2 * x)(21.0)))
    ((aside or out) / "result").write_text(f"{jax.process_index()}")
print(aside is None, aside is not None and not aside.exists())
"""


@pytest.mark.slow
def test_processes_join_and_the_first_alone_prints_and_keeps_files(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path]
    given = [json.dumps({"coordinator": coordinator, "num_processes": 2, "process_id": i}) for i in range(2)]
    processes = [subprocess.Popen([*command, options], stdout=subprocess.PIPE, text=True) for options in given]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs == ["2 4 42.0\nTrue False\n", "False True\n"]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["0"]


def test_one_process_is_left_as_it_is(capsys):
    with hosts.joined(hosts.Hosts()) as aside:
        print("heard")
    assert aside is None
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "coordinator='a:1', num_processes=None, process_id=None: give all three"),
        ({"process_id": 0}, "coordinator=None, num_processes=None, process_id=0: give all three"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id must be from 0 to num_processes - 1"),
        ({"distributed": True}, "the processes could not be joined with coordinator=None.*: "),
    ],
)
def test_what_cannot_be_joined_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.joined(hosts.Hosts(**given)).__enter__()


SMALL = ["--problem", "least-squares", "--batch-sizes", "32", "--num-epochs", "2", "--learning-rate", "0.01"]


@pytest.mark.slow
@pytest.mark.parametrize("begin", ["srun ", "gdjax compare --coordinator"])
def test_the_cluster_lines_of_the_documentation_run_as_two_processes_of_this_machine(begin, tmp_path):
    """In place of `srun` they are told what SLURM tells: the number, the nodes, and who they are."""
    documentation = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    [line] = [line for line in documentation.splitlines() if line.startswith(begin)]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for i in range(2):
        arguments = re.sub(r"^srun (--\S+ \d+ )*|\s+#.*", "", line).replace("HOST0:1234", f"localhost:{port}")
        arguments = arguments.replace("--num-processes 4", "--num-processes 2").replace(
            "--process-id 0", f"--process-id {i}"
        )
        program, *words = arguments.split()
        assert program == "gdjax"
        slurm = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i, "LOCALID": 0}
        told = {f"SLURM_{name}": f"{value}" for name, value in slurm.items()} if begin == "srun " else {}
        command = [sys.executable, "-W", "ignore", "-c", "from gdjax.commands import main; main()", *words, *SMALL]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*command, "--out", tmp_path / f"{i}"], env=os.environ | told, **pipes))
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "0" / "result.json").exists()
    assert not (tmp_path / "1").exists()
    assert "mini-batch" in outputs[0][0]
    assert outputs[1][0] == ""
