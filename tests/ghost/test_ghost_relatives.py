"""Relatives of programs that were once wrong: every statistic against `vmap(grad)`, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint
from test_ghost_family import host_norm, normal, quantise

from gdjax import ghost

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

W, STACK, X = (4, 4), (3, 4, 4), (5, 3, 4)


def square(x):
    return jnp.sum(jnp.abs(x) ** 2)


@jax.custom_vjp
def normed(w):
    return w / host_norm(w)


normed.defvjp(lambda w: (normed(w), host_norm(w)), lambda n, g: (g / n,))


def integers(bound, *shape):
    return jax.random.randint(jax.random.key(1), shape, 0, bound, jnp.int32)


def looped(step, initial, xs=None, length=None):
    """Return the last state of a loop over xs whose step is (state, x) -> state."""
    return lax.scan(lambda h, x: (step(h, x), None), initial, xs, length=length)[0]


# name: (loss, shapes of the parameters, batch or its shape)
PROGRAMS = {
    "complex state of a loop": (
        lambda w, x: square(looped(lambda h, row: h * 0.5 + jnp.fft.fft(row) @ w, jnp.zeros(4, jnp.complex64), x)),
        W,
        X,
    ),
    "complex and back": (lambda w, x: square(jnp.tanh(jnp.real((w * 1j + 1) @ (x.T * (1 + 1j))))), W, X),
    "complex of two": (lambda w, x: square(x @ lax.complex(w, w.T)), W, X),
    "filter": (
        lambda w, x: square(jnp.fft.irfft(jnp.fft.rfft(w, axis=0) * jnp.fft.rfft(x[0])[:, None], axis=0)),
        W,
        X,
    ),
    "quantised slices": (lambda w, x: square(looped(lambda h, v: jnp.tanh(h @ quantise(v)), x, w)), STACK, X),
    "quantised in a branch": (
        lambda w, x: square(lax.cond(x[0, 0] > 0, lambda: x @ quantise(w), lambda: x @ w)),
        W,
        X,
    ),
    "callback in a loop": (
        lambda w, x: square(looped(lambda h, _: jnp.tanh(h @ (w / host_norm(lax.stop_gradient(w)))), x, length=2)),
        W,
        X,
    ),
    "callback in a custom rule": (lambda w, x: square(looped(lambda h, _: jnp.tanh(h @ normed(w)), x, length=2)), W, X),
    "differential equation": (
        lambda w, x: square(odeint(lambda y, t, w: jnp.tanh(w @ y), x[0], jnp.array([0.0, 0.5]), w)[-1]),
        W,
        X,
    ),
    "integers made of it": (
        lambda w, x: (
            square(x[0] @ w) * lax.while_loop(lambda i: i < jnp.argmax(x[0] @ w), lambda i: i + 1, 0) + square(x)
        ),
        W,
        X,
    ),
    "nothing but integers": (lambda w, x: jnp.argmax(x[0] @ w).astype(jnp.float32) + square(x), W, X),
    "rows scattered": (lambda w, x: square(jnp.zeros(W).at[jnp.argsort(x[0])].add(w) * x[0]), W, X),
    "product of two": (lambda p, x: square(jnp.tanh(x @ (p[0] @ p[1]))), [W, W], X),
    "low rank": (lambda p, x: square(jnp.tanh(x @ p[0] + x @ p[1] @ p[2])), [W, (4, 2), (2, 4)], X),
    "low rank added": (lambda p, x: square(jnp.tanh(x @ (p[0] + p[1] @ p[2]))), [W, (4, 2), (2, 4)], X),
    "loop in a loop over slices": (
        lambda w, x: square(looped(lambda h, v: looped(lambda h, r: jnp.tanh(h @ v + r) @ v.T, h, x), jnp.ones(4), w)),
        STACK,
        X,
    ),
    "slices of slices": (
        lambda w, x: square(looped(lambda h, v: looped(lambda h, u: jnp.tanh(h @ u), h, v), x, w)),
        (3, 2, 4, 4),
        X,
    ),
    "two loops over one stack": (
        lambda w, x: square(looped(lambda h, v: jnp.tanh(h @ v), looped(lambda h, v: jnp.sin(h @ v), x, w), w)),
        STACK,
        X,
    ),
    "slices and all": (
        lambda w, x: square(looped(lambda h, v: jnp.tanh(h @ v), x, w)) + square(jnp.einsum("ti,lij->tlj", x, w)),
        STACK,
        X,
    ),
    "checkpoints in a loop": (
        lambda w, x: (
            square(looped(jax.checkpoint(lambda h, v: jnp.tanh(h @ v)), x, w))
            + square(looped(jax.checkpoint(lambda h, r: jnp.tanh(h @ w[0] + r)), jnp.zeros(4), x))
        ),
        STACK,
        X,
    ),
    "learned state": (
        lambda p, x: square(lax.scan(lambda h, r: (jnp.tanh(h @ p[0] + r), h), p[1], x)[1]),
        [W, (4,)],
        X,
    ),
    "output of a loop": (
        lambda w, x: square(lax.scan(lambda h, v: (jnp.tanh(h @ v), v * 2), x, w)[1]) * square(x),
        STACK,
        X,
    ),
    "entries": (lambda w, i: square(w[i[0], i[1]] * jnp.arange(4.0)), STACK, integers(3, 5, 2)),
    "columns": (lambda w, i: square(jnp.cumsum(w[:, i], 1)), W, integers(4, 5, 6)),
    "entries along": (lambda w, i: square(jnp.tanh(jnp.take_along_axis(w, i[:, None], 1))), W, integers(4, 5, 4)),
    "rows of a grid": (lambda w, i: square(jnp.cumsum(w[i], 0)), W, integers(4, 5, 2, 3)),
    "rows, ones and zeros": (
        lambda w, i: square(jax.nn.one_hot(i, 4) @ w) + square(jnp.tanh(w[i] @ w.T)),
        W,
        integers(4, 5, 3),
    ),
    "penalty in a loop": (
        lambda w, x: looped(lambda c, r: c + square(jnp.tanh(r @ w)) + 0.1 * square(w), jnp.zeros(()), x),
        W,
        X,
    ),
    "determinant": (lambda w, x: square(jnp.tanh(x @ w)) + jnp.linalg.slogdet(w)[1], W, X),
    "ensemble": (lambda w, x: square(jax.vmap(lambda v: jnp.tanh(x @ v))(w)), STACK, X),
    "differences": (lambda p, x: square(jnp.tanh(p[0] - x @ -p[1]) / (2 + p[2])), [(4,), W, ()], X),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_statistic_equals_that_of_the_gradients_of_all_examples(name):
    loss, shapes, batch = PROGRAMS[name]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        is_list = isinstance(shapes, list)
        params = [normal(i, *shape) for i, shape in enumerate(shapes)] if is_list else normal(0, *shapes)
        batch = normal(9, *batch) if isinstance(batch, tuple) else batch
        grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
        measures = ghost.sq_norms, ghost.second_moments, ghost.gram
        found = jax.jit(lambda p, b: [measure(loss)(p, b)[2] for measure in measures])(params, batch)
    for statistics in zip(jax.tree.leaves(grads), *map(jax.tree.leaves, found), strict=True):
        flat, norms, moments, gram = (np.asarray(x, float) for x in statistics)
        flat = flat.reshape(len(flat), -1)
        for statistic, wanted in ((norms, (flat**2).sum(1)), (moments, (flat**2).mean(0)), (gram, flat @ flat.T)):
            scale = 1e-3 * np.abs(wanted).max()
            np.testing.assert_allclose(statistic.reshape(wanted.shape), wanted, rtol=1e-3, atol=scale)
