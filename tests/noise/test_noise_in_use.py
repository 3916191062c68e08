"""The noise scale in the loops of others: Flax NNX with AdamW and microbatches, Equinox, data parallelism."""

import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from gdjax import ghost, gradients, noise

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

BATCH_SIZE, NUM_MICROBATCHES = 32, 4
DEVICES = 4


@pytest.fixture(autouse=True)
def lenient():
    """Their code mixes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.layers = nnx.List([nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)])

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.layers[1](nnx.gelu(self.layers[0](self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, vocabulary, width, rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.block = Block(width, rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


def texts(key, num_examples):
    """Sequences in which every token is the one before it plus one or two, of seven."""
    steps = jax.random.randint(key, (num_examples, 9), 1, 3)
    return jnp.cumsum(steps, 1) % 7


@pytest.mark.nightly  # the guide on noise runs this loop
def test_a_flax_nnx_transformer_with_adamw_and_four_microbatches():
    graph, params = nnx.split(Transformer(7, 8, nnx.Rngs(0)), nnx.Param)

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens[None, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    optimizer = optax.chain(noise.watch(half_life=500.0), optax.adamw(1e-5))

    def step(carry, batch):
        params, state = carry

        def microbatch(total, batch):
            grads = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batch).mean())(params)
            return jax.tree.map(jnp.add, total, grads), optax.tree.norm(grads, squared=True)

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, sq_norms = jax.lax.scan(microbatch, zeros, batch.reshape(NUM_MICROBATCHES, -1, 9))
        grads = jax.tree.map(lambda g: g / NUM_MICROBATCHES, total)
        known = noise.parts(sq_norms=sq_norms, batch_size=BATCH_SIZE)
        updates, state = optimizer.update(grads, state, params, noise=known)
        return (optax.apply_updates(params, updates), state), None

    batches = texts(jax.random.key(1), 60 * BATCH_SIZE).reshape(60, BATCH_SIZE, 9)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), batches)[0])
    (after, state) = run(params)
    found = noise.reading(state)
    data = texts(jax.random.key(2), 256)
    expected = noise.measure(loss, after, data, jax.random.key(3), num_examples=256, replace=True)
    assert found.verdict == expected.verdict == "ok"
    assert found.low < expected.high
    assert expected.low < found.high


def test_the_optimizer_of_flax_nnx():
    """Which wraps every array of its state."""
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    chain = optax.chain(noise.watch(half_life=2000.0), optax.adam(1e-5))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, example):
        x, y = example
        return (nnx.merge(graph, params)(x)[0] - y) ** 2

    @nnx.jit
    def step(model, optimizer, batch):
        _, grads, sq_norms = ghost.sq_norms(loss)(nnx.state(model, nnx.Param), batch)
        optimizer.update(model, grads, noise=noise.parts(sq_norms=sq_norms, batch_size=BATCH_SIZE))

    @jax.jit
    def plain_step(params, state, batch):
        _, grads, sq_norms = ghost.sq_norms(loss)(params, batch)
        known = noise.parts(sq_norms=sq_norms, batch_size=BATCH_SIZE)
        updates, state = chain.update(grads, state, params, noise=known)
        return optax.apply_updates(params, updates), state

    after, state = params, chain.init(params)
    x = jax.random.normal(jax.random.key(1), (20, BATCH_SIZE, 3))
    y = x.sum(2) + jax.random.normal(jax.random.key(2), x.shape[:2])
    for batch in zip(x, y, strict=True):
        step(model, optimizer, batch)
        after, state = plain_step(after, state, batch)
    found, expected = noise.reading(optimizer.opt_state), noise.reading(state)
    np.testing.assert_allclose(found.b_simple, expected.b_simple, rtol=1e-4)
    data, key = (x.reshape(-1, 3), y.reshape(-1)), jax.random.key(3)
    scales = [
        noise.measure(loss, after, data, key, num_examples=320, geometry=geometry).b_simple
        for geometry in (optimizer.opt_state, state)
    ]
    np.testing.assert_allclose(*scales, rtol=1e-4)


@pytest.mark.nightly  # and this
def test_an_equinox_model():
    model = eqx.nn.MLP(3, 1, width_size=4, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, example):
        x, y = example
        return (eqx.combine(params, static)(x)[0] - y) ** 2

    optimizer = optax.chain(noise.watch(half_life=2000.0), optax.adam(1e-5))

    @eqx.filter_jit
    def step(params, state, batch):
        _, grads, sq_norms = ghost.sq_norms(loss)(params, batch)
        known = noise.parts(sq_norms=sq_norms, batch_size=BATCH_SIZE)
        updates, state = optimizer.update(grads, state, params, noise=known)
        return eqx.apply_updates(params, updates), state

    x = jax.random.normal(jax.random.key(1), (100, BATCH_SIZE, 3))
    y = x.sum(2) + jax.random.normal(jax.random.key(2), x.shape[:2])
    state = optimizer.init(params)
    for batch in zip(x, y, strict=True):
        params, state = step(params, state, batch)
    found = noise.reading(state)
    data = x.reshape(-1, 3), y.reshape(-1)
    exact = noise.measure(loss, params, data, jax.random.key(3), num_examples=3200)
    assert found.verdict == "ok"
    assert found.low < exact.b_simple < found.high
    adapted = noise.measure(loss, params, data, jax.random.key(3), num_examples=3200, geometry=state)
    assert adapted.b_simple != exact.b_simple


def data_parallel(num_devices):
    """Return the readings of a data-parallel run on so many devices, and of the same parts on one."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))

    def loss(params, example):
        x, y = example
        return (x @ params["w"] + params["b"] - y) ** 2

    gradient = gradients.mean(loss)
    options = {"half_life": 1000.0}
    over_devices = optax.chain(noise.watch(**options, axis_name="data", batch_size=BATCH_SIZE), optax.adam(1e-3))

    def step(params, state, batch):
        varying = jax.lax.pcast(params, "data", to="varying")  # or the gradient comes out summed
        updates, state = over_devices.update(gradient(varying, batch).grad, state, params)
        return optax.apply_updates(params, updates), state

    replicated, split = PartitionSpec(), PartitionSpec("data")
    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(replicated, replicated, split), out_specs=(replicated, replicated))
    )
    on_one = optax.chain(noise.watch(**options), optax.adam(1e-3))

    @jax.jit
    def plain_step(params, state, batch):
        parts = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
        grads = jax.vmap(lambda part: gradient(params, part).grad)(parts)
        known = noise.parts(grads=grads, batch_size=BATCH_SIZE)
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = on_one.update(mean, state, params, noise=known)
        return optax.apply_updates(params, updates), state

    x = jax.random.normal(jax.random.key(1), (50, BATCH_SIZE, 3))
    y = x.sum(2) + jax.random.normal(jax.random.key(2), x.shape[:2])
    start = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    one, many = (start, over_devices.init(start)), (start, on_one.init(start))
    for batch in zip(x, y, strict=True):
        one, many = step(*one, batch), plain_step(*many, batch)
    return [[np.asarray(x).tolist() for x in noise.reading(state)] for _, state in (one, many)]


def test_a_data_parallel_step_on_two_devices():
    found, expected = data_parallel(2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_data_parallel_step_on_four_devices():
    """In a process of its own: the number of devices is settled when JAX starts."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")  # of an orbax for an older jax
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: optax.MultiSteps(x, 2)], ids=["plain", "MultiSteps"])
def test_a_state_comes_back_from_a_checkpoint(wrap, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer = wrap(optax.chain(noise.watch(half_life=100.0), optax.adam(0.1)))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for i in range(4):
        known = noise.parts(sq_norms=jnp.asarray([1.0, 3.0 + i, 7.0]), batch_size=6)
        grads = {"w": jnp.asarray([0.5, 0.5, 0.1 * i])}
        _, state = optimizer.update(grads, state, params, noise=known)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert str(noise.reading(restored)) == str(noise.reading(state))
    assert float(noise.reading(state).num_examples) > 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps(data_parallel(DEVICES)))
