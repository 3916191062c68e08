"""Run the Python blocks of README and of the pages in docs/, each as printed, two at a time."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 2


def run(page: Path, block: str) -> None:
    """Run a block in a process of its own; raise where it fails."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", block], capture_output=True, text=True)
    print(f"{page}: {block.splitlines()[0]}\n{done.stdout}{done.stderr}", flush=True)
    done.check_returncode()


blocks = [
    (page, block)
    for page in (Path("README.md"), *sorted(Path("docs").glob("*.md")))
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
]
assert blocks[0][0].name == "README.md", "README.md has no Python block"
with ThreadPoolExecutor(AT_ONCE) as pool:
    list(pool.map(lambda each: run(*each), blocks))
