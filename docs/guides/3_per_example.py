# %% [markdown]
# # Per-example gradients of your model
#
# Noise scales, clipping for privacy, importance sampling and influence all need the gradient of every example, or at
# least its norm. `jax.vmap(jax.grad(loss))` gives it, and holds B gradients in memory. `ghost` gives the norms from
# *one* backward pass: it walks through the program of your loss and finds, for every weight, the two factors whose
# outer product its gradient is.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdjax import ghost

x = jax.random.normal(jax.random.key(0), (32, 64))
y = jnp.arange(32) % 10


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits) @ jax.nn.one_hot(label, 10)


# %% [markdown]
# ## Plain JAX

# %%
params = {
    "hidden": 0.1 * jax.random.normal(jax.random.key(1), (64, 128)),
    "bias": jnp.zeros(128),
    "out": 0.1 * jax.random.normal(jax.random.key(2), (128, 10)),
}


def plain(params, example):
    x, y = example
    return cross_entropy(
        jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"], y
    )


found = jax.jit(ghost.sq_norms(plain))(params, (x, y))
print(
    found.losses.shape,
    {name: norms.shape for name, norms in found.sq_norms.items()},
    found.total[:3],
)

# %% [markdown]
# The same as by `vmap(grad)`:

# %%
grads = jax.vmap(jax.grad(plain), (None, 0))(params, (x, y))
by_vmap = sum(jnp.sum(leaf.reshape(32, -1) ** 2, 1) for leaf in jax.tree.leaves(grads))
print(
    "largest relative difference:", float(jnp.max(jnp.abs(found.total / by_vmap - 1)))
)

# %% [markdown]
# ## Coverage: what is fast, what is slow, and why
#
# `ghost.coverage` says how each parameter is measured and what that takes. `dot_general` needs two small factors;
# `add` (a bias) is as large as the layer's output; `materialised` means that no rule fits, and the gradient of that
# parameter alone is formed for every example.

# %%
print(ghost.coverage(plain, params, (x[0], y[0])))

# %% [markdown]
# A weight that is used in a way that no rule knows is still exact, and costs more. Here a weight is squared before
# use:

# %%
odd = {"w": params["hidden"], "out": params["out"]}
print(
    ghost.coverage(
        lambda p, e: cross_entropy(jnp.tanh(e[0] @ jnp.sin(p["w"])) @ p["out"], e[1]),
        odd,
        (x[0], y[0]),
    )
)

# %% [markdown]
# ## Flax NNX
#
# Split the model once; its loss is then a function of parameters. Attention, embeddings, normalisation and
# convolutions go through.

# %%


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.inner = (
            nnx.LayerNorm(64, rngs=rngs),
            nnx.Linear(64, 64, rngs=rngs),
        )
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(x + nnx.gelu(self.inner(self.norm(x))))


graph, state = nnx.split(Block(nnx.Rngs(0)), nnx.Param)


def of_flax(state, example):
    return cross_entropy(nnx.merge(graph, state)(example[0]), example[1])


print(ghost.coverage(of_flax, state, (x[0], y[0])))
print(jax.jit(ghost.sq_norms(of_flax))(state, (x, y)).total[:3])

# %% [markdown]
# ## Equinox

# %%
arrays, static = eqx.partition(
    eqx.nn.MLP(64, 10, 128, depth=2, key=jax.random.key(3)), eqx.is_inexact_array
)


def of_equinox(arrays, example):
    return cross_entropy(eqx.combine(arrays, static)(example[0]), example[1])


print(jax.jit(ghost.sq_norms(of_equinox))(arrays, (x, y)).total[:3])

# %% [markdown]
# ## More than norms
#
# `ghost.gram` returns all inner products between the gradients of a batch, `ghost.second_moments` the sum of their
# squares, weight by weight: neither holds the gradients.

# %%
gram = jax.jit(ghost.gram(plain))(params, (x, y))
matrix = np.asarray(sum(jax.tree.leaves(gram[-1])))
cosines = matrix / np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
same = np.equal.outer(np.asarray(y), np.asarray(y)) & ~np.eye(32, dtype=bool)
print(
    f"cosine between gradients of examples: same label {cosines[same].mean():.2f}, others {cosines[~same].mean():.2f}"
)

# %% [markdown]
# ## What it costs
#
# Measured on two CPU cores in [`per_example_cost`](../experiments/README.md#per_example_cost): 0.71 to 1.95 times a
# plain gradient, where `vmap(grad)` takes from as much (transformers) to 180 times as long (look-ups). Your own:
# `python -m experiments.per_example_cost`.
#
# ## What to try next
#
# - [The noise scale in your own loop](4_noise.md) from these norms.
# - `gradients.clipped` for [privacy](9_privacy.md).
# - `ghost.add_rule` for an operation of your own; `ghost.nonlinear` finds what is missing.
