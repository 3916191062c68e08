# %% [markdown]
# # How to choose a batch size
#
# There are four ways to find out, from the cheapest to the surest. Which one you need depends on what you know and on
# what a run costs.
#
# | you have | do | what you get |
# |---|---|---|
# | a run under way, in any loop | **watch**: `noise.watch` | up to where larger batches save updates, now |
# | parameters and data | **measure**: `noise.measure` | the same at one point, with an interval |
# | a model that trains in minutes | **advise**: `gdjax advise` | what reaches a target first here, verified |
# | time for all runs | **compare**: `gdjax compare` | what every batch size does |
#
# In words: *If a run of yours takes minutes, ask `advise` and believe what it verified. If it takes days, watch the
# noise scale in it, and take a batch size of about a tenth of it to once of it, the largest that your device does not
# slow down for. Where the verdict is not 'ok', the number is not to be trusted, whatever it is.*

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from gdjax import advise, descent, noise, problems, theory

problem = problems.digits_mlp()

# %% [markdown]
# ## Measure
#
# The gradient of a batch of $B$ examples is the true gradient $G$ plus noise of variance $\mathrm{tr}(S)/B$. The two
# are equal at
#
# $$ B_\mathrm{simple} = \frac{\mathrm{tr}\, S}{|G|^2}, $$
#
# the gradient noise scale (McCandlish et al. 2018). Far below it, twice the batch allows nearly twice the step:
# examples are not wasted. Far above it, twice the batch is twice the work for the same step.

# %%
params = problem.init(jax.random.key(0))
print(
    noise.measure(
        problem.loss, params, problem.train, jax.random.key(1), num_examples=512
    )
)
print(
    noise.measure(
        problem.loss, params, problem.train, jax.random.key(1), num_examples=32
    )
)

# %% [markdown]
# The interval and the verdict are the point: of 32 examples the number looks much the same, and is not worth as much.
#
# **It moves.** Along a run $|G|$ falls and the noise does not, so that the noise scale grows by one or two orders of
# magnitude. A number from the start of a run says little about its end.

# %%
state, history = descent.train(
    problem,
    optax.sgd(0.5),
    key=jax.random.key(2),
    batch_size=32,
    num_epochs=6,
    every=30,
    record=lambda state, info: state.params,
)
points = [jax.tree.map(lambda leaf, i=i: leaf[i], history) for i in range(0, 9, 2)]
scales = [
    noise.measure(problem.loss, at, problem.train, jax.random.key(3), num_examples=1440)
    for at in points
]
x = [30 * (i + 1) for i in range(0, 9, 2)]
plt.figure(figsize=(5, 3.2), layout="constrained")
plt.plot(x, [scale.b_simple for scale in scales], "o-")
plt.yscale("log")
plt.xlabel("updates of 32 examples")
plt.ylabel("noise scale (examples)")
plt.show()

# %% [markdown]
# ## From a noise scale to a batch size
#
# If a step of full length is what a full batch allows, a batch of $B$ examples makes $1/(1 + B_\mathrm{noise}/B)$ of
# its progress: $S(B) = S_\mathrm{min}(1 + B_\mathrm{crit}/B)$ updates reach a target,
# $E(B) = E_\mathrm{min}(1 + B/B_\mathrm{crit})$ examples. One number then prices all batch sizes.

# %%
critical = 300.0
for batch_size in (10, 30, 100, 300, 1000, 3000):
    updates = theory.updates_to_target(batch_size, critical, min_updates=1.0)
    examples = theory.examples_to_target(batch_size, critical, min_examples=1.0)
    print(
        f"B = {batch_size:>4}: {float(updates):5.2f} x the fewest updates, {float(examples):5.2f} x the fewest examples"
    )
print(
    "examples 20 % above the fewest at B =",
    round(float(theory.batch_size_at_overhead(critical, 0.2))),
)

# %% [markdown]
# How far can it be trusted? [`critical_batch`](../experiments/README.md#critical_batch) holds four definitions of the
# critical batch size against one another on two data sets: they agree to within a factor of four or so, and not
# better. Treat a noise scale as an order of magnitude with an interval, not as a setting.
#
# ## Advise
#
# `advise` measures seconds too. It times the step at every batch size, tunes the rate at a few, fits the law above,
# predicts the rest, *runs* what it would recommend with fresh seeds, and says when it was wrong.

# %%
advice = advise.batch_size(
    problem, "loss<=0.05", sizes=(1, 4, 16, 64, 256, 1440), seconds=150
)
print(advice)
advice

# %%
sizes = np.asarray([choice.batch_size for choice in advice.choices])
predicted = np.asarray([choice.expected_seconds for choice in advice.choices])
plt.figure(figsize=(5, 3.2), layout="constrained")
plt.loglog(sizes, predicted, "o-", label="predicted")
verified = advice.verified
plt.loglog(
    [c.batch_size for c in verified],
    [c.measured_seconds for c in verified],
    "x",
    ms=9,
    label="run",
)
plt.xlabel("batch size")
plt.ylabel("seconds to the target")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Which number to trust when
#
# - **A verdict other than 'ok'** comes first. 'not identified': the sample cannot tell the gradient from zero; take
#   more examples. 'heavy tail': a few examples make up the noise, and an interval cannot be had from this sample.
#   'not finite': a gradient of the sample is NaN or infinite.
# - **What was run** goes before what was predicted, and a prediction before a rule of thumb.
# - **Your optimiser's geometry**: Adam does not measure gradients by the Euclidean norm.
#   `noise.measure(..., geometry=opt_state)` takes the preconditioner from its state.
# - **The rate must be tuned** at each batch size, or the comparison is one of rates.
#
# ## What to try next
#
# - `gdjax advise --problem my_module:problem --target 'accuracy>=0.95'`, on [your own model](../models.md).
# - [The noise scale in your own training loop](4_noise.md).
# - The [ledger of published claims](../experiments/LEDGER.md): what others said, and what came out here.
