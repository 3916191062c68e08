"""Ways to run the same updates, timed against one another and against what the device could do.

`compile_for` compiles them for a device that need not be there.
"""

from gdjax.bench._aot import program_for
from gdjax.bench._bench import BATCH_SIZES, bench, compared, measure
from gdjax.bench._forecast import compile_for
from gdjax.bench._models import MODELS, mlp
from gdjax.bench._variants import VARIANTS, Variant

__all__ = [
    "BATCH_SIZES",
    "MODELS",
    "VARIANTS",
    "Variant",
    "bench",
    "compared",
    "compile_for",
    "measure",
    "mlp",
    "program_for",
]
