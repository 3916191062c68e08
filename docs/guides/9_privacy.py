# %% [markdown]
# # Privacy
#
# Differentially private gradient descent (DP-SGD, Abadi et al. 2016) bounds what any one example can do to an update:
# its gradient is clipped to a norm, and noise is added to the sum. What is promised for $T$ updates is a pair
# $(\epsilon, \delta)$; batch size, noise and epochs enter it together, so that privacy is a question of batch size
# too.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from gdjax import batching, descent, gradients, privacy, problems

problem = problems.digits_mlp()
N = problem.num_examples

# %% [markdown]
# ## What noise promises
#
# Ten epochs of the 1440 digits, $\delta = 10^{-4}$: noise of deviation $\sigma$ times the clipping norm, on sums.

# %%
sizes = (16, 64, 256)
sigmas = np.asarray([0.7, 1.0, 2.0, 4.0])
promised = {
    size: [
        privacy.epsilon(
            noise_multiplier=sigma,
            num_examples=N,
            batch_size=size,
            num_updates=10 * N // size,
            delta=1e-4,
        )
        for sigma in sigmas
    ]
    for size in sizes
}
plt.figure(figsize=(5, 3.2), layout="constrained")
for size, epsilons in promised.items():
    plt.loglog(sigmas, epsilons, "o-", label=f"B = {size}")
plt.xlabel("noise multiplier")
plt.ylabel("epsilon")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# And the other way: the noise that a promise needs.

# %%
for size in sizes:
    sigma = privacy.noise_multiplier(
        epsilon=4.0,
        num_examples=N,
        batch_size=size,
        num_updates=10 * N // size,
        delta=1e-4,
    )
    print(
        f"B = {size:>3}: sigma = {sigma:.2f}; on the mean gradient {sigma / size:.4f}"
    )

# %% [markdown]
# A larger batch needs more noise on the sum, and much less on the mean.
#
# ## Train
#
# The promise asks for two things that are easily forgotten. Batches must be **Poisson samples**: every example is in
# a batch with probability $B/N$, on its own. And sums are divided by the **expected** batch size. `batching.poisson`
# pads batches to one shape and says which entries are examples; those are the weights of `gradients.clipped`, which
# takes norms from `ghost` and never holds the gradients.

# %%


def loss(params, keyed):
    (example, _), _ = keyed
    return problem.loss(params, example)


def is_example(keyed):
    (_, real), _ = keyed
    return real


def train(size, sigma, key, rate):
    gradient = gradients.clipped(
        loss,
        1.0,
        weight=is_example,
        expected_batch_size=size,
        noise_multiplier=sigma,
        noise_key=lambda batch: batch[1][0],
    )
    init_key, noise_key, batch_key = jax.random.split(key, 3)
    method = descent.with_keys(descent.method(gradient, optax.sgd(rate)), noise_key)
    updates = 10 * N // size
    batches = batching.poisson(batch_key, N, batch_size=size, num_updates=updates)
    state = method.init(problem.init(init_key))
    state, _ = descent.run(
        method, state, problem.train, batches, every=updates, fetch=batching.take_padded
    )
    return problem.evaluate(state.params, on="test", names=("accuracy",))["accuracy"]


for size, rate in ((64, 0.5), (256, 1.0)):
    sigma = privacy.noise_multiplier(
        epsilon=4.0,
        num_examples=N,
        batch_size=size,
        num_updates=10 * N // size,
        delta=1e-4,
    )
    over_seeds = jax.jit(
        jax.vmap(
            lambda key, size=size, sigma=sigma, rate=rate: train(size, sigma, key, rate)
        )
    )
    accuracies = over_seeds(jax.random.split(jax.random.key(0), 2))
    print(f"B = {size:>3}, epsilon 4: test accuracy {accuracies.mean():.3f}")

# %% [markdown]
# Both rates were taken without tuning; [`private`](../experiments/README.md#private) tunes them, and asks at which
# batch size an epsilon costs least.
#
# ## What is not counted
#
# Tuning a rate on the same data, publishing losses or metrics of it, and a generator of random numbers that an
# adversary can predict. gdjax has no audit; [jax_privacy](https://github.com/google-deepmind/jax_privacy) has.
#
# ## What to try next
#
# - `gradients.next_max_norm`: a clipping norm that adapts.
# - Groups of leaves with norms of their own: `gradients.clipped(groups=)`.
# - `python -m experiments.private`.
