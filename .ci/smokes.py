"""Run the smoke version of every experiment, two at a time: `python .ci/smokes.py FOLDER` writes what they find there.

Each runs in a fork of this process, which has imported jax and all else that takes seconds, and begun nothing.
"""

import os
import runpy
import sys
import time
import traceback
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import optax  # noqa: F401
import scipy.optimize  # noqa: F401

import gdjax

AT_ONCE = 2
folder = Path(sys.argv[1]).resolve()
names = sorted(path.stem for path in Path("experiments").glob("*.py") if not path.name.startswith("__"))
for package in gdjax.__all__:
    getattr(gdjax, package)
sys.path.insert(0, ".")


def start(name: str) -> int:
    """Return the process that runs an experiment, what it prints in FOLDER/NAME.log."""
    process = os.fork()
    if process:
        return process
    with open(folder / f"{name}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [name, "--smoke", "--out", str(folder / name)]
    status = 1
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


running, failed = {}, []
waiting = names[::-1]
while waiting or running:
    while waiting and len(running) < AT_ONCE:
        name = waiting.pop()
        running[start(name)] = name, time.perf_counter()
    process, status = os.wait()
    name, began = running.pop(process)
    said = (folder / f"{name}.log").read_text()
    print(f"{name}{' FAILED' if status else ''}, {time.perf_counter() - began:.0f} s: {said}", flush=True)
    failed += [name] * (status != 0)
sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
