"""noise.watch, parts and probe: the pair by enumeration from every source, and what is refused."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_noise import PARAMS, explicit_gradients, linear_loss, moments, population

from gdjax import ghost, gradients, noise

BATCH_GRAD = gradients.mean(linear_loss)


@pytest.fixture
def promoting():
    """optax mixes integers with numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def is_running(x):
    return isinstance(x, noise.Running)


def mean_pair(states):
    """The mean of the pairs of a stack of states, each after one update."""
    [running] = [x for x in jax.tree.leaves(states, is_leaf=is_running) if is_running(x)]
    assert (running.weight > 0).all()
    return np.asarray(running.sums / running.weight[:, None] * running.unit[:, None]).mean(0)


def after_one(optimizer, step, size):
    """States after one update on every batch of so many of five examples, in every order."""
    batches = jnp.asarray(list(itertools.permutations(range(5), size)))
    state = optimizer.init(PARAMS)
    return jax.jit(jax.vmap(lambda batch: step(state, batch)))(batches)


def batch_of(data, indices):
    return jax.tree.map(lambda x: x[indices], data)


SOURCES = {
    "single examples": lambda batch: noise.parts(sq_norms=ghost.sq_norms(linear_loss)(PARAMS, batch)[2], batch_size=4),
    "their gradients": lambda batch: noise.parts(
        grads=gradients.per_example(linear_loss)(PARAMS, batch).aux.grads, batch_size=4
    ),
    "norms of microbatches": lambda batch: noise.parts(
        sq_norms=jax.vmap(lambda half: optax.tree.norm(BATCH_GRAD(PARAMS, half).grad, squared=True))(halves(batch)),
        batch_size=4,
    ),
    "microbatches": lambda batch: noise.parts(
        grads=jax.vmap(lambda half: BATCH_GRAD(PARAMS, half).grad)(halves(batch)), batch_size=4
    ),
    "the last microbatch": lambda batch: noise.parts(
        sq_norms=optax.tree.norm(BATCH_GRAD(PARAMS, batch_of(halves(batch), 1)).grad, squared=True),
        batch_size=4,
        part_size=2,
    ),
}


def halves(batch):
    return jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_averaged_over_every_batch_is_exact(source):
    data = population(5)
    watch = noise.watch(half_life=np.inf, num_examples=5)

    def step(state, indices):
        batch = batch_of(data, indices)
        return watch.update(BATCH_GRAD(PARAMS, batch).grad, state, noise=SOURCES[source](batch))[1]

    states = after_one(watch, step, 4)
    precision.assert_close(mean_pair(states), moments(explicit_gradients(data)), rtol=1e-9)


def test_probe_averaged_over_every_batch_is_exact():
    data = population(5)
    probe = noise.probe(linear_loss, every=3, sample_size=2, half_life=np.inf, num_examples=5)

    def step(state, indices):
        batch = batch_of(data, indices)
        return probe.update(BATCH_GRAD(PARAMS, batch).grad, state, PARAMS, batch=batch)[1]

    states = after_one(probe, step, 3)
    precision.assert_close(mean_pair(states), moments(explicit_gradients(data)), rtol=1e-9)


@pytest.mark.slow
def test_probe_measures_every_so_many_updates_and_decays_by_all_of_them():
    data = population(6)
    probe = noise.probe(linear_loss, every=3, sample_size=4, half_life=100.0)
    grads = BATCH_GRAD(PARAMS, data).grad
    state, seen = probe.init(PARAMS), []
    for _ in range(7):
        _, state = probe.update(grads, state, PARAMS, batch=data)
        seen.append(float(state.running.num_examples))
    assert seen == [18.0] * 3 + [36.0] * 3 + [54.0]


AXES = {"axis_types": (AxisType.Auto,)}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.slow
def test_the_gradients_of_two_devices_are_the_parts(check_vma):
    data = population(5)
    optimizer = optax.chain(
        noise.watch(half_life=np.inf, num_examples=5, axis_name="data", batch_size=4), optax.sgd(1.0)
    )
    mesh = jax.make_mesh((2,), ("data",), **AXES)
    spec = PartitionSpec("data")

    def step(params, batch):
        local = jax.lax.pcast(params, "data", to="varying") if check_vma else params
        grads = BATCH_GRAD(local, batch).grad
        return optimizer.update(grads, optimizer.init(params), params)

    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=check_vma)
    )
    runnings = []
    for indices in itertools.permutations(range(5), 4):
        if indices[0] > indices[1] or indices[2] > indices[3]:
            continue  # the same two parts
        batch = batch_of(data, jnp.asarray(indices))
        updates, (running, _) = sharded(PARAMS, batch)
        precision.assert_close(updates["weight"], -BATCH_GRAD(PARAMS, batch).grad["weight"], rtol=1e-10)
        runnings.append(running)
    states = jax.tree.map(lambda *leaves: jnp.stack([np.asarray(x) for x in leaves]), *runnings)
    precision.assert_close(mean_pair(states), moments(explicit_gradients(data)), rtol=1e-9)


