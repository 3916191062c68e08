"""Programs in the form that XLA compiles best: on a CPU products of two dimensions, and loops as one kernel.

The gradient of a dense layer over [B, T, D] is summed over two axes at once, which XLA does by copying a transpose,
three times as slow as the same sum over one axis of [B T, D]: `for_cpu` writes such products as products of matrices,
in the loops of `descent` by itself.

XLA compiles every operation of a loop to a kernel of its own, or a few together, and starts one after the other: at
batch size 1 a small network has some 25 of them in an update, and starting them takes a quarter of its time
(experiments/b1_race.py). `one_kernel` asks for one. Operations that XLA leaves to a library cannot be inside: products
of two matrices (hence, in most models, batches of more than one example), convolutions, sorting (hence, drawing a
stream). It is not done by itself: there are loops on which XLA's compiler does not refuse but ends the process, such
as one that carries a constant, and which these are is not known from their operations.

On a GPU `LOOPS_IN_GRAPHS` are compiler options that make a loop one launch. For a TPU `on_chip` makes one kernel of a
run, with its state on the chip: an experiment, compiled and never run there.

>>> import jax, jax.numpy as jnp
>>> one = one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ jnp.ones((2, 2)), x))
>>> jax.jit(one)(jnp.asarray([1.0, 2.0]))
Array([12., 12.], dtype=float32)
>>> "xla_cpu_small_call" in jax.jit(one).lower(jnp.ones(2)).as_text()
True
>>> gradient = lambda x, g: jnp.einsum("btd,bto->do", x, g)
>>> text = jax.jit(for_cpu(gradient)).lower(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5))).as_text()
>>> "(tensor<6x4xf32>, tensor<6x5xf32>) -> tensor<4x5xf32>" in text
True
"""

from gdjax.kernels._cpu import LOOPS_IN_GRAPHS, for_cpu, one_kernel
from gdjax.kernels._on_chip import on_chip

__all__ = ["LOOPS_IN_GRAPHS", "for_cpu", "on_chip", "one_kernel"]
