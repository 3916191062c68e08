"""Several processes, one for each host: joined before anything else of JAX; the first alone prints and keeps files.

>>> with joined(Hosts()) as aside:  # one process, of which nothing is asked
...     print(aside)
None
>>> with joined(Hosts(coordinator="10.0.0.1:1234", num_processes=2)):
...     pass
Traceback (most recent call last):
ValueError: coordinator='10.0.0.1:1234', num_processes=2, process_id=None: give all three, or only distributed=True \
where the cluster tells them

All processes run the same program with the same arguments. `training.run` over a mesh of `jax.devices()` shares each
batch among all of them, and `sweep.map` with a store in a folder that all of them see shares its chunks. All else, the
command line included, each process computes by itself, the same everywhere, on its own devices (`jax.local_devices()`),
unless it is given a part by `jax.process_index()`.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other."""

    distributed: bool = False
    """Run as one of several processes. SLURM, Kubernetes, Open MPI or a TPU pod tells how many there are and where."""
    coordinator: str | None = None
    """Where no cluster tells: address:port of process 0, the same for every process."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which of them this is, from 0."""


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[Path | None]:
    """Join the other processes, where that is asked for, by `jax.distributed`; wait until all are there.

    Yields None in the first process, and in the others a temporary folder, for files that nobody wants twice. Their
    standard output is silenced; their errors are not.

    Raises:
        ValueError: for arguments that are incomplete or out of range, where no cluster tells what is missing, and where
            JAX was used before.
    """
    if not _join(hosts):
        yield None
        return
    import jax

    if jax.process_index() == 0:
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(folder)


def _join(hosts: Hosts) -> bool:
    explicit = (hosts.coordinator, hosts.num_processes, hosts.process_id)
    given = [value is not None for value in explicit]
    shown = f"coordinator={hosts.coordinator!r}, num_processes={hosts.num_processes}, process_id={hosts.process_id}"
    if any(given) and not all(given):
        raise ValueError(f"{shown}: give all three, or only distributed=True where the cluster tells them")
    if not (hosts.distributed or any(given)):
        return False
    if hosts.num_processes is not None and not 0 <= (hosts.process_id or 0) < hosts.num_processes:
        raise ValueError(f"{shown}: process_id must be from 0 to num_processes - 1")
    import jax  # not before the command line is parsed

    try:
        jax.distributed.initialize(*explicit)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes could not be joined with {shown}: {error}") from error
    return True
