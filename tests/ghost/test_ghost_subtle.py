"""Programs whose gradients are easily measured wrong: all statistics and `clipped` against `vmap(grad)`, in float64."""

from functools import partial

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from gdjax import ghost, gradients

pytestmark = pytest.mark.slow


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def square(x):
    return jnp.sum(x**2)


def nightly(*cases):
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.nightly) for case in listed]


def check(loss, params, batch):
    """Compare norms, moments, Gram matrices and a clipped gradient with what the gradients of all examples give."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
        flat = np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(grads)], 1)
        norms = np.linalg.norm(flat, axis=1)
        bound = np.median(norms)
        measures = ghost.sq_norms(loss), ghost.second_moments(loss), ghost.gram(loss), gradients.clipped(loss, bound)
        found = jax.jit(lambda p, b: [measure(p, b) for measure in measures])(params, batch)
    means = flat.mean(0)
    clipped = (flat * np.minimum(1, bound / np.maximum(norms, 1e-300))[:, None]).mean(0)
    for result, mean in zip(found, (means, means, means, clipped), strict=True):
        grad = result.grad if hasattr(result, "grad") else result[1]
        np.testing.assert_allclose(np.concatenate([g.ravel() for g in jax.tree.leaves(grad)]), mean, **near(mean))
    for measured, wanted in (
        (found[0].total, norms**2),
        (np.concatenate([m.ravel() for m in jax.tree.leaves(found[1][2])]), (flat**2).mean(0)),
        (sum(jax.tree.leaves(found[2][2])), flat @ flat.T),
    ):
        np.testing.assert_allclose(measured, wanted, **near(wanted))


def near(wanted):
    return {"rtol": 1e-8, "atol": 1e-8 * np.abs(wanted).max()}


def layer(h, w):
    return jnp.tanh(h @ w), None


def layers(x, stack, **options):
    return lax.scan(layer, x, stack, **options)[0]


X = 4, 3, 4


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: square(layers(layers(x, w), w[::-1])),
        lambda w, x: square(layers(layers(x, w[1:]), w[:-1])),
        lambda w, x: square(layers(layers(x, w[:2]), w[::2])),
        lambda w, x: square(lax.scan(lambda h, u: layer(layer(h, u[0])[0], u[1]), x, (w[:-1], w[1:]))[0]),
        lambda w, x: square(lax.map(lambda v: x @ v, w) * lax.map(lambda v: jnp.sin(x @ v), w[::-1])),
        lambda w, x: square(layers(x, w.swapaxes(0, 1)) * layers(x, w[0][None])),
    ],
    ids=["reversed", "shifted", "strided", "zipped", "mapped", "across"],
)
def test_two_loops_over_one_stack_whose_slices_meet_at_other_iterations(loss):
    check(loss, normal(0, 4, 4, 4), normal(1, *X))


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: square(layers(layers(x, w[::2]), w[1::2])),
        lambda w, x: square(layers(layers(x, w), w, reverse=True)),
        lambda w, x: square(layers(x, w[1:]) @ w[0]),
    ],
    ids=["even and odd", "backwards", "first and rest"],
)
def test_loops_over_one_stack_are_measured_from_factors_where_slices_are_apart_or_met_in_step(loss):
    check(loss, normal(0, 4, 4, 4), normal(1, *X))
    [(_, _, method, _)] = ghost.coverage(loss, normal(0, 4, 4, 4), normal(1, *X[1:])).rows
    assert method == "dot_general"


@pytest.mark.parametrize(
    ("read", "places"),
    [
        (lambda w, i: jnp.take(w, i, axis=0), np.uint8([3, 250])),
        (lambda w, i: jnp.take(w, i, axis=0), np.int8([3, 127])),
        (lambda w, i: w.at[i].get(mode="fill", fill_value=0), np.uint8([3, 250])),
        (lambda w, i: w.at[i].get(mode="clip"), np.uint8([3, 250])),
        (lambda w, i: w.at[i].get(mode="clip"), np.uint32([3, 2**32 - 1])),
        (lambda w, i: lax.dynamic_slice_in_dim(w, i[0], 1, 0), np.uint8([250, 3])),
    ],
    ids=["take", "take signed", "fill", "clip", "beyond", "slice"],
)
def test_places_in_a_table_of_more_rows_than_their_dtype_counts(read, places):
    batch = jnp.asarray(np.stack([places, places[::-1], places[[0, 0]]]))
    check(lambda w, i: square(jnp.tanh(read(w, i))), normal(0, 300, 2), batch)


def knowing(is_vjp):
    """Return (y, w) -> y, whose derivative rule gives nothing to y where w is no parameter: what equinox's loops do."""
    zero = jax.custom_derivatives.SymbolicZero

    def jvp(primals, tangents):
        (y, _), (dy, dw) = primals, tangents
        return y, jnp.zeros_like(y) if type(dw) is zero or type(dy) is zero else dy

    def forward(y, w):
        return y.value, (w.perturbed, w.value)

    def backward(kept, g):
        return jnp.where(kept[0], g, 0), jnp.zeros_like(kept[1])

    function = (jax.custom_vjp if is_vjp else jax.custom_jvp)(lambda y, w: y)
    if is_vjp:
        function.defvjp(forward, backward, symbolic_zeros=True)
    else:
        function.defjvp(jvp, symbolic_zeros=True)
    return function


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: square(knowing(False)(jnp.tanh(x @ w), w)),
        lambda w, x: square(layers(x, jnp.stack([w, w])) + knowing(False)(jnp.tanh(x @ w), 2 * w)),
        lambda w, x: square(lax.fori_loop(0, 2, lambda _, h: knowing(False)(jnp.tanh(h @ w), w), x)),
        lambda w, x: square(knowing(True)(jnp.tanh(x @ w), w)),
        lambda w, x: square(jax.checkpoint(lambda w, h: knowing(True)(jnp.tanh(h @ w), w))(w, x)),
        *nightly(
            lambda w, x: square(
                eqxi.while_loop(
                    lambda s: s[0] < 5,
                    lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)),
                    (0, x),
                    max_steps=8,
                    kind="checkpointed",
                )[1]
            ),
        ),
    ],
    ids=["once", "computed", "loop", "backward pass", "checkpoint", "equinox"],
)
def test_a_derivative_rule_that_asks_whether_the_weight_is_a_parameter(loss):
    check(loss, normal(0, 4, 4) / 2, normal(1, *X))


