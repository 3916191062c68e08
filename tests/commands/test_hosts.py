import json
import socket
import subprocess
import sys

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
