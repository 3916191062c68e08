"""The guides, executed: every docs/guides/NAME.py is a script, and becomes a notebook with its outputs and a page.

A guide that raises, or takes longer than LIMIT, fails the build of the site. What was executed is kept in build/guides
until the guide, or gdjax, changes.
"""

import hashlib
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "guides"
LIMIT = 360  # seconds, twice what a guide may take on two cores that do nothing else
AT_ONCE = 2

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plugin without its device would complain

log = logging.getLogger("mkdocs.plugins.guides")


class Guide(NamedTuple):
    """A guide's name, its page, its notebook, and the figures of the page by their names."""

    name: str
    page: str
    notebook: str
    figures: dict[str, bytes]


def guides() -> list[Guide]:
    """Return all guides, executed, in the order of their numbers."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_guide, sorted((ROOT / "docs" / "guides").glob("*.py"))))


def _guide(path):
    notebook = _executed(path)
    files = f"{path.stem}_files"
    page, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": files}
    )
    links = f"*One source: [script]({path.name}), [notebook]({path.stem}.ipynb), and this page, which CI executes.*"
    title, rest = page.lstrip().split("\n", 1)
    return Guide(path.stem, f"{title}\n\n{links}\n{rest}", nbformat.writes(notebook), resources["outputs"])


def _executed(path):
    """Return the notebook with its outputs: kept ones, if this guide and gdjax are those that made them."""
    sources = [path, *sorted((ROOT / "gdjax").rglob("*.py"))]
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
    kept = KEPT / f"{path.stem}-{digest[:16]}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # where it may write
        NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": folder}}).execute()
    seconds = time.perf_counter() - started
    log.info("%s executed in %.0f s", path.name, seconds)
    if seconds > LIMIT:
        log.warning("%s took %.0f s, more than %d", path.name, seconds, LIMIT)
    KEPT.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook
