"""Ways to run the same updates, timed against one another and against what the device could do."""

from gdjax.bench._bench import BATCH_SIZES, BUDGET, MODELS, bench, compared, measure, mlp
from gdjax.bench._variants import VARIANTS, Variant

__all__ = [
    "BATCH_SIZES",
    "BUDGET",
    "MODELS",
    "VARIANTS",
    "Variant",
    "bench",
    "compared",
    "measure",
    "mlp",
]
