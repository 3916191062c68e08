"""The central programs of the package as (function, arguments by shape), to be lowered for any device."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from gdjax import batching, bench, curvature, descent, ghost, gradients, kernels, noise
from gdjax.problem import Problem

SQUARED_NORMS = {"sq_norms": ghost.sq_norms, "second_moments": ghost.second_moments, "gram": ghost.gram}
RULES = {"target": descent.loss_at_most(0.05), "gone": descent.diverged(), "stuck": descent.no_improvement(5)}
UPDATES = 64


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def indices(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def run(problem: Problem, batch_size: int, optimizer=None, **rest):
    """Return `descent.run` without records, and what it is given."""
    method = descent.method(gradients.mean(problem.loss), optimizer or optax.sgd(0.1))
    state = jax.eval_shape(lambda key: method.init(problem.init(key)), key())
    loop = partial(descent.run, method, record=lambda state, info: (), every=UPDATES, **rest)
    return loop, (state, shapes(problem.train), indices(UPDATES, batch_size))


def until(problem: Problem, batch_size: int):
    method = descent.method(gradients.mean(problem.loss), optax.sgd(0.1))
    _, arguments = run(problem, batch_size)
    return lambda state, data, batches: descent.until(method, state, data, batches, RULES, every=8), arguments


def of_loops(name: str, problem: Problem):
    """Yield (name, function, arguments) of updates: one after another, ended by a rule, side by side, of an epoch."""
    for batch_size in (1, 32):
        yield f"run {name} B={batch_size}", *run(problem, batch_size)
    yield f"run adam {name}", *run(problem, 32, optax.adam(0.1))
    yield f"until {name}", *until(problem, 32)
    loop, (state, data, batches) = run(problem, 1)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16, *x.shape), x.dtype), (state, batches))
    yield f"lanes {name}", jax.vmap(loop, (0, None, 0)), (many[0], data, many[1])
    train = partial(descent.train, problem, optax.sgd(0.1), batch_size=32, num_updates=8)
    yield f"train {name}", lambda key: train(key=key), (key(),)
    yield f"one kernel {name}", kernels.one_kernel(loop), (state, data, batches)


def of_gradients(name: str, problem: Problem, batch_size: int = 32):
    """Yield (name, function, arguments) of estimators and statistics of the gradient of one batch."""
    loss = problem.loss
    params, data = shapes(jax.eval_shape(problem.init, key())), shapes(problem.train)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), data)
    estimators = {
        "per_example": gradients.per_example(loss),
        "microbatched": gradients.microbatched(loss, microbatch_size=8),
        "clipped": gradients.clipped(loss, 1.0),
    } | {kind: of(loss) for kind, of in SQUARED_NORMS.items()}
    for kind, function in estimators.items():
        yield f"{kind} {name}", function, (params, batch)
    measure = partial(noise.measure, loss, num_examples=32)
    yield f"noise {name}", lambda params, data, key: measure(params, data, key).b_simple, (params, data, key())
    of_hessian = partial(noise.measure_hessian, loss, batch_size=8, num_pairs=2)
    yield f"hessian noise {name}", lambda *args: of_hessian(*args).b_noise, (params, data, key())
    start = jax.eval_shape(lambda key, params: curvature.random_vectors(key, params, num_vectors=2), key(), params)
    yield f"eigenpairs {name}", curvature.top_eigenpairs(loss, num_iterations=4), (params, batch, start)
    yield f"trace {name}", curvature.trace(loss, num_samples=2), (params, batch, key())
    yield f"sharpness {name}", curvature.batch_sharpness(loss), (params, data, indices(4, 8))


def of_streams():
    """Yield (name, function, arguments) of streams that begin anywhere."""
    for stream in (batching.reshuffled, batching.shuffled_once, batching.cyclic, batching.with_replacement):
        function = partial(stream, num_examples=1440, length=5 * 1440)
        yield stream.__name__, lambda key, start, f=function: f(key, start=start), (key(), indices())


def of_variants(problem: Problem):
    """Yield (name, function, arguments) of the ways that `bench` compares; sharding has devices of its own."""
    params, data = shapes(jax.eval_shape(problem.init, key())), shapes(problem.train)
    for name, variant in bench.VARIANTS.items():
        if name not in ("python-loop", "sharded"):
            yield f"variant {name}", variant(problem, 0.1), (params, data, indices(UPDATES, 32))
