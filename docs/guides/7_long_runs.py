# %% [markdown]
# # Long runs: checkpoints, resume, data larger than memory
#
# `training.run` is the loop for one run that takes hours or days. It compiles chunks of updates, shows progress, and
# saves. Ctrl-C, a kill and a lost terminal save too, and what is resumed has the bits of a run that was never
# interrupted, because the stream is a function of its position.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from gdjax import descent, problems, training
from gdjax.problem import Problem

problem = problems.digits_mlp()
options = {"key": jax.random.key(0), "batch_size": 32, "folder": "runs/digits"}
run = training.run(problem, optax.adam(1e-3), num_epochs=4, **options)
print(run.ended, run.state.num_examples, run.history["loss"].round(3))

# %% [markdown]
# Another process, a cron job or you in a second terminal, can ask how far it is:

# %%
progress = training.progress("runs/digits")
print(
    progress.num_updates,
    "of",
    progress.total,
    "saved at",
    progress.num_saved,
    progress.record,
)

# %% [markdown]
# ## Go on
#
# The same call with more epochs goes on from the last checkpoint. Here it is against a run of twelve epochs in one
# piece:

# %%
longer = training.run(problem, optax.adam(1e-3), num_epochs=12, **options)
whole = training.run(
    problem, optax.adam(1e-3), num_epochs=12, **{**options, "folder": None}
)
equal = jax.tree.map(np.array_equal, longer.state.params, whole.state.params)
print("the same, bit for bit:", all(jax.tree.leaves(equal)))

# %% [markdown]
# What the folder holds is checked first: another problem, optimiser, batch size or key is an error and not a
# surprise.

# %%
try:
    training.run(
        problem, optax.adam(1e-3), num_epochs=12, **{**options, "batch_size": 64}
    )
except ValueError as error:
    print(error)

# %% [markdown]
# ## End by a rule, and average the weights
#
# Rules are looked at inside the compiled loop. `ema=` keeps an average of the parameters beside them, its half-life
# in examples.


# %%
def test_loss(state, info):
    return problem.evaluate(state.params, on="test", names=("loss",))["loss"]


run = training.run(
    problem,
    optax.sgd(0.5),
    key=jax.random.key(1),
    batch_size=32,
    num_epochs=60,
    until={"no better for five epochs": descent.no_improvement(5, test_loss)},
    ema=10_000,
)
plt.figure(figsize=(5.5, 3.2), layout="constrained")
for label, history in (("last parameters", run.history), ("averaged", run.ema.history)):
    plt.plot(
        np.arange(1, len(history["loss"]) + 1),
        history["metrics"]["accuracy"],
        ".-",
        label=label,
    )
plt.xlabel("epoch")
plt.ylabel("test accuracy")
plt.legend(frameon=False)
plt.show()
print(run.ended, "after", len(run.history["loss"]), "epochs")

# %% [markdown]
# ## Data larger than memory
#
# Where `train` holds NumPy arrays, memory maps among them, the data stay where they are; each chunk's examples are
# read while the one before it trains. Streams of millions of examples are never stored: position $t$ is computed.

# %%
on_disk = np.lib.format.open_memmap(
    "images.npy", mode="w+", dtype=np.float32, shape=(50_000, 64)
)
on_disk[:] = np.random.default_rng(0).normal(size=on_disk.shape).astype(np.float32)
images = np.load("images.npy", mmap_mode="r")
labels = (np.asarray(images[:, :8]).sum(1) > 0).astype(np.int32)
large = Problem(
    init=lambda key: 0.01 * jax.random.normal(key, (64,)),
    loss=lambda w, example: optax.sigmoid_binary_cross_entropy(
        example[0] @ w, example[1].astype(np.float32)
    ),
    train=(images, labels),
    name="on disk",
)
options = {
    "record": descent.batch_loss,
    "every": 100,
}  # of the batch: all examples at once would not fit
run = training.run(
    large,
    optax.sgd(0.5),
    key=jax.random.key(0),
    batch_size=128,
    num_epochs=1,
    **options,
)
print(run.history.round(3))

# %% [markdown]
# ## What to try next
#
# - `mesh=` spreads each batch over devices, and over hosts: [runs](../runs.md).
# - `grain` for what is read and decoded on the way (extra `grain`).
# - `descent.loss_at_most`, `descent.diverged`: end what has arrived, or will not.
