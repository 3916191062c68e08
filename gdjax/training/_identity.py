"""What makes a run this run and no other: compared when a folder is opened again."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gdjax import _files
from gdjax.training import _checkpoint, _feeding

NUM_SAMPLED = 1024  # examples that a data set is recognised by


def of(program: Any, task: Any, plan: _feeding.Plan, stream, until: Mapping, ema, sharded) -> _checkpoint.Identity:
    """Return {name: value}. `program` is the closed jaxpr of an update, its record and the rules.

    A sharded state is drawn by other programs on other devices, and known to rounding.
    """
    if sharded is None:
        begin = {"first state": _checkpoint.checksum(_feeding.to_names("", task.state))}
    else:
        begin = {"sharded": getattr(sharded, "__name__", str(sharded))}
    text = re.sub("0x[0-9a-f]+", "", str(program.jaxpr)).encode()  # functions print their address
    constants = _feeding.to_names("", list(program.consts))
    shapes = {
        name + jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for name, tree in (("state", task.state), ("data", task.data))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return shapes | {
        "key": f"{jax.random.key_impl(task.key)} {jax.random.key_data(task.key)}",
        "batch_size": plan.phases.identity,
        "every": plan.every,
        "until": ", ".join(until) or "empty",
        "ema": str(ema),
        "stream": getattr(stream, "__name__", repr(stream)),
        "jax": jax.__version__,
        "program of method, record and until": f"{_files.digest(text)[:16]} {_checkpoint.checksum(constants)}",
        **begin,
        "sample of data": _checkpoint.checksum(
            _feeding.to_names("", jax.tree.map(_sampled, (task.data, task.examples)))
        ),
    }


def _sampled(x):
    return x[np.linspace(0, len(x) - 1, min(len(x), NUM_SAMPLED)).astype(int)]
