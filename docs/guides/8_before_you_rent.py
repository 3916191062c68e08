# %% [markdown]
# # Before you rent a GPU: compile for it here
#
# XLA compiles for a device that need not be there. What it makes of your training step says a good deal before the first
# hour is paid for: whether it fits, up to which batch size, how many kernels an update starts, whether a loop stays on
# the device, and the least time that the published peaks allow. It does not say how long it takes: nothing is run.
#
# `pip install 'gdjax[aot-tpu]'` brings the compiler of TPUs, `'gdjax[aot-cuda]'` that of NVIDIA's GPUs. Neither needs
# such a device. On this page: a TPU v5e.

# %%
import jax

jax.config.update("jax_platforms", "cpu")  # look for no device that is not there

import matplotlib.pyplot as plt

from gdjax import bench, problems

problem = problems.digits_mlp()

# %% [markdown]
# ## The table
#
# The ways in which `gdjax bench` runs the same updates, compiled in place of timed.

# %%
sizes = (32, 256, 1440)
rows, largest = bench.compile_for(
    "v5e", {"digits": problem}, ("python-loop", "scan", "microbatched"), sizes
)
print(
    f"{'way':<14}{'B':>6}{'kernels':>9}{'temporary MB':>14}{'fits':>6}{'least us':>10}"
)
for row in rows:
    if "skipped" in row:
        print(f"{row['variant']:<14}{row['batch_size']:>6}  {row['skipped']}")
        continue
    size, us = row["temporary_bytes"] / 1e6, 1e6 * row["least_seconds"]
    print(
        f"{row['variant']:<14}{row['batch_size']:>6}{row['kernels']:>9.0f}{size:>14.2f}{row['fits']!s:>6}{us:>10.2f}"
    )

# %% [markdown]
# **Kernels.** Each takes time to start, whatever it does: a few microseconds on a GPU, less on a TPU. Where all of them
# together take more than the arithmetic at its least, the device waits for itself, and a larger batch is nearly free.

# %%
scan = [row for row in rows if row["variant"] == "scan" and "kernels" in row]
plt.figure(figsize=(5, 3.2), layout="constrained")
plt.loglog(
    [row["batch_size"] for row in scan],
    [1e6 * row["least_seconds"] for row in scan],
    "o-",
    label="least time by peaks",
)
plt.loglog(
    [row["batch_size"] for row in scan],
    [row["kernels"] for row in scan],
    "s--",
    label="if each kernel took 1 us",
)
plt.xlabel("batch size")
plt.ylabel("microseconds per update")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The largest batch that fits

# %%
for row in largest:
    print(f"{row['model']}: B = {row['batch_size']}, limited by the {row['limit']}")

# %% [markdown]
# A batch of all examples of a small data set fits; with a model of your own, `bench.compile_for("v5e", {"mine":
# problem})` finds the largest by bisection. Beyond it `microbatched` adds gradients up in pieces: the update is the same.
#
# ## From the command line
#
# ```sh
# gdjax bench --target v5e --problem my_module:problem --batch-sizes 32 256 2048
# gdjax bench --target h100 --problem my_module:problem
# gdjax bench --target v5e --devices 4 --variants sharded
# ```
#
# The last one compiles a data-parallel step for four of them, and counts the collectives of an update: one is enough.
#
# ## What it cannot tell
#
# - **Seconds.** `least us` is a bound from published peaks, and real programs of this size take several times as long.
# - **The noise of your gradient.** Which batch size is *worth* its time is a question for [advise](2_choose.md).
# - **Other versions.** A newer compiler makes another program. The table says which jax compiled it.
#
# ## What to try next
#
# - `gdjax bench` on the device, once it is there: the same table with times beside it.
# - [Per-example gradients](3_per_example.md), which need no more memory than a plain gradient if every leaf has a rule.
