"""The host's side of a run: it waits for programs, keeps the history, shows how far it is, saves, and ends the run."""

import collections
import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gdjax import report
from gdjax.training import _feeding, _progress, _signals
from gdjax.training._checkpoint import Checkpoints
from gdjax.training._feeding import Cut, Plan
from gdjax.training._updates import Carry, Output, Program

POLL_SECONDS = 1e-3
PROGRESS_SECONDS = 2.0  # between two writings of the file that `progress` reads


class Journal:
    """What is known on the host of a run under way.

    That is the plan of the run; the names of the rules, and last of the budget; the history, a pytree of arrays of
    which `num_records` entries are filled in; how many updates and records are done; and the position in `names` of the
    rule that held, or the last.
    """

    def __init__(self, plan: Plan, names: tuple[str, ...], history: Any, *, done: int, num_records: int, rule: int):
        self.plan, self.names, self.history = plan, names, history
        self.num_updates, self.num_records, self.rule = done, num_records, rule

    @property
    def stopped(self) -> bool:
        """Whether a rule has held."""
        return self.rule < len(self.names) - 1

    def collect(self, cut: Cut, output: Output) -> float:
        """Wait for a program, write its records into the history, and return its last loss."""
        for leaf in jax.tree.leaves(output):
            while not leaf.is_ready():  # not `block_until_ready`, during which no signal would be seen
                time.sleep(POLL_SECONDS)
        # As arrays of NumPy: `losses[-1]` would be a program of its own, queued behind the next one.
        output = jax.tree.map(np.asarray, output)
        held = np.flatnonzero(output.rules < len(self.names) - 1)
        num_blocks = int(held[0]) + 1 if held.size else cut.blocks
        self.num_updates = cut.first + num_blocks * cut.length
        self.rule = int(output.rules[num_blocks - 1])
        if cut.recorded:
            first = cut.first // self.plan.every
            self.num_records = first + num_blocks

            def write(whole, piece):
                whole[first : self.num_records] = piece[:num_blocks]

            jax.tree.map(write, self.history, output.records)
        return float(output.losses[num_blocks - 1])

    def so_far(self) -> Any:
        """Return the history that is filled in."""
        return jax.tree.map(lambda x: x[: self.num_records], self.history)


def loop(
    program: Program,
    inputs: Iterator[Any],
    carry: Carry,
    journal: Journal,
    checkpoints: Checkpoints | None,
    checkpoint_seconds: float,
    received: list[int],
) -> Carry:
    """Run the programs. One is queued behind the one under way, so that the device need not wait for the host."""
    plan, reporter = journal.plan, _Reporter(journal, checkpoints)
    under_way: collections.deque[tuple[Cut, Output]] = collections.deque()

    def collect() -> None:
        cut, output = under_way.popleft()
        if not journal.stopped:  # or the program had nothing to do
            reporter.show(journal.collect(cut, output))

    with contextlib.closing(reporter):
        for cut in plan.cuts(journal.num_updates):
            carry, output = program(carry, next(inputs), cut)
            under_way.append((cut, output))
            if len(under_way) > 1:
                collect()
            signum, stopped = _agreed(received, journal.stopped)
            ends = bool(signum or stopped or cut.end == plan.num_updates)
            if not ends and time.monotonic() - reporter.saved_at < checkpoint_seconds:
                continue
            while under_way:
                collect()
            reporter.save(carry)
            if signum:
                reporter.interrupt(signum)
            if ends:
                reporter.report(journal.names[journal.rule])
                break
    return carry


class _Reporter:
    """Tells what a journal holds: to the terminal, to the file that `progress` reads, and to checkpoints."""

    def __init__(self, journal: Journal, checkpoints: Checkpoints | None):
        self.journal, self.checkpoints = journal, checkpoints
        self.saved_at = self.began = time.monotonic()
        self.saved = self.updates_shown = journal.num_updates
        self.before = 0.0 if checkpoints is None else _progress.seconds(checkpoints.folder)
        self.bar, self.shown = None, contextlib.ExitStack()
        options = {"total": journal.plan.num_updates, "initial": journal.num_updates, "unit": " updates"}
        with contextlib.suppress(OSError, ValueError):  # of a terminal that is lost
            self.bar = self.shown.enter_context(report.progress_bar(**options))
        self.report()

    def show(self, loss: float) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                self.bar.update(self.journal.num_updates - self.updates_shown)
                self.updates_shown = self.journal.num_updates
        if time.monotonic() - self.reported_at >= PROGRESS_SECONDS:
            self.report()

    def report(self, ended: str | None = None) -> None:
        self.reported_at = time.monotonic()
        if self.checkpoints is None:
            return
        past = self.journal.so_far()
        _progress.write(
            self.checkpoints.folder,
            num_updates=self.journal.num_updates,
            total=self.journal.plan.num_updates,
            seconds=self.before + self.reported_at - self.began,
            record=jax.tree.map(lambda x: x[-1], past.last) if self.journal.num_records else None,
            ended=ended,
        )

    def save(self, carry: Carry) -> None:
        if self.checkpoints is not None and self.saved != self.journal.num_updates:
            history = _feeding.to_names("history", self.journal.so_far())
            history["num_records"] = np.asarray(self.journal.num_records)
            to = _feeding.as_data if self.checkpoints.like else _feeding.to_host
            self.checkpoints.save(self.journal.num_updates, _feeding.to_names("run", carry, to=to) | history)
            self.saved = self.journal.num_updates
            self.report()
        self.saved_at = time.monotonic()

    def interrupt(self, signum: int) -> NoReturn:
        name = signal.Signals(signum).name
        if self.checkpoints is not None:
            self.checkpoints.finish()
            self.report(name)
            _signals.tell(
                f"gdjax: {name} after update {self.journal.num_updates} of {self.journal.plan.num_updates}; saved in "
                f"{self.checkpoints.folder}, from where the same call goes on"
            )
        raise SystemExit(128 + signum)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.shown.close()


def _agreed(received: list[int], stopped: bool) -> tuple[int, bool]:
    """Return the signal to end for, or 0, and whether a rule has. Several processes must end at the same update.

    One that has been told, or that waited for a program earlier than the others, knows it before them.
    """
    known = np.asarray([received[0] if received else 0, stopped], np.int32)
    if jax.process_count() > 1:
        known = np.reshape(multihost_utils.process_allgather(known), (-1, 2)).max(axis=0)
    return int(known[0]), bool(known[1])
