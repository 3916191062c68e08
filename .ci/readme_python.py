"""Run the Python blocks of README and of the pages in docs/, each as printed."""

import re
import subprocess
import sys
from pathlib import Path

for page in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks or page.name != "README.md", "README.md has no Python block"
    for block in blocks:
        print(f"{page}: {block.splitlines()[0]}", flush=True)
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True)