def test_such_a_rule_between_two_parameters_of_which_one_is_measured_apart():
    def loss(p, x):
        return square(jnp.sin(x @ p["b"])) + square(x @ knowing(False)(jnp.tanh(p["a"]), p["b"]))

    check(loss, {"a": normal(0, 4, 4), "b": normal(2, 4, 4)}, normal(1, *X))


def test_such_a_rule_of_two_parameters_and_an_example():
    @jax.custom_jvp
    def product(x, a, b):
        return x @ a @ b

    @partial(product.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        (x, a, b), (_, da, db) = primals, tangents
        zero = jax.custom_derivatives.SymbolicZero
        return x @ a @ b, jnp.zeros_like(x @ a @ b) if zero in (type(da), type(db)) else x @ da @ b + x @ a @ db

    check(lambda p, x: square(product(x, *p)), [normal(0, 4, 4), normal(2, 4, 4)], normal(1, *X))


def steps(n, body, x, start=0):
    return lax.fori_loop(start, start + n, body, x)


def branching(taken, other):
    """Return the loss of a loop whose first iteration takes the branch `other`."""
    return lambda w, x: square(
        steps(3, lambda i, h: lax.cond(i > 0, lambda: taken(w, i, h), lambda: other(w, i, h)), x)
    )


def countdown(w, x, wrapped=lambda step: step):
    def step(c, v):
        i, h = c
        return (i + 1, lax.cond(i > 0, lambda: h @ v / jnp.sqrt(i), lambda: h @ v)), None

    return square(lax.scan(wrapped(step), (0, x), w, reverse=True)[0][1])


def in_two_loops(w, x):
    def step(i, j, h):
        return lax.cond(j > i, lambda: h / (j - i), lambda: h @ w[j])

    return square(steps(2, lambda i, h: steps(2, partial(step, i), h), x))


@pytest.mark.parametrize(
    "loss",
    [
        branching(lambda w, i, h: jnp.tanh(h @ w[0]) / jnp.sqrt(i), lambda w, i, h: h @ w[0]),
        *nightly(
            branching(lambda w, i, h: h @ (w[0] / jnp.sqrt(i)), lambda w, i, h: h @ w[1]),
            branching(lambda w, i, h: h @ jnp.sqrt(i * w[0] ** 2), lambda w, i, h: h @ w[0]),
            branching(lambda w, i, h: w[0][:3] / jnp.where(i > 0, h, 0), lambda w, i, h: h @ w[0]),
            branching(jax.checkpoint(lambda w, i, h: h @ w[i] / jnp.sqrt(i)), lambda w, i, h: h @ w[i]),
            lambda w, x: square(
                steps(4, lambda i, h: lax.switch(i, [lambda h, v=v: jnp.tanh(h @ v) for v in w], h), x)
            ),
            countdown,
            partial(countdown, wrapped=jax.checkpoint),
            partial(countdown, wrapped=jax.jit),
            in_two_loops,
        ),
    ],
    ids=[
        "result",
        "scaled",
        "computed",
        "no rule",
        "checkpoint",
        "switch",
        "backwards",
        "checkpointed",
        "compiled",
        "two loops",
    ],
)
def test_a_branch_that_the_iteration_does_not_take_is_not_computed(loss):
    """In its place, it would be infinite."""
    check(loss, normal(0, 4, 4, 4), normal(1, *X))


def test_such_a_branch_in_shard_map():
    def loss(w, x):
        return square(lax.cond(flag > 0, lambda: jnp.tanh(x @ w[0]), lambda: x @ w[1]))

    def norms(w, x):
        return ghost.sq_norms(loss)(lax.pcast(w, "data", to="varying"), x).sq_norms

    flag, w, batch = jnp.asarray(1), normal(0, 2, 4, 4), normal(1, *X)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec("data")
    found = jax.jit(jax.shard_map(norms, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")))(w, batch)
    np.testing.assert_allclose(found, ghost.sq_norms(loss)(w, batch).sq_norms, rtol=1e-8)


@pytest.mark.parametrize("flag", [0, 1])
def test_a_branch_that_a_constant_does_not_take_is_not_computed(flag):
    flag = jnp.asarray(flag)
    scale = jnp.asarray([0.0, 1.0])

    def loss(p, x):
        return square(
            lax.cond(
                flag > 0, lambda: jnp.tanh(x @ p[0] / scale[flag]) + p[1], lambda: p[1] * x + p[2][jnp.argmax(x, 1)]
            )
        )

    check(loss, [normal(0, 4, 4), normal(1, 4), normal(2, 4, 4)], normal(3, *X))
    with jax.numpy_rank_promotion("allow"):
        rows = ghost.coverage(loss, [jnp.ones((4, 4)), jnp.ones(4), jnp.ones((4, 4))], jnp.ones(X[1:])).rows
    assert [rows[0][2], rows[2][2]] == ["dot_general", "gather"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: square(steps(4, lambda i, h: jnp.tanh(h @ w[3 - i]), x)),
        *nightly(
            lambda w, x: square(steps(4, lambda i, h: jnp.tanh(h @ w[i]), x)),
            lambda w, x: square(steps(2, lambda i, h: jnp.tanh(h @ w[2 * i] @ w[2 * i + 1]), x)),
            lambda w, x: square(steps(3, lambda i, h: jnp.tanh(h @ w[:, i]), x)),
            lambda w, x: square(lax.scan(lambda h, i: layer(h, w[i]), x, jnp.arange(4))[0]),
            lambda w, x: square(steps(2, lambda i, h: steps(2, lambda j, h: jnp.tanh(h @ w[2 * i + j]), h), x)),
            lambda w, x: square(steps(3, lambda i, h: jnp.tanh(h @ w[i]), x, start=1)),
            lambda w, x: square(layers(steps(4, lambda i, h: jnp.tanh(h @ w[i]), x), w)),
        ),
    ],
    ids=["backwards", "forwards", "two", "columns", "scan", "nested", "later", "and scanned"],
)
def test_slices_that_a_loop_takes_by_its_counter_are_measured_from_factors(loss):
    check(loss, normal(0, 4, 4, 4), normal(1, *X))
    [(_, _, method, _)] = ghost.coverage(loss, normal(0, 4, 4, 4), normal(1, *X[1:])).rows
    assert method == "dot_general"


def scanned(step, initial, xs):
    return square(lax.scan(lambda h, v: (step(h, v), None), initial, xs)[0])


def powers(w, x):
    return square(lax.scan(lambda c, r: ((c[0] * 2, jnp.tanh(c[1] @ w[c[0]] + r)), None), (1, x), x)[0][1])


def wrapping(w, x):
    start = jnp.asarray(250, jnp.uint8), x
    return square(lax.scan(lambda c, r: ((c[0] + 3, jnp.tanh(c[1] @ w[c[0]] + r)), c[0] * w[0, 0]), start, x)[1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: scanned(lambda h, v: jnp.tanh(h @ v @ w[0]), layers(x, w), w),
        lambda w, x: scanned(lambda h, v: steps(2, lambda i, h: jnp.tanh(h @ v @ w[:, i]), h), x, w),
        *nightly(
            lambda w, x: square(steps(3, lambda i, h: jnp.tanh(h @ w[i + 2]), x)),
            lambda w, x: square(steps(3, lambda i, h: jnp.tanh(h @ w[i - 1] @ w[i]), x)),
            lambda w, x: square(steps(4, lambda i, h: jnp.tanh(h @ w[i % 2]), x)),
            lambda w, x: scanned(lambda h, i: jnp.tanh(h @ w[i]), x, jnp.asarray([2, 0, 3])),
            lambda w, x: scanned(lambda h, v: steps(2, lambda i, h: h + jnp.tanh(h[i] * v[i]), h), x, w),
            lambda w, x: square(steps(0, lambda i, h: jnp.tanh(h @ w[i]), x @ w[0])),
            powers,
            wrapping,
        ),
    ],
    ids=[
        "closed over",
        "of both",
        "beyond the end",
        "shifted",
        "alternating",
        "listed",
        "of slices",
        "none",
        "powers",
        "wrapping",
    ],
)
def test_other_slices_that_a_loop_takes(loss):
    check(loss, normal(0, 4, 4, 4), normal(1, *X))


def settled(f, z, n=5):
    """Return f(f(..f(z))) by a loop that has no derivative."""
    return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, f(s[1])), (0, z))[1]


