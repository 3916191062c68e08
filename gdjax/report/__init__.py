"""Run folders with provenance, and the style of figures."""

from gdjax.report._figures import (
    COLOURS,
    LINES,
    agreement,
    band,
    bars,
    blank,
    check_installed,
    curves,
    log_scales,
    panels,
    save,
)
from gdjax.report._journal import Journal, journal
from gdjax.report._progress import progress_bar
from gdjax.report._records import provenance, run_folder, timestamped

__all__ = [
    "COLOURS",
    "LINES",
    "Journal",
    "agreement",
    "band",
    "bars",
    "blank",
    "check_installed",
    "curves",
    "journal",
    "log_scales",
    "panels",
    "progress_bar",
    "provenance",
    "run_folder",
    "save",
    "timestamped",
]
