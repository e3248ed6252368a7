"""Scripts of tests/scripts, and modules, run in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tests" / "scripts"


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments`` with one thread, importing from ``cwd`` first; what it printed is kept."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def run_script(
    name: str, *arguments: str | Path, cwd: Path = ROOT, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of tests/scripts as :func:`run_python` does."""
    return run_python(SCRIPTS / name, *arguments, cwd=cwd, timeout=timeout, **environment)


def passed_interpreted(file: str) -> int:
    """How many of a file's tests called ``triton`` pass where Triton's kernels run on the CPU.

    Raises:
        AssertionError: one of them fails.
    """
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "triton")
    done = run_python(*options, timeout=900, TRITON_INTERPRET="1")
    found = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert found is not None, done.stdout[-4000:]
    return int(found[1])
