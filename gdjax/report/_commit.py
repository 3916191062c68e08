"""Which commit a folder is at, asked of git so that nothing of the repository is run.

>>> commit(Path("/")) is None
True

A repository can name programs that git runs: a file-system monitor, hooks, filters of files, commands that show
differences or fetch what is missing. Somebody's checkout in which a command happens to be started is not to be trusted
with that, so each of them is switched off.
"""

import os
import subprocess
from pathlib import Path

SETTINGS = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "diff.external": "",
    "diff.ignoreSubmodules": "all",  # each of which has settings of its own
}
ENVIRONMENT = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}


def commit(folder: Path, tracks: str = "") -> str | None:
    """Return the commit that `folder` is at, with '-dirty' where files differ from it.

    None outside a repository, without git, and where the repository does not track the file named: an installed package
    may lie in somebody's checkout without being part of it.
    """
    settings = dict(SETTINGS)

    def git(*arguments: str, statuses: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        pairs = {"GIT_CONFIG_COUNT": f"{len(settings)}"}
        for i, (name, value) in enumerate(settings.items()):
            pairs |= {f"GIT_CONFIG_KEY_{i}": name, f"GIT_CONFIG_VALUE_{i}": value}
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=os.environ | ENVIRONMENT | pairs,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
        if done.returncode not in statuses:
            raise subprocess.SubprocessError(done.stderr)
        return done

    try:
        if tracks:
            git("ls-files", "--error-unmatch", tracks)
        head = git("rev-parse", "--verify", "HEAD").stdout.strip()
        filters = git("config", "--null", "--name-only", "--get-regexp", r"^filter\.", statuses=(0, 1)).stdout
        for name in filters.split("\0")[:-1]:
            settings[name] = "false" if name.endswith(".required") else ""
        differs = git("diff", "--quiet", "--no-ext-diff", "--no-textconv", "HEAD", statuses=(0, 1)).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "-dirty" * differs
