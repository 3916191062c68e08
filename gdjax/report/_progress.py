"""A progress bar on standard error, where somebody looks at it.

>>> with progress_bar(total=3, unit="runs") as bar:  # this is no terminal: nothing is shown
...     _ = bar.update(1)
...     print(bar.disable)
True
"""

import contextlib
import sys
from typing import Any

import jax


class _Silent:
    """What `progress_bar` gives where tqdm is not installed."""

    disable, initial, n = True, 0, 0

    def update(self, n: float = 1) -> bool:
        return False

    def set_description_str(self, text: str) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...


def progress_bar(**options: Any) -> contextlib.AbstractContextManager[Any]:
    """Return tqdm's bar with these options of `tqdm.tqdm`, to be used in a `with` statement.

    It is silent where standard error is closed or is no terminal, in all processes but the first of several, and
    without tqdm.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return contextlib.nullcontext(_Silent())
    unseen = sys.stderr is None or jax.process_index() != 0
    # With `disable=None` tqdm asks whether it writes to a terminal.
    return tqdm(disable=True if unseen else None, file=sys.stderr, dynamic_ncols=True, **options)
