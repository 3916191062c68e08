# %% [markdown]
# # Carry hyperparameters to another batch size
#
# You tuned a run at a batch of 16, and have a machine for 128. By how much does the learning rate grow? *Linear*, say
# some (Goyal et al. 2017); *as the square root*, say others (Krizhevsky 2014, Malladi et al. 2022), and for Adam they
# change b1 and b2 too. Each was derived for some optimisers and some range of batch sizes. This page applies them, and
# then asks a real run which one is right.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from gdjax import advise, problems, theory
from gdjax.theory.rules import RULES, Hyperparameters

problem = problems.digits_mlp()

# %% [markdown]
# ## The rules
#
# A rule is a pure function of hyperparameters and of the factor by which the batch grows.

# %%
adam = Hyperparameters(0.001, weight_decay=0.1, b1=0.9, b2=0.999)
for name, rule in RULES.items():
    if "adamw" in rule.optimizers:
        new = rule.apply(adam, 8)
        memory = f"b1 {float(new.b1):.3f}  b2 {float(new.b2):.4f}"
        print(
            f"{name:<26} rate {float(new.learning_rate):.4f}  decay {float(new.weight_decay):.2f}  {memory}"
        )

# %% [markdown]
# ## Where a rule ends
#
# The best rate of SGD is proportional to B far below the noise scale and flat far above it: $\eta(B) =
# \eta_\mathrm{max}/(1 + B_\mathrm{noise}/B)$. A rule is right on one side of the bend only, which is why the noise
# scale comes first. With a noise scale of 100:

# %%
sizes = 2.0 ** np.arange(0, 12)
best = np.asarray(
    [float(theory.best_learning_rate(size, 100.0, full_batch=1.0)) for size in sizes]
)
start = best[4]
plt.figure(figsize=(5, 3.2), layout="constrained")
plt.loglog(sizes, best, "o-", label="the law")
plt.loglog(sizes[4:], start * sizes[4:] / 16, "--", label="linear from B = 16")
plt.loglog(
    sizes[4:], start * jnp.sqrt(sizes[4:] / 16), ":", label="square root from B = 16"
)
plt.xlabel("batch size")
plt.ylabel("best learning rate")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Ask a run
#
# `advise.rules` tunes the rate at the smaller batch size, measures the noise scale there in the optimiser's own geometry,
# says which rule it expects to be best, carries the hyperparameters by each, runs all of them with fresh seeds, and
# compares them with the rate tuned at the larger batch size. Every run sees as many examples.

# %%
found = advise.rules(
    problem,
    "adamw",
    base=16,
    batch_size=128,
    num_examples=5760,
    num_seeds=2,
    announce=print,
)
print(found)

# %% [markdown]
# On the command line: `gdjax rules --from 16 --to 128 --optimizer adamw`.
#
# ## What the published rules are worth here
#
# The [ledger](../experiments/LEDGER.md) holds them side by side: on digits the best rate of SGD grew as $B^{1.01}$ and
# that of Adam as $B^{0.49}$, each up to B = 128.
#
# ## Grow the batch in a run?
#
# The noise scale grows along a run, and with it the batch that is worth its examples. `gdjax schedule --target
# 'loss<=0.1'` asks whether a growing batch, a falling rate, both or neither reaches a target first on this device.
#
# ## What to try next
#
# - Your own problem and optimiser: `gdjax rules --problem my_module:problem --optimizer muon`.
# - `theory.rules.why_not` and `theory.rules.outside` say in words why a rule does not apply.
# - [Measure the noise scale first](2_choose.md).
