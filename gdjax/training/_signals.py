"""Signals that ask a run to save and to end, and words for a standard error that may be gone."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not known on Windows


@contextlib.contextmanager
def received() -> Iterator[list[int]]:
    """Collect signals in a list, the first of them; another then ends the process as if nobody listened."""
    first: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield first
        return
    known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    # What the process was started to ignore, as `nohup` does with SIGHUP, it goes on to ignore.
    listened = [x for x in known if signal.getsignal(x) != signal.SIG_IGN]

    def receive(signum, frame):
        first.append(signum)
        for other in listened:
            signal.signal(other, signal.SIG_DFL)

    before = {signum: signal.signal(signum, receive) for signum in listened}
    try:
        yield first
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def tell(message: str) -> None:
    """Print a line on standard error, where there is one: it may be closed, or its terminal lost."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
