"""Triton's runtime: whether it can launch here, and launches that bind nothing anew.

Names that Triton does not document stand in this module alone; they are those of Triton 3.6 and 3.7.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

try:
    triton: Any = importlib.import_module("triton")
    MISSING: str | None = None
except ImportError as error:
    triton = None
    MISSING = f"triton is not installed ({error})"

_MOST: Final = 1024  # launches that a kernel remembers; all are forgotten when there are more
_ALIGNED: Final = 16  # bytes: Triton compiles another kernel for addresses that are multiples of it


def cannot_launch() -> str | None:
    """Why no kernel can be launched on a GPU by this process; None when one can. Found out once.

    Triton compiles its own part of a launch, in C, when it is first needed. Where there is a GPU it is made
    to do so here, so that nothing is left to fail at the first launch; elsewhere only a compiler is looked
    for.
    """
    return _driver_lacks() if torch.cuda.is_available() else _compiler_lacks()


@functools.cache
def _driver_lacks() -> str | None:
    """Why Triton's driver cannot launch; None when it can. It builds what it needs, or finds it built."""
    try:
        utilities = triton.runtime.driver.active.utils
    except Exception as error:  # of a compiler, a linker, a loader or a file system
        return _compiler_lacks() or f"Triton cannot build its launcher: {_words(error)}"
    if hasattr(utilities, "launch"):
        return None
    # Triton 3.6 builds a launcher for every signature of a kernel: what is in its cache is not all
    return _compiler_lacks()


@functools.cache
def _compiler_lacks() -> str | None:
    """Why Triton would not find what it builds its launcher with; None when it would."""
    if triton.knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    wanted = "install gcc or clang (on Debian: apt-get install gcc libc6-dev), or name a compiler in CC"
    if named is not None and shutil.which(named) is None:
        return f"Triton builds its launcher with a C compiler, and CC={named!r} is none: {wanted}"
    if named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return f"Triton builds its launcher with a C compiler, and there is none: {wanted}"
    headers = Path(sysconfig.get_path("include", _scheme()))
    if not (headers / "Python.h").exists():
        return (
            f"Triton builds its launcher with Python's headers, and {headers} has no Python.h: install them "
            "(on Debian: apt-get install python3-dev)"
        )
    return None


def _scheme() -> str:
    """Where Triton looks for Python's headers."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def _words(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed with status {error.returncode}, and said why on stderr"
    return f"{type(error).__name__}: {error}"


class Launcher:
    """Launches one kernel, and remembers what Triton compiled for the arguments of a launch.

    ``kernel[grid](...)`` binds, specialises and compares all arguments at every call; that takes longer than
    the launch itself. Here a launch of known numbers, dtypes and alignments is one look-up away from it.

    Args:
        kernel: of ``triton.jit``; its parameters are pointers, then numbers, then constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiles = isinstance(kernel, triton.runtime.JITFunction)  # else it is interpreted
        self._known: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: int,
        pointers: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        options: tuple[tuple[str, int | bool], ...],
    ) -> None:
        """Launch it on the current stream of the current device.

        Args:
            grid: programs.
            pointers: tensors on that device, or None.
            numbers: of the launch.
            constants: what is compiled in.
            options: what it is compiled with, by name.
        """
        runtime = triton.knobs.runtime
        if not self._compiles or self.kernel.pre_run_hooks or _watched(runtime):
            self.kernel[(grid,)](*pointers, *numbers, *constants, **dict(options))
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        key = (
            driver, device, runtime.debug, runtime.add_stages_inspection_hook, numbers, constants, options,
            *[None if tensor is None else tensor.dtype for tensor in pointers],
            *[address % _ALIGNED for address in addresses],
        )  # fmt: skip
        compiled = self._known.get(key)
        if compiled is None:
            compiled = self.kernel[(grid,)](*pointers, *numbers, *constants, **dict(options))
            if _goes_by_address(compiled):
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = compiled
            return
        compiled.run(
            grid, 1, 1, driver.get_current_stream(device), compiled.function, compiled.packed_metadata,
            None, None, None,  # of launches that a profiler watches
            *addresses, *numbers, *constants,
        )  # fmt: skip


def _goes_by_address(compiled: Any) -> bool:
    """Whether dtypes, alignments and numbers are all that a kernel was compiled for.

    Not an AMD GPU's: those are compiled for the bytes of a tensor too, of which an address says nothing.
    """
    return isinstance(compiled, triton.compiler.CompiledKernel) and compiled.metadata.target.backend == "cuda"


def _watched(runtime: Any) -> bool:
    """Whether a profiler is told of launches: it gets them the whole way."""
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
