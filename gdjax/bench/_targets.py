"""Devices that need not be there: what a compiler has to know of them, and what they do at best.

Each is a file of `targets/`, or one of your own in the same form:

    platform = "cuda"            # or "tpu"
    flops_per_second = 494.5e12  # the published peaks, see `Target`
    bytes_per_second = 3.35e12
    memory_bytes = 84929347584
    config = "..."               # cuda: XLA's GpuTargetConfigProto as text
    topologies = { 4 = "v5e:2x2" }  # tpu: {chips: their layout, as libtpu names it}

>>> find("v5e").platform, find("v5e").bytes_per_second
('tpu', 819000000000.0)
>>> find("v5")
Traceback (most recent call last):
ValueError: target='v5' is not one of h100, v5e, v5p, v6e, nor a file that describes a device (gdjax/bench/targets)
"""

import importlib.util
import os
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

FOLDER = Path(__file__).parent / "targets"
KNOWN = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
EXTRAS = {"cuda": "aot-cuda", "tpu": "aot-tpu"}
COMPILERS = {"cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",)}
# libtpu asks the machine what it is; one without a TPU does not know, nor can its metadata server be reached.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened that another process could want
}
USABLE = {"cuda": 0.75, "tpu": 1.0}
"""Of the memory, by default: https://docs.jax.dev/en/latest/gpu_memory_allocation.html. On a TPU what libtpu takes for
itself is not counted as memory of the device."""

Device = Any
"""What jax.Device is at run time; type checkers see a variable."""


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
        name: as it was asked for.
        platform: "cuda" or "tpu".
        flops_per_second: the published peak of a product of float32 matrices at jax's default precision.
        bytes_per_second: of its memory.
        memory_bytes: of one device.
        config: what XLA has to know of a GPU.
        topologies: {number of chips: layout} of a TPU.
    """

    name: str
    platform: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float
    config: str = ""
    topologies: dict[str, str] = {}  # noqa: RUF012

    @property
    def usable_bytes(self) -> float:
        """Return the memory that jax uses unless it is told otherwise."""
        return USABLE[self.platform] * self.memory_bytes


def find(spec: str) -> Target:
    """Return a device by its name, one of KNOWN, or the one that a file describes.

    Raises:
        ValueError: for an unknown name, and for a file that cannot be read or describes no device.
    """
    path = FOLDER / f"{spec}.toml" if spec in KNOWN else Path(spec)
    if not path.is_file():
        raise ValueError(
            f"target={spec!r} is not one of {', '.join(KNOWN)}, nor a file that describes a device "
            "(gdjax/bench/targets)"
        )
    try:
        found = Target(name=path.stem, **tomllib.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"target={spec!r} cannot be read as a device: {error}") from error
    if found.platform not in EXTRAS:
        raise ValueError(f"target={spec!r}: platform={found.platform!r} must be one of {', '.join(EXTRAS)}")
    for name in ("flops_per_second", "bytes_per_second", "memory_bytes"):
        value = getattr(found, name)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"target={spec!r}: {name}={value!r} must be a number above 0")
    needed, kind = ("config", str) if found.platform == "cuda" else ("topologies", dict)
    if not getattr(found, needed) or not isinstance(getattr(found, needed), kind):
        raise ValueError(f"target={spec!r}: a device of platform {found.platform!r} needs {needed}")
    return found


def devices(target: Target, num_devices: int = 1) -> list[Device]:
    """Return so many devices that programs can be compiled for, and that nothing can be run on.

    Raises:
        ModuleNotFoundError: where the compiler for them is not installed, and says how it is.
        ValueError: for a number of devices that there is no layout for, and where the compiler refuses the target.
    """
    if not any(_is_installed(name) for name in COMPILERS[target.platform]):
        raise ModuleNotFoundError(
            f"target={target.name!r} needs the compiler of its platform, on any Linux machine: "
            f"pip install 'gdjax[{EXTRAS[target.platform]}]'"
        )
    if num_devices < 1:
        raise ValueError(f"num_devices={num_devices} must be at least 1")
    if target.platform == "cuda":
        options = {"target_config": target.config, "topology": f"1x1x{num_devices}"}
    else:
        enough = [int(number) for number in target.topologies if int(number) >= num_devices]
        if not enough:
            raise ValueError(
                f"num_devices={num_devices} must be at most {max(map(int, target.topologies))} of {target.name}"
            )
        options = {"topology_name": target.topologies[str(min(enough))]}
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform=target.platform, **options).devices)[:num_devices]
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"target={target.name!r}: its compiler refused it or was not started; JAX_PLATFORMS=cpu must be set before "
            f"jax is used. It said: {str(error).splitlines()[0]}"
        ) from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
