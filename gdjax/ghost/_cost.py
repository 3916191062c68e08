"""Which way to take squared norms from factors is the cheapest, from their shapes alone.

Factors A [B, K, T, I] and G [B, K, T, O] give the summed gradient A'G in any case. What the ways cost beside it:

    product      for T = 1: nothing to speak of
    gram         AA' and GG', for every example: T^2 (I + O) multiplications and T^2 numbers written and read; and a
                 branch, where A'G is formed after all
    in chunks    A'G formed for every example of a chunk, squared, and added up for the summed gradient: I O numbers

A chunk is as many examples as keep what has to be formed, the gradients and those numbers of A that are not yet in x
(the patches of a convolution), within a working set. On a CPU that is what the cache holds: beyond it, every number
goes to memory that the system has to provide first; and one example at a time leaves one of two cores idle.

Nanoseconds are linear in these counts. The coefficients for the CPU were fitted to measurements of the shapes of dense,
convolutional and attention layers (B from 32 to 128, T from 2 to 256, two cores); those for accelerators follow from a
bandwidth of 2 TB/s and 40 Tflop/s and have not been measured.
"""

from typing import NamedTuple

import jax

NANOSECONDS = {"cpu": (0.016, 1.3, 0.35, 5000.0), "accelerator": (5e-5, 8e-3, 4e-3, 0.0)}
"""Of a multiplication; of an entry in the Gram form; of a gradient's entry; of a chunk after the first, or a branch.

Those of a CPU were measured on two cores in November 2026, those of accelerators are guessed until one has been used.
"""
FEW = 2**6
"""Places in a table up to which all of an example are compared with all; more are sorted, at the price of so many."""
WORKING_SET = {"cpu": 2**21, "accelerator": 2**26, "rare": 2**16}
"""Numbers that a chunk may hold: 8 and 256 MiB in float32. Between 4 and 16 MiB the time on a CPU hardly changes.

A branch that is hardly ever taken holds 256 KiB, or one example.
"""


class Sizes(NamedTuple):
    """Of factors A [B, K, T, I] and G [B, K, T, O]; A is made of x numbers of an example, or holds one place in I."""

    b: int
    k: int
    t: int
    i: int
    o: int
    x: int
    is_index: bool = False


class Way(NamedTuple):
    """A way to take norms: 'product', 'gram' or 'in chunks', and the examples in a chunk (else 0)."""

    name: str
    chunk_size: int = 0


def fitting(batch_size: int, numbers: int, device: str) -> int:
    """Return B where the working set holds them all, else a power of two, which most batch sizes are a multiple of."""
    fits = max(WORKING_SET[device] // max(numbers, 1), 1)
    return batch_size if fits >= batch_size else 1 << fits.bit_length() - 1


def chunk_size(sizes: Sizes, device: str) -> int:
    """Return the number of examples whose gradients and patches the working set holds."""
    _, k, t, i, o, x, is_index = sizes
    return fitting(sizes.b, k * i * o + (0 if is_index else max(k * t * i - x, 0)), device)


def counts(sizes: Sizes, device: str) -> dict[str, tuple[int, int]]:
    """Return what `gram` and `in chunks` cost beside the summed gradient, in the units of NANOSECONDS."""
    b, k, t, i, o, _, is_index = sizes
    others = min(t, FEW) if is_index else t
    num_chunks = -(-b // chunk_size(sizes, device))
    return {
        "gram": (b * k * t * others * (o if is_index else i + o), b * k * t * others),
        "in chunks": (b * k * i * o, num_chunks - 1),
    }


def nanoseconds(sizes: Sizes, device: str) -> dict[str, float]:
    """Return the predicted cost of each way beside the summed gradient."""
    cost = NANOSECONDS[device]
    (products, entries), (formed, chunks) = counts(sizes, device).values()
    return {
        "gram": products * cost[0] + entries * cost[1] + cost[3],
        "in chunks": formed * cost[2] + chunks * cost[3],
    }


def cheapest(sizes: Sizes, device: str) -> Way:
    """Return the cheapest way on 'cpu' or 'accelerator' for factors of these sizes."""
    if sizes.t == 1:
        return Way("gram" if sizes.is_index else "product")
    cost = nanoseconds(sizes, device)
    if cost["gram"] < cost["in chunks"]:
        return Way("gram")
    return Way("in chunks", chunk_size(sizes, device))


def ways(sizes: Sizes) -> tuple[Way, Way]:
    """Return the cheapest way on a CPU and elsewhere."""
    return cheapest(sizes, "cpu"), cheapest(sizes, "accelerator")


def numbers(sizes: Sizes, device: str) -> int:
    """Return how many numbers the cheapest way holds beside a plain gradient."""
    b, k, t, i, o, x, is_index = sizes
    way = cheapest(sizes, device)
    if way.name == "in chunks":
        return way.chunk_size * (k * i * o + (0 if is_index else max(k * t * i - x, 0)))
    others = min(t, FEW) if is_index else t
    return b * k * t * others if way.name == "gram" else b


def device() -> str:
    """Return for which device a program is most likely traced."""
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"
