"""The twin of a problem: the quadratic with noise that gradient descent sees about given parameters.

Expanded to second order, the mean loss at step t of gradient descent is, for any rates and batch sizes, a sum over the
spectrum of the Hessian H of polynomials of h, weighted by what the gradient G and the noise z of one example have of
each direction: G' p(H) G and E z' q(H) z. m steps of the Lanczos process from G, and from draws of z, give nodes and
weights that make such sums exact up to degree 2 m - 1 (Golub & Meurant 2010, chapter 6): no eigenvector is needed, and
what a trace would lump together stays resolved where the gradient and the noise are.

>>> import jax, jax.numpy as jnp
>>> from gdjax.problem import Problem
>>> x = jax.random.normal(jax.random.key(0), (64, 5))
>>> squares = Problem(lambda key: jnp.ones(5), lambda w, x: 0.5 * (x @ w - 1) ** 2, x)
>>> found = twin(squares, jnp.ones(5), key=jax.random.key(1))
>>> [f"{loss:.4f}" for loss in found.losses(jnp.full(3, 0.1), jnp.full(3, jnp.inf))]  # of full batches, exactly
['2.2723', '1.9864', '1.7485']
>>> w, losses = jnp.ones(5), []
>>> for _ in range(3):
...     w -= 0.1 * jax.grad(lambda w: squares.evaluate(w)["loss"])(w)
...     losses.append(f"{squares.evaluate(w)['loss']:.4f}")
>>> losses
['2.2723', '1.9864', '1.7485']
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from gdjax import batching
from gdjax._trees import filled, kept, scaled, traced, wide
from gdjax.problem import Batch, Params, Problem, merge, num_examples, trainable
from gdjax.theory import schedules
from gdjax.theory.schedules import Quadratic

CHUNK = 256  # examples in memory at a time
LOWEST = 1e-4  # of the largest curvature: directions that are flatter, or curve downwards, are taken to curve so much


class Twin(NamedTuple):
    """A quadratic in the place of a problem.

    Attributes:
        quadratic: nodes of the spectrum, with what the start and the noise have of them.
        level: scalar, the loss at its minimum: what `schedules.run` says is above this.
    """

    quadratic: Quadratic
    level: jax.Array

    def losses(self, learning_rates: jax.Array, batch_sizes: jax.Array) -> jax.Array:
        """Return the mean loss [T] after each update, for any rates and batch sizes [T]."""
        return self.level + schedules.run(self.quadratic, learning_rates, batch_sizes)[1]

    def horizon(
        self, learning_rates: jax.Array, batch_sizes: jax.Array, losses: jax.Array, *, tolerance: float = 0.2
    ) -> int:
        """Return how many updates the twin is valid for: those before it is off by more than a tolerance.

        Args:
            learning_rates, batch_sizes: of a run of the problem itself from the parameters of the twin, [T].
            losses: that the run had after each update [T]; NaN where it was not evaluated.
            tolerance: of predicted / measured - 1.
        """
        predicted, measured = np.asarray(self.losses(learning_rates, batch_sizes)), np.asarray(losses)
        wrong = ~(np.abs(predicted / measured - 1) <= tolerance) & ~np.isnan(measured)
        return int(np.argmax(wrong)) if wrong.any() else len(wrong)


def twin(
    problem: Problem,
    params: Params,
    *,
    key: jax.Array,
    precondition: Params | None = None,
    num_steps: int = 12,
    num_draws: int = 4,
    max_examples: int = 1024,
) -> Twin:
    """Return the twin of `problem` about `params`, from (1 + num_draws) num_steps Hessian-vector products.

    It knows nothing of how curvature and noise change along a run. `Twin.horizon` says, by a run, how far that is true.

    Args:
        problem: its floating-point parameters are trained; example weights are used.
        params: where it is expanded.
        key: typed PRNG key, of the signs that draw noise.
        precondition: P, like the parameters, where updates are -eta P g, as those of Adam are with P = 1 / (sqrt(v) +
            eps) while v stays as it is.
        num_steps: m, of the Lanczos process.
        num_draws: of noise.
        max_examples: that loss, gradient and Hessian are the means of: all, or so many drawn once and for all.
    """
    examples = problem.train
    if problem.num_examples > max_examples:
        order = batching.reshuffled(jax.random.key(0), problem.num_examples, length=max_examples)
        examples = batching.take(examples, order)
    make = partial(_twin, problem.loss, problem.weight, num_steps, num_draws)
    arguments = jax.tree.map(jnp.asarray, (params, precondition)), examples, key
    if traced(arguments):
        return make(*arguments)
    return kept(problem, ("twin", num_steps, num_draws), lambda: jax.jit(make))(*arguments)


def _twin(loss, weight, num_steps: int, num_draws: int, given, examples: Batch, key: jax.Array) -> Twin:
    """Return the twin about given = (params, precondition) on these examples."""
    params, precondition = given
    count = num_examples(examples)
    train, frozen = trainable(params)
    flat, unravel = ravel_pytree(train)
    start = wide(flat)  # directions of bfloat16 are not orthogonal
    root = 1.0 if precondition is None else jnp.sqrt(ravel_pytree(trainable(precondition)[0])[0])
    weights = jnp.ones(count)
    if weight is not None:
        weights = scaled(jax.vmap(weight)(examples).astype(float))
        examples = filled(examples, weights)
    weights = weights / jnp.sum(weights)

    def value_and_gradient(theta, weights):
        """Return sum_j w_j loss_j and its gradient, a chunk of examples at a time."""

        def total(theta, chunk, weights):
            params = merge(unravel(theta.astype(flat.dtype)), frozen)
            return weights @ jax.vmap(loss, (None, 0))(params, chunk).astype(float)

        size = min(CHUNK, count)
        places = jnp.arange(-(-count // size) * size) % count  # the last ones with weight 0
        weights = jnp.where(jnp.arange(len(places)) < count, weights[places], 0)
        pieces = batching.take(examples, places), weights
        pieces = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), pieces)

        def add(carry, piece):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(total)(theta, *piece)), None

        return lax.scan(add, (jnp.zeros(()), jnp.zeros_like(theta)), pieces)[0]

    def hessian(vector):
        return root * jax.jvp(lambda theta: value_and_gradient(theta, weights)[1], (start,), (root * vector,))[1]

    def noise(key):
        signs = jax.random.rademacher(key, (count,), float)
        kicked = value_and_gradient(start, signs * weights)[1] - jnp.sum(signs * weights) * gradient
        return jnp.sqrt(1.0 * count) * root * kicked  # of covariance E z z', where weights are equal

    level, gradient = value_and_gradient(start, weights)
    curvatures, parts = _quadrature(hessian, root * gradient, num_steps)
    of_noise, noises = lax.map(
        lambda key: _quadrature(hessian, noise(key), num_steps), jax.random.split(key, num_draws)
    )
    nodes = jnp.concatenate([curvatures, of_noise.reshape(-1)])
    nodes = jnp.maximum(nodes, LOWEST * jnp.max(nodes))
    none = jnp.zeros(num_draws * num_steps, nodes.dtype)
    second = jnp.concatenate([parts, none]) / nodes**2
    variance = jnp.concatenate([jnp.zeros_like(parts), noises.reshape(-1) / num_draws])
    quadratic = schedules.noisy_quadratic(nodes, variance, start=second)
    return Twin(quadratic, level - nodes @ second / 2)


def _quadrature(hessian, vector: jax.Array, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Return nodes [m] and weights [m] such that vector' p(H) vector = sum_k w_k p(h_k) up to degree 2 m - 1."""
    size = jnp.linalg.norm(vector)
    tiny = jnp.finfo(vector.dtype).tiny

    def advance(basis, step):
        index, current = step["index"], step["vector"]
        basis = basis.at[index].set(current)
        image = hessian(current)
        diagonal = image @ current
        for _ in range(2):  # classical Gram-Schmidt, twice
            image = image - basis.T @ (basis @ image)
        beta = jnp.linalg.norm(image)
        ended = beta <= 1e2 * jnp.finfo(vector.dtype).eps * jnp.abs(diagonal)
        following = jnp.where(ended, jnp.zeros_like(image), image / jnp.maximum(beta, tiny))
        return basis, {"index": index + 1, "vector": following}, diagonal, jnp.where(ended, 0, beta)

    def body(carry, _):
        basis, step, diagonal, beta = advance(*carry)
        return (basis, step), (diagonal, beta)

    start = {"index": 0, "vector": vector / jnp.maximum(size, tiny)}
    empty = jnp.zeros((num_steps, len(vector)), vector.dtype)
    _, (diagonal, betas) = lax.scan(body, (empty, start), length=num_steps)
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1))
    return values, (size * vectors[0]) ** 2
