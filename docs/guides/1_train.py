# %% [markdown]
# # Train at any batch size
#
# A problem is the loss of **one example**. A stream is the order in which examples are visited, and a batch is a run of
# consecutive entries of it. Stochastic, mini-batch and batch gradient descent are then the same function, cut at
# different places of the same stream.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from gdjax import batching, descent, gradients, problems

problem = problems.digits_mlp()
print(problem.name, problem.num_examples, "examples")
