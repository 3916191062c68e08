# %% [markdown]
# # The noise scale in your own training loop
#
# You have a loop, and do not want another one. `noise.watch` is an optax transformation: it stands in front of your
# optimiser, changes no update, and keeps the running noise scale in the optimiser's state, where checkpoints find it.
# Your step passes what it has anyway: gradients of microbatches, norms of single examples, or the gradients of
# devices. If it has nothing, `noise.probe` measures a few examples now and then.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 4)  # for the last part: before anything else

import equinox as eqx
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from gdjax import ghost, gradients, noise

BATCH_SIZE = 32

# %% [markdown]
# ## Microbatches: a Flax NNX transformer with AdamW
#
# Gradients are accumulated over four microbatches. Each of them is a noisier estimate of the same gradient, and how
# much noisier is the noise scale. The step keeps one number of each: its squared norm.

# %%


class Transformer(nnx.Module):
    def __init__(self, vocabulary, width, rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.layers = nnx.List(
            [
                nnx.Linear(width, 2 * width, rngs=rngs),
                nnx.Linear(2 * width, width, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        return self.head(x + self.layers[1](nnx.gelu(self.layers[0](self.norms[1](x)))))


graph, params = nnx.split(Transformer(7, 16, nnx.Rngs(0)), nnx.Param)


def loss(params, tokens):
    logits = nnx.merge(graph, params)(tokens[None, :-1])[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


optimizer = optax.chain(noise.watch(half_life=500), optax.adamw(1e-4))  # in examples


@jax.jit
def step(params, state, batch):
    def microbatch(total, part):
        grads = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, part).mean())(
            params
        )
        return jax.tree.map(jnp.add, total, grads), optax.tree.norm(grads, squared=True)

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, sq_norms = jax.lax.scan(
        microbatch, zeros, batch.reshape(4, -1, batch.shape[1])
    )
    grads = jax.tree.map(lambda leaf: leaf / 4, total)
    known = noise.parts(
        sq_norms=sq_norms, batch_size=BATCH_SIZE
    )  # four norms, of eight examples each
    updates, state = optimizer.update(grads, state, params, noise=known)
    return optax.apply_updates(params, updates), state


def texts(key, num_examples):
    """Sequences in which every token is the one before it plus one or two, of seven."""
    return jnp.cumsum(jax.random.randint(key, (num_examples, 9), 1, 3), 1) % 7


state = optimizer.init(params)
for i in range(200):
    params, state = step(
        params, state, texts(jax.random.fold_in(jax.random.key(1), i), BATCH_SIZE)
    )
    if i % 50 == 49:
        print(noise.reading(state))

# %% [markdown]
# 'lagging' says that the number moves faster than its half-life lets it be followed: it is where the noise scale *was*,
# a few hundred examples ago. A shorter half-life follows faster and knows less. `noise.measure`, on examples drawn for
# it at the last parameters, finds where it is now:

# %%
data = texts(jax.random.key(2), 512)
print(
    noise.measure(loss, params, data, jax.random.key(3), num_examples=512, replace=True)
)

# %% [markdown]
# ## Single examples: an Equinox model
#
# Norms of single examples are the best that a step can pass: the interval is narrower for the same examples. `ghost`
# finds them in the one backward pass that your gradient needs ([how](3_per_example.md)).

# %%
arrays, static = eqx.partition(
    eqx.nn.MLP(3, 1, width_size=8, depth=1, key=jax.random.key(0)), eqx.is_inexact_array
)


def squared_error(arrays, example):
    x, y = example
    return (eqx.combine(arrays, static)(x)[0] - y) ** 2


watched = optax.chain(noise.watch(half_life=2000), optax.adam(1e-4))


@eqx.filter_jit
def equinox_step(arrays, state, batch):
    _, grads, sq_norms = ghost.sq_norms(squared_error)(arrays, batch)
    known = noise.parts(sq_norms=sq_norms, batch_size=BATCH_SIZE)
    updates, state = watched.update(grads, state, arrays, noise=known)
    return eqx.apply_updates(arrays, updates), state


x = jax.random.normal(jax.random.key(1), (200, BATCH_SIZE, 3))
y = x.sum(2) + jax.random.normal(jax.random.key(2), x.shape[:2])
adam_state = watched.init(arrays)
for batch in zip(x, y, strict=True):
    arrays, adam_state = equinox_step(arrays, adam_state, batch)
print(noise.reading(adam_state))

# %% [markdown]
# Adam measures gradients in a geometry of its own. From its state `measure` takes the preconditioner:

# %%
everything = x.reshape(-1, 3), y.reshape(-1)
for geometry in ("euclidean", adam_state):
    key = jax.random.key(3)
    print(
        noise.measure(
            squared_error, arrays, everything, key, num_examples=3200, geometry=geometry
        )
    )

# %% [markdown]
# ## Nothing at hand: probe
#
# `noise.probe` computes norms of the first `sample_size` examples of every `every`-th batch: here 8 of 32, once in 10
# updates, 2.5 % more gradients.

# %%
probing = optax.chain(
    noise.probe(squared_error, every=10, sample_size=8, half_life=4000),
    optax.adam(1e-4),
)


@eqx.filter_jit
def probed_step(arrays, state, batch):
    grads = gradients.mean(squared_error)(arrays, batch).grad
    updates, state = probing.update(grads, state, arrays, batch=batch)
    return eqx.apply_updates(arrays, updates), state


probe_state = probing.init(arrays)
for batch in zip(x, y, strict=True):
    arrays, probe_state = probed_step(arrays, probe_state, batch)
print(noise.reading(probe_state))

# %% [markdown]
# ## Devices: a data-parallel step on two and on four
#
# In `shard_map` each device has the gradient of its share of the batch: those are parts too. With `axis_name=`,
# `watch` takes them as they are, and averages the updates in the one all-reduce that the step needs anyway.


# %%
def linear_loss(weights, example):
    x, y = example
    return (x @ weights["w"] + weights["b"] - y) ** 2


def data_parallel(num_devices):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    over_devices = optax.chain(
        noise.watch(half_life=2000, axis_name="data", batch_size=BATCH_SIZE),
        optax.adam(1e-3),
    )

    def step(weights, state, batch):
        varying = jax.lax.pcast(
            weights, "data", to="varying"
        )  # else the gradient comes out summed over devices
        grads = gradients.mean(linear_loss)(varying, batch).grad
        updates, state = over_devices.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    one, split = PartitionSpec(), PartitionSpec("data")
    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(one, one, split), out_specs=(one, one))
    )
    weights = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    state = over_devices.init(weights)
    for batch in zip(x, y, strict=True):
        weights, state = step(weights, state, batch)
    return noise.reading(state)


for num_devices in (2, 4):
    print(f"{num_devices} devices: {data_parallel(num_devices)}")

# %% [markdown]
# More devices, narrower intervals: more parts are compared.
#
# ## What is refused
#
# One gradient of the whole batch shows no noise, and gradients that were averaged over devices are one gradient:

# %%
for norms in (jnp.asarray([2.0]), jnp.ones(5)):
    try:
        noise.parts(sq_norms=norms, batch_size=BATCH_SIZE)
    except ValueError as error:
        print(error)

# %% [markdown]
# Clipped, scaled or summed gradients that pass for raw are found by their lengths where that is possible, and the
# verdict is then 'not raw'.
#
# ## What to try next
#
# - [Seven published ways to compute a noise scale](../noise_scale.md), and what each returns where it is known.
# - Log `noise.reading(state)` next to your loss; read [how to choose](2_choose.md) before you act on it.
# - `optax.MultiSteps(optax.chain(noise.watch(...), ...), k)` works; see `noise.parts(part_size=)`.