@partial(jax.jit, static_argnums=0)
def stopped(f, *args):
    return lax.stop_gradient(f(*args))


def in_a_scan(w, x):
    def step(h, r):
        z = settled(lambda z: jnp.tanh(r + z @ w), h)
        return jnp.tanh(r + lax.stop_gradient(z) @ w), z

    h, zs = lax.scan(step, jnp.zeros(4), x)
    return square(h) + square(lax.stop_gradient(zs) @ w)


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: square(jnp.tanh(x + lax.stop_gradient(settled(lambda z: jnp.tanh(x + z @ w), x)) @ w)),
        lambda w, x: square(jnp.tanh(x + stopped(lambda x, w: settled(lambda z: jnp.tanh(x + z @ w), x), x, w) @ w)),
        lambda w, x: square(x @ w) * stopped(jnp.sum, jax.jit(lambda x, w: settled(lambda z: jnp.sin(z @ w), x))(x, w)),
        lambda w, x: square(x @ w * (settled(lambda z: jnp.tanh(x + z @ w), x) > 0)),
        lambda w, x: square(x @ w) + jnp.argmax(settled(lambda z: jnp.tanh(x + z @ w), x)),
        lambda w, x: square(x @ w) + square(lax.stop_gradient(settled(jnp.sin, w)) @ w),
        in_a_scan,
        lambda w, x: square(jax.checkpoint(lambda x: x @ w * lax.stop_gradient(settled(lambda z: z @ w, x)))(x)),
    ],
    ids=["equilibrium", "inner", "after", "mask", "integer", "weight", "scan", "checkpoint"],
)
def test_what_reaches_the_loss_without_a_gradient_need_not_have_one(loss):
    check(loss, normal(0, 4, 4) / 2, normal(1, *X))


