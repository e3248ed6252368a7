"""hicache as it was at another commit, for commands that compare the two."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run_at(commit: str, *arguments: str) -> str:
    """What ``python -m`` prints with both packages of another commit, and all else as it is here.

    Native extensions are not built for it.

    Args:
        commit: of this repository, as git knows it.
        *arguments: the module, and its arguments.

    Raises:
        SystemExit: there is no such commit, or the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", commit, "hicache", "hicache_kernels"]
        archive = subprocess.run(command, capture_output=True, check=False)
        if archive.returncode:
            raise SystemExit(f"{commit}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        # the working folder comes first of all, then this tree for the rest
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} fails at {commit}")
    return done.stdout