@pytest.mark.slow
def test_gradients_that_are_averaged_over_devices_are_refused():
    watch = noise.watch(half_life=1.0, axis_name="data", batch_size=4)
    mesh = jax.make_mesh((2,), ("data",), **AXES)
    spec = PartitionSpec("data")

    def stepping(gradient, *, check_vma):
        def step(params, batch):
            return watch.update(gradient(params, batch), watch.init(params), params)[1]

        return jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=check_vma
        )

    def summed(params, batch):  # by the transpose of the replicated parameters
        return BATCH_GRAD(params, batch).grad

    def averaged(params, batch):
        return jax.lax.pmean(BATCH_GRAD(jax.lax.pcast(params, "data", to="varying"), batch).grad, "data")

    data = batch_of(population(5), jnp.arange(4))
    for gradient in (summed, averaged):
        with pytest.raises(ValueError, match=r"do not vary over axis_name='data'.*pcast"):
            jax.jit(stepping(gradient, check_vma=True))(PARAMS, data)

    def unchecked(params, batch):  # what cannot be seen when it is traced is seen in the numbers
        return jax.lax.pmean(BATCH_GRAD(params, batch).grad, "data")

    found = noise.reading(jax.jit(stepping(unchecked, check_vma=False))(PARAMS, data))
    assert found.verdict == "not raw"
    assert "averaged over devices" in str(found)


def watched(updates, **options):
    watch = noise.watch(half_life=100.0)
    return noise.reading(watch.update(updates, watch.init(updates), noise=noise.parts(**options))[1])


RAW = jnp.asarray([[3.0, 1.0], [1.0, 2.0], [0.5, -1.0], [2.0, 0.0]])


@pytest.mark.parametrize(
    ("updates", "grads", "norms_tell"),
    [
        (4 * RAW.mean(0), RAW, True),  # a sum, or a scaled loss
        (0.3 * RAW.mean(0), RAW, False),  # clipped before it came
        (RAW.mean(0), jnp.cumsum(RAW, 0) / jnp.arange(1.0, 5.0)[:, None], False),  # accumulated microbatches
        (RAW.mean(0), jnp.broadcast_to(RAW.mean(0), RAW.shape), True),  # averaged over devices
        (
            (RAW / jnp.linalg.norm(RAW, axis=1, keepdims=True)).mean(0),
            RAW / jnp.linalg.norm(RAW, axis=1, keepdims=True),
            True,
        ),
    ],
    ids=["summed", "clipped", "accumulated", "averaged", "each clipped"],
)
def test_what_is_not_raw_does_not_count(updates, grads, norms_tell):
    assert watched(updates, grads=grads, batch_size=16).verdict == "not raw"
    from_norms = watched(updates, sq_norms=(grads**2).sum(1), batch_size=16)
    assert (from_norms.verdict == "not raw") == norms_tell
    assert watched(RAW.mean(0), grads=RAW, batch_size=16).verdict == "not identified"  # one update, and it counts


def test_a_sum_of_the_gradients_of_bfloat16_is_not_taken_for_something_else():
    grads = jax.random.normal(jax.random.key(0), (8, 300)) + 1
    mean = grads.mean(0).astype(jnp.bfloat16)
    found = watched(mean, grads=grads.astype(jnp.bfloat16), batch_size=8)
    assert found.verdict != "not raw"
    np.testing.assert_allclose(found.trace_cov, ((grads - grads.mean(0, keepdims=True)) ** 2).sum() / 7, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, "either sq_norms"),
        ({"batch_size": 4, "sq_norms": jnp.ones(2), "grads": jnp.ones(2)}, "either sq_norms"),
        ({"batch_size": 4, "sq_norms": jnp.ones(1)}, "part_size=4 must be at least 1 and below batch_size=4"),
        ({"batch_size": 4, "sq_norms": jnp.ones(3)}, "batch_size=4 is no multiple of the 3 parts"),
        ({"batch_size": 2, "sq_norms": jnp.ones(4)}, "batch_size=2 is no multiple of the 4 parts"),
        (
            {"batch_size": 4, "sq_norms": jnp.ones(3), "part_size": 2},
            "3 parts of part_size=2 are more than batch_size=4",
        ),
        ({"batch_size": 4, "sq_norms": jnp.ones((2, 2))}, r"sq_norms must be \[M\]"),
        ({"batch_size": 4, "grads": jnp.ones((1, 3))}, "one gradient, of the whole"),
        (
            {
                "batch_size": 4,
                "sq_norms": gradients.Clipped(jnp.ones(4), jnp.ones(4), jnp.ones(4), jnp.zeros((), jnp.int32)),
            },
            r"what gradients\.clipped measured",
        ),
    ],
)
def test_parts_that_show_no_noise_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        noise.parts(**options)


