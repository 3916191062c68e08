"""A run folder with provenance. Files appear whole or not at all: written beside, then renamed.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as place, run_folder(place + "/run") as folder:
...     print(folder.name, folder.is_dir())
run True
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gdjax import _files
from gdjax.report._commit import commit


@contextlib.contextmanager
def run_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Create a folder, with its parents, make sure that files can be written into it, and keep other runs out of it.

    Where the block fails before it has written anything, the folders made here are removed again.

    Raises:
        ValueError: where the folder cannot be created or written, with the reason, or another run is writing into it.
        ModuleNotFoundError: without filelock.
    """
    missing: list[Path] = []
    try:
        with _files.named_in_errors("out", path):
            folder = Path(path).expanduser()
            missing += [ancestor for ancestor in (folder, *folder.parents) if not ancestor.exists()]
        folder = _files.writable_folder(path, "out")
        with _files.alone(folder, "out"):
            yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: keep what was written
            for ancestor in missing:
                ancestor.rmdir()
        raise


def timestamped(command: str) -> Path:
    """Return the default run folder of a command, 'runs/COMMAND-DATE-TIME-PROCESS', in UTC."""
    return Path("runs") / f"{command}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def provenance(*, arguments: dict[str, Any], seed: int, wall_seconds: float) -> dict[str, Any]:
    """Return what is needed to repeat a result: versions, device, seed, commits, arguments, time (seconds)."""
    device = jax.devices()[0]
    return {
        "versions": {
            "gdjax": importlib.metadata.version("gdjax"),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
        },
        "x64": bool(jax.config.read("jax_enable_x64")),
        "seed": seed,
        "commit": commit(Path.cwd()),
        "gdjax_commit": commit(Path(__file__).parent, tracks=Path(__file__).name),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": arguments,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wall_seconds": wall_seconds,
    }
