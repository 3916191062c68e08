"""How far something is, on standard error: a bar for who looks, a line now and then for a log.

>>> with progress_bar(total=3, unit=" runs") as bar:  # no terminal, and too short for a line
...     _ = bar.update(1)
"""

import contextlib
import os
import sys
import time
from typing import Any

import jax

LINE_SECONDS = 30.0


class _Lines:
    """What `progress_bar` gives where nothing can be drawn: a line every half minute, as tqdm would say it."""

    disable = True

    def __init__(self, *, total: float, initial: float = 0, unit: str = "", desc: str = "", **_: Any):
        self.total, self.initial, self.n, self.unit = total, initial, initial, unit
        self.description, self.postfix = desc, ""
        self.began = self.said = time.monotonic()

    def update(self, n: float = 1) -> bool:
        self.n += n
        now = time.monotonic()
        if now - self.said < LINE_SECONDS:
            return False
        self.said = now
        share = f"{self.n / self.total:.0%}" if self.total else ""
        count = f"{self.n:.0f} of {self.total:.0f}{self.unit}" if self.unit else ""
        words = (share, count, self.description, self.postfix, f"after {now - self.began:.0f} s")
        with contextlib.suppress(OSError, ValueError):  # whom nobody hears
            print(", ".join(filter(None, words)), file=sys.stderr, flush=True)
        return True

    def set_description_str(self, text: str) -> None:
        self.description = text

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text


class _Silent(_Lines):
    def update(self, n: float = 1) -> bool:
        return False


def progress_bar(**options: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a progress bar with these options of `tqdm.tqdm`, to be used in a `with` statement.

    In a terminal and in a notebook it is tqdm's. Where standard error is a file or a pipe, or without tqdm, a line is
    printed every 30 seconds. It is silent where standard error is closed, in all processes but the first of several,
    and with tqdm's environment variable TQDM_DISABLE set, as `gdjax -q` does.
    """
    if (
        sys.stderr is None
        or getattr(sys.stderr, "closed", False)
        or os.environ.get("TQDM_DISABLE")
        or jax.process_index() != 0
    ):
        return contextlib.nullcontext(_Silent(**options))
    terminal = sys.stderr.isatty()
    if terminal or "ipykernel" in sys.modules:
        with contextlib.suppress(ModuleNotFoundError):
            from tqdm.auto import tqdm

            return tqdm(**options, **({"file": sys.stderr, "dynamic_ncols": True} if terminal else {}))
    return contextlib.nullcontext(_Lines(**options))
