"""A bar in a terminal, a line now and then in a log, silence where nobody can hear."""

import io
import sys

import jax

from gdjax import report


class Terminal(io.StringIO):
    def isatty(self):
        return True


def counted(monkeypatch, stderr, seconds=(), **options):
    """Update a bar of 4 after each of these seconds; return what standard error has got."""
    clock = iter((0.0, *seconds))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stderr)
    with report.progress_bar(total=4, unit=" runs", **options) as bar:
        for _ in seconds:
            bar.set_description_str("tuning")
            bar.update(1)
    return stderr.getvalue()


def test_a_log_gets_a_line_every_half_minute(monkeypatch):
    lines = counted(monkeypatch, io.StringIO(), (10.0, 31.0, 40.0, 70.0)).splitlines()
    assert lines == ["50%, 2 of 4 runs, tuning, after 31 s", "100%, 4 of 4 runs, tuning, after 70 s"]


def test_what_was_there_before_counts(monkeypatch):
    assert counted(monkeypatch, io.StringIO(), (31.0,), initial=2).startswith("75%, 3 of 4 runs")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    with report.progress_bar(total=4, unit=" runs") as bar:
        bar.update(4)
    assert "100%" in stderr.getvalue()
    assert "\r" in stderr.getvalue()


def test_the_other_processes_and_a_closed_standard_error_are_silent(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        with report.progress_bar(total=1) as bar:
            assert not bar.update(1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not counted(monkeypatch, io.StringIO(), (31.0,))
