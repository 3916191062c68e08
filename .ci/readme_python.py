"""Run the README's Python blocks, each as printed."""

import re
import subprocess
import sys
from pathlib import Path

blocks = re.findall(r"^```python\n(.*?)^```", Path("README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
assert blocks, "README.md has no Python block"
for block in blocks:
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True)