def test_what_an_estimator_leaves_can_be_passed_as_it_is():
    data = population(4)
    aux = gradients.with_sq_norms(linear_loss)(PARAMS, data).aux
    chex.assert_trees_all_equal(
        noise.parts(sq_norms=aux, batch_size=4), noise.parts(sq_norms=aux.sq_norms, batch_size=4)
    )


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"watch needs update\(\.\.\., noise=noise.parts"):
        noise.watch(half_life=1.0).update(1.0, None)
    with pytest.raises(ValueError, match="axis_name=data and batch_size=None, of all devices, go together"):
        noise.watch(half_life=1.0, axis_name="data")
    probe = noise.probe(linear_loss, every=2, sample_size=4, half_life=1.0)
    grads = BATCH_GRAD(PARAMS, population(3)).grad
    with pytest.raises(ValueError, match="batch=batch"):
        probe.update(grads, probe.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"batch has 3 examples.*sample_size=4"):
        probe.update(grads, probe.init(PARAMS), PARAMS, batch=population(3))
    with pytest.raises(ValueError, match="every=0"):
        noise.probe(linear_loss, every=0, sample_size=4, half_life=1.0)


@pytest.mark.usefixtures("promoting")
@pytest.mark.slow
def test_in_multisteps_the_last_microbatch_is_held_against_the_accumulated_gradient():
    """Four mini-steps of MultiSteps give the same pair as one update with the norm of the last of them."""
    data = population(8)
    watch = noise.watch(half_life=100.0)
    optimizer = optax.MultiSteps(optax.chain(watch, optax.sgd(0.1)), every_k_schedule=4)

    @jax.jit
    def step(state, indices):
        grads = BATCH_GRAD(PARAMS, batch_of(data, indices)).grad
        known = noise.parts(sq_norms=optax.tree.norm(grads, squared=True), batch_size=8, part_size=2)
        return optimizer.update(grads, state, PARAMS, noise=known)[1]

    state = optimizer.init(PARAMS)
    for i, indices in enumerate(jnp.arange(8).reshape(4, 2)):
        state = step(state, indices)
        assert (float(noise.reading(state).num_examples) == 8) == (i == 3)
    grads = explicit_gradients(data)
    small, large = np.sum(grads[6:].mean(0) ** 2), np.sum(grads.mean(0) ** 2)
    expected = noise.unbiased(small, large, batch_sizes=(2, 8))
    found = noise.reading(state)
    precision.assert_close((found.grad_sq_norm, found.trace_cov), expected, rtol=1e-5)  # MultiSteps adds in float32


@pytest.mark.usefixtures("promoting")
def test_watching_is_traced_once_and_leaves_the_updates_alone():
    data = population(40)
    plain, watching = optax.adam(0.1), optax.chain(noise.watch(half_life=50.0), optax.adam(0.1))
    batches = jnp.arange(40).reshape(10, 4)
    strong = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), PARAMS)  # no weak types, as a loop's carry has none

    def run(optimizer, **extra):
        def step(carry, indices):
            params, state = carry
            batch = batch_of(data, indices)
            losses, grads, norms = ghost.sq_norms(linear_loss)(params, batch)
            del losses
            known = {"noise": noise.parts(sq_norms=norms, batch_size=4)} if extra else {}
            updates, state = optimizer.update(grads, state, params, **known)
            return (optax.apply_updates(params, updates), state), None

        chex.clear_trace_counter()
        step = chex.assert_max_traces(step, 1)
        return jax.jit(lambda: jax.lax.scan(step, (strong, optimizer.init(strong)), batches)[0])()

    (params, _), (found, state) = run(plain), run(watching, noise=True)
    chex.assert_trees_all_equal(params, found)
    assert float(noise.reading(state).num_examples) == 40
