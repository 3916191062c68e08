"""Which way of measuring factors is cheapest, from their shapes alone."""


def cheapest(a_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> str:
    """Return 'product', 'gram', 'all' or 'one by one' for factors A [B, K, T, I] and G [B, K, T, O]."""
    _, _, t, i = a_shape
    o = g_shape[3]
    if t == 1:
        return "product"
    if i * o <= t * (i + o):
        return "all"
    if t * (i + o) < i * o:
        return "gram"
    return "one by one"
