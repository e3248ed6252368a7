"""Triton's compiler and launcher over a driver that does nothing: the host's part of a launch."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path, compiler: str = "cc") -> Path:
    """Compile the stub of libcuda into a folder: its file.

    Raises:
        OSError, subprocess.CalledProcessError: the compiler is not there, or fails.
    """
    library = folder / "libcuda.so.1"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Have this process and Triton take the stub for libcuda; ``stub_launches()`` of it counts launches."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    # modules that Triton builds find it in the process, by its soname
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def activate(capability: tuple[int, int] = (9, 0)) -> Any:
    """Make Triton's NVIDIA driver the active one, over the stub of :func:`load`, with one device.

    Tensors stay on the CPU: nothing reads them.
    """
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    driver.get_device_capability = lambda device=0: capability
    driver.get_current_stream = lambda device: 0
    triton.runtime.driver.set_active(driver)
    return driver
