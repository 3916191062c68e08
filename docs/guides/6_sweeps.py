# %% [markdown]
# # Sweeps: from a laptop to a cluster
#
# A sweep is a function of one grid point. `sweep.map` runs it at all of them, as lanes of one compiled program, in
# chunks that fit into memory, on all devices of the machine; results have the grid's shape.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems, sweep

problem = problems.least_squares()


def final_loss(point):
    """Return the training loss after four epochs at one batch size, rate and seed."""
    method = descent.method(gradients.mean(problem.loss), optax.sgd(point["rate"]))
    stream = batching.reshuffled(point["key"], problem.num_examples, num_epochs=4)
    batches = batching.batches(stream, point["batch_size"])
    state, _ = descent.run(
        method, method.init(problem.init(point["key"])), problem.train, batches
    )
    return jax.vmap(problem.loss, (None, 0))(state.params, problem.train).mean()


rates = np.geomspace(0.01, 2.0, 12)
sizes = [8, 64, 512]
grid = sweep.grid(
    {"batch_size": sizes}, rate=rates, key=jax.random.split(jax.random.key(0), 5)
)
losses = sweep.map(final_loss, grid)
print(losses.shape)

# %% [markdown]
# A batch size changes shapes: it is an axis of programs, the first argument of `grid`, and each is compiled. Rates and
# seeds are lanes of a program. An optimiser or a model is an axis of programs too, as `{"optimizer": {"sgd": optax.sgd,
# "adam": optax.adam}}`. A run that diverges is NaN or huge, and leaves the others as they are. `grid.best` finds the
# best that is finite, and `grid.table` makes rows for CSV or pandas.

# %%
best = sweep.grid({"batch_size": sizes}, rate=rates).best(np.median(losses, 2))
print(
    "the best by the median of seeds:", sizes[best[0]], round(float(rates[best[1]]), 2)
)
print(grid.table(losses)[0])

# %%
plt.figure(figsize=(5.5, 3.4), layout="constrained")
for size, of_size in zip(sizes, losses, strict=True):
    plt.plot(rates, np.median(of_size, 1), "o-", label=f"B = {size}")
plt.xscale("log")
plt.yscale("log")
plt.ylim(top=10 * float(losses[:, 0].max()))
plt.xlabel("learning rate")
plt.ylabel("loss after 4 epochs, median of 5 seeds")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A store: crash, and go on
#
# With `store=` every finished chunk is a file. The same call after a crash, or Ctrl-C, computes what is missing; with
# other code or another grid it is refused, by a fingerprint of the program; a longer axis of programs computes the new.

# %%
first = sweep.map(final_loss, grid, store="runs/rates", chunk_size=20)
again = sweep.map(final_loss, grid, store="runs/rates")  # reads nine chunks
print("the same, bit for bit:", bool(np.array_equal(first, again, equal_nan=True)))
other = sweep.grid(**grid.axes | {"rate": 2 * grid.axes["rate"]})
try:
    sweep.map(final_loss, other, store="runs/rates")
except ValueError as error:
    print(error)

# %% [markdown]
# ## More cores, more machines
#
# - **Cores of a CPU.** One device uses one core for small batches. `jax.config.update("jax_num_cpu_devices", 8)`
#   before anything else makes eight of them, and `sweep.map` spreads its points over all devices.
# - **GPUs and TPUs of one machine** are used without a word.
# - **Machines**, under SLURM, Kubernetes or a TPU pod, with `jax.distributed` or without, and the tasks of an array job:
#   let all of them make the same call, with one store on a folder that they share. Each computes the chunks that no
#   other has taken, and returns the whole. Jobs that are killed at the end of their time are submitted again as they
#   are.
#
# ## What to try next
#
# - `tuning.tune`, which chooses its rates itself. [Long runs](7_long_runs.md).
# - `python -m experiments.best_learning_rate`: a sweep with a prediction.
