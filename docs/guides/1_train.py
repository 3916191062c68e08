# %% [markdown]
# # Train at any batch size
#
# A problem is the loss of **one example**. A stream is the order in which examples are visited, and a batch is a run
# of consecutive entries of it. Stochastic, mini-batch and batch gradient descent are then one function, cut at
# different places of one stream.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from gdjax import batching, descent, gradients, problems, tuning

problem = problems.digits_mlp()
print(problem.name, problem.num_examples)

# %% [markdown]
# ## The stream, and where it is cut
#
# A stream is a pure function of a key and a position. Epochs lie end to end, so that any batch size divides it.

# %%
stream = batching.reshuffled(jax.random.key(0), 4, num_epochs=3)
for batch_size in (1, 3, 4):
    print(batch_size, batching.batches(stream, batch_size).tolist())

# %% [markdown]
# ## One call
#
# `descent.train` draws parameters and a stream from a key, trains, and records the losses after every epoch. It is
# pure: `jit` it once, and `vmap` it over seeds or learning rates.

# %%
RATES = {1: 0.03, 32: 1.0, problem.num_examples: 3.0}


def losses(batch_size, key):
    _, history = descent.train(
        problem,
        optax.sgd(RATES[batch_size]),
        key=key,
        batch_size=batch_size,
        num_epochs=15,
    )
    return history


keys = jax.random.split(jax.random.key(1), 3)
curves = {
    size: jax.jit(jax.vmap(lambda key, size=size: losses(size, key)))(keys)
    for size in RATES
}

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for size, found in curves.items():
    examples = np.asarray(found["examples"])[0]
    for axis, x in zip(axes, (examples, examples / size), strict=True):
        axis.plot(x, found["loss"].mean(0), marker=".", label=f"B = {size}")
axes[0].set(
    xlabel="examples seen",
    ylabel="training loss, mean of three seeds",
    yscale="log",
    xscale="log",
)
axes[1].set(xlabel="updates", xscale="log")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# By the examples that they see, one and 32 fall together; by updates, the largest batch is first. Which of the two
# counts is a matter of your device, and of [how you choose](2_choose.md).
#
# ## The parts of it
#
# What `train` does takes four lines, and each can be replaced: the estimator of the gradient, the optimiser, the
# stream, and the loop. Here the gradient is added up in microbatches, for a batch that does not fit into memory; the
# update is the same.

# %%
gradient = gradients.microbatched(problem.loss, microbatch_size=16)
method = descent.method(
    gradient, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
)
batches = batching.batches(
    batching.reshuffled(jax.random.key(2), problem.num_examples, num_epochs=4), 64
)
state = method.init(problem.init(jax.random.key(3)))
state, batch_losses = jax.jit(
    lambda state: descent.run(method, state, problem.train, batches)
)(state)
print(batch_losses.shape, f"{batch_losses[0]:.3f} -> {batch_losses[-1]:.3f}")
print(
    {
        name: f"{value:.3f}"
        for name, value in problem.evaluate(state.params, on="test").items()
    }
)

# %% [markdown]
# ## At which learning rate?
#
# No comparison of batch sizes is fair at one rate. `tuning.tune` runs rates and seeds together, and its grid grows
# until the best rate lies inside.

# %%
for batch_size in (8, 128):
    tuned = tuning.tune(
        problem, batch_size=batch_size, num_epochs=4, key=jax.random.key(0), num_seeds=2
    )
    print(
        f"B = {batch_size}: best rate {tuned.rate:.3f}, at the edge of the grid: {tuned.at_edge}"
    )

# %% [markdown]
# ## What to try next
#
# - `gdjax compare` does all of this, with a table and a verdict on what textbooks say: [commands](../commands.md).
# - [Choose a batch size](2_choose.md) by measuring.
# - A [model of your own](../models.md) from Flax, Equinox or plain JAX.
