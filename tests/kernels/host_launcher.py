"""The native extension built for a host in place of CUDA: csrc/ against ``cuda_on_host/``.

A launch there runs the kernel's threads one after the other, or is handed to Python.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "cuda_on_host"
COMPILER = shutil.which("g++") or shutil.which("c++")

# kernel, blocks, threads of a block, its arguments
LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


class Machine(ctypes.Structure):
    """``fake::machine``."""

    _fields_ = [
        ("blocks_a_processor", ctypes.c_int),
        ("backward", ctypes.c_int),
        ("fails", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("launched", LAUNCHED),
        ("launches", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("launched_on", ctypes.c_int),
        ("occupancy_asked", ctypes.c_int),
        ("errors_cleared", ctypes.c_int),
        ("misaligned", ctypes.c_int),
        ("stream", ctypes.c_size_t),
    ]

    def reset(self) -> None:
        """One block a multiprocessor; device n has n of them."""
        ctypes.memset(ctypes.addressof(self), 0, ctypes.sizeof(self))
        self.blocks_a_processor = 1
        self.fails = b""


@functools.cache
def build(folder: Path) -> tuple[ModuleType, Machine, Path]:
    """The extension's module, its machine and its file; built once a folder, by whoever comes first.

    Raises:
        subprocess.CalledProcessError: a compiler failed; what it said is in ``stderr``.
    """
    library = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(folder, library)
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handle = ctypes.CDLL(str(library))
    handle.machine.restype = ctypes.POINTER(Machine)
    return module, handle.machine().contents, library


def _compile(out: Path, library: Path) -> None:
    import pybind11

    common = [
        COMPILER, "-std=c++17", "-fPIC", "-O1", "-ffp-contract=off", "-fno-strict-aliasing",
        # counted by cuda_on_host/runtime.cpp: a 16-byte access anywhere else is an error on a GPU
        "-fsanitize=alignment",
        f"-I{FAKE}", "-include", "cuda_runtime.h", f"-I{ROOT / 'csrc' / 'include'}",
        f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}",
        "-DHICACHE_CUDA", "-DHICACHE_CUDA_ARCHS=80,90", "-DHICACHE_ISA=baseline", '-DHICACHE_ISA_NAME="host"',
    ]  # fmt: skip
    kernels = ROOT / "csrc" / "cuda_kernels.cu"
    units = [(f"{t}.o", kernels, [f"-DHICACHE_TYPE={t}"]) for t in ("float", "bf16", "fp16", "double")]
    units += [(f"{n}.o", ROOT / "csrc" / n, ["-O0"]) for n in ("bindings.cpp", "cuda.cpp", "cpu.cpp")]
    units += [("cpu_kernels.o", ROOT / "csrc" / "cpu_kernels.cpp", ["-O0"])]
    units += [("runtime.o", FAKE / "runtime.cpp", [])]

    def compile_unit(unit: tuple[str, Path, list[str]]) -> None:
        name, source, flags = unit
        command = [*common, *flags, "-x", "c++", "-c", str(source), "-o", str(out / name)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_unit, units))
    objects = [str(out / name) for name, *_ in units]
    unfinished = out / "unfinished"
    command = [str(COMPILER), "-shared", *objects, "-o", str(unfinished), "-pthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    unfinished.rename(library)
