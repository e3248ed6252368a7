"""Programs of the CUDA toolkit; a test that needs one that is not there is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """A program of the CUDA toolkit, Triton's or the system's."""
    try:
        import triton

        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    except ImportError:
        pass
    found = _found(name)
    if found is None:
        pytest.skip(f"no {name}: neither triton nor a CUDA toolkit is installed")
    return found


def nvcc() -> str:
    """The compiler, which Triton does not bring."""
    found = _found("nvcc")
    if found is None:
        pytest.skip("there is no nvcc")
    return found


def output(*command: str | Path) -> str:
    """What a program prints."""
    # cuobjdump looks for nvdisasm on the path
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _found(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