def nothing_to_convolve(w, x):
    """A kernel that is longer than the signal."""
    out = lax.conv_general_dilated(x[None], w, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.sum(out) + square(w) * x[0, 0]


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda w, x: square(jnp.tanh(x @ lax.optimization_barrier((w, 2.0))[0])), (4, 4)),
        (lambda w, x: square(jnp.tanh(x @ w) * lax.optimization_barrier((w, 2.0))[1]), (4, 4)),
        (nothing_to_convolve, (5, 4, 3)),
        (lambda w, x: square(x @ w) + square(w[x[:, :0].astype(int)]) + square(x[:0] @ w), (4, 4)),
        (lambda w, x: square(x @ w) + square(x[:0] + w[0]) + square(x[:0] * w[0]), (4, 4)),
        (lambda w, x: square(layers(x @ w[0], w[:0])), (2, 4, 4)),
        (
            lambda w, x: square(lax.scan(lambda h, _: (jnp.tanh(h @ w[0]), None), x @ w[1], None, length=0)[0]),
            (2, 4, 4),
        ),
        (lambda w, x: square(x @ w[0]) + square(lax.map(lambda v: v @ w[1], x[:0])), (2, 4, 4)),
    ],
    ids=["barrier", "literal", "convolution", "places", "entries", "no layers", "no steps", "no positions"],
)
def test_equations_with_literals_or_without_numbers(loss, shape):
    check(loss, normal(0, *shape), normal(1, *X))


