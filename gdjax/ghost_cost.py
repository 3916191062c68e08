"""Which way to take squared norms from factors is the cheapest, from their shapes alone.

Factors A [B, K, T, I] and G [B, K, T, O] give the summed gradient A'G in any case. What the ways cost beside it:

    gram          AA' and GG', for every example: T^2 (I + O) multiplications and T^2 numbers written and read
    one by one    A'G of every example formed, squared and added up in turn: I O numbers
    all at once   the same, all B of them held in memory

Nanoseconds are linear in these counts. The coefficients for the CPU were fitted to measurements of the shapes of dense,
convolutional and attention layers (B from 32 to 256, T from 1 to 256, two cores); those for accelerators follow from a
bandwidth of 2 TB/s and 40 Tflop/s and have not been measured.
"""

NANOSECONDS = {"cpu": (0.0133, 4.0, 0.8, 1500.0), "accelerator": (5e-5, 8e-3, 4e-3, 0.0)}
"""Of a multiplication and of an entry in the Gram form; of a gradient's entry and of an example, formed one by one."""


def counts(a_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Return what `gram` and `one by one` cost beside the summed gradient, in the units of NANOSECONDS."""
    b, k, t, i = a_shape
    o = g_shape[3]
    return {"gram": (b * k * t * t * (i + o), b * k * t * t), "one by one": (b * k * i * o, b)}


def nanoseconds(a_shape: tuple[int, ...], g_shape: tuple[int, ...], device: str) -> dict[str, float]:
    """Return the predicted cost of each way beside the summed gradient."""
    cost = NANOSECONDS[device]
    (products, entries), (formed, examples) = counts(a_shape, g_shape).values()
    return {
        "gram": products * cost[0] + entries * cost[1],
        "one by one": formed * cost[2] + examples * cost[3],
    }


def cheapest(a_shape: tuple[int, ...], g_shape: tuple[int, ...], device: str) -> str:
    """Return 'product', 'gram', 'one by one' or 'all at once' for factors of these shapes on 'cpu' or 'accelerator'."""
    if a_shape[2] == 1:
        return "product"
    cost = nanoseconds(a_shape, g_shape, device)
    if cost["gram"] < cost["one by one"]:
        return "gram"
    return "one by one" if device == "cpu" else "all at once"