def test_a_parameter_that_no_step_uses_has_no_gradient():
    def loss(p, x):
        return square(lax.scan(lambda h, _: (jnp.tanh(h @ p[0]), None), x @ p[1], None, length=0)[0])

    check(loss, [normal(0, 4, 4), normal(1, 4, 4)], normal(2, *X))


FROZEN = np.random.default_rng(0).normal(size=(3, 4, 4))


@pytest.mark.parametrize(
    ("loss", "shape", "method"),
    [
        (lambda w, x: square(jnp.tanh(x @ (w + FROZEN[0]))), (4, 4), "dot_general"),
        (lambda w, x: square(jnp.tanh(x @ (w + lax.stop_gradient(jnp.round(8 * w) / 8 - w)))), (4, 4), "dot_general"),
        (lambda w, x: square(jnp.tanh(x @ (FROZEN[0] - 2 * w)) @ (w - FROZEN[1]).T), (4, 4), "dot_general"),
        *nightly(
            (lambda w, x: square(jnp.tanh(x * (1 - w[0]) + x @ (1 + w).T)), (4, 4), "materialised"),
            (lambda w, x: scanned(lambda h, v: jnp.tanh(h @ (v[0] + v[1])), x, (w, FROZEN)), (3, 4, 4), "dot_general"),
            (lambda w, x: scanned(lambda h, v: jnp.tanh(h @ (w + v)), x, FROZEN), (4, 4), "materialised"),
            (lambda w, x: square(jnp.tanh(x @ (w + FROZEN[0]))), (4,), "materialised"),
            (lambda w, x: square(jnp.tanh(x @ (w + w))), (4, 4), "materialised"),
        ),
    ],
    ids=["added", "straight through", "minus", "entries too", "in step", "other steps", "repeated", "itself"],
)
def test_a_constant_that_is_added_to_a_parameter_leaves_its_gradient(loss, shape, method):
    check(loss, normal(0, *shape), normal(1, *X))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert ghost.coverage(loss, normal(0, *shape), normal(1, *X[1:])).rows[0][2] == method
