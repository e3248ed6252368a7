"""Builds ``hicache_kernels/_native`` in place where it is missing: with CMake and ninja, else by hand.

By hand means the compilers alone, for a machine that has nvcc and pybind11 but no CMake; flags are those of
CMakeLists.txt and csrc/cuda.cmake.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ISAS = {"baseline": [], "avx2": ["-mavx2", "-mf16c"], "avx512": ["-mavx512f", "-mavx512bw"]}
_VECTORS = {"avx512": ["-mprefer-vector-width=512"]}


class BuildError(RuntimeError):
    """The extension could not be built; the message says why."""


def status(device: str) -> str | None:
    """Ask in a fresh process why the native backend cannot run on a device; None when it can."""
    script = (
        "import torch; from hicache_kernels.backends import native; "
        f"print(native.unavailable(torch.device({device!r})) or '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return done.stdout.strip() or None


def nvcc() -> str | None:
    """Find the CUDA compiler where CMake looks for it too."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    paths = [f"{home}/bin" for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(paths))


def build(arch: str | None, timeout: float = float("inf")) -> str:
    """Build the extension and put it in place; return how it was done.

    Args:
        arch: compute capability to compile for, such as ``"90"``; None builds for the CPU alone.
        timeout: seconds, after which no more is tried.

    Raises:
        BuildError: neither way worked in time.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="hicache-build-") as folder:
        build_dir = Path(folder)
        reasons = []
        for name, way in (("CMake", _with_cmake), ("the compilers alone", _by_hand)):
            try:
                made = way(build_dir, arch, deadline)
            except (BuildError, OSError, ImportError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", None) or ""
                reasons.append(f"{name}: {error} {output[-500:]}".strip())
                continue
            # replaced whole: another process may have the old one open
            target = ROOT / "hicache_kernels" / made.name
            staged = target.with_suffix(".new")
            shutil.copy(made, staged)
            staged.replace(target)
            return name
    raise BuildError("; ".join(reasons))


def _run(command: Sequence[str | Path], deadline: float, **environment: str) -> None:
    """Run a command; at the deadline, kill it and every process it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    left = deadline - time.monotonic()
    try:
        output, errors = process.communicate(timeout=None if left == float("inf") else max(left, 0.1))
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BuildError(f"out of time: {Path(command[0]).name}") from error
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [*map(str, command)], output, errors)


def _with_cmake(build_dir: Path, arch: str | None, deadline: float) -> Path:
    import pybind11

    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        raise BuildError("no cmake or no ninja")
    cuda = {"HICACHE_SKIP_CUDA_BUILD": "1"} if arch is None else {"HICACHE_CUDA_ARCHS": arch}
    _run(
        [cmake, "-G", "Ninja", "-S", ROOT, "-B", build_dir, f"-DPython_EXECUTABLE={sys.executable}",
         f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        deadline, **cuda,
    )  # fmt: skip
    _run([cmake, "--build", build_dir], deadline)
    [made] = build_dir.glob("_native*.so")
    return made


def compile_commands(build_dir: Path, arch: str | None) -> dict[str, list[str]]:
    """Return object file → the command that makes it."""
    import pybind11

    csrc = ROOT / "csrc"
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if cxx is None:
        raise BuildError("no C++ compiler")
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = ["-std=c++17", "-O3", f"-I{csrc / 'include'}"]
    definitions = ["-DHICACHE_X86"] if x86 else []
    if arch is not None:
        definitions += ["-DHICACHE_CUDA", f"-DHICACHE_CUDA_ARCHS={arch}"]
    host = [cxx, *common, "-fPIC", "-fvisibility=hidden", *definitions]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    commands = {
        "bindings.o": [*host, *python, "-c", str(csrc / "bindings.cpp")],
        "cpu.o": [*host, "-c", str(csrc / "cpu.cpp")],
    }
    for isa in _ISAS if x86 else ("baseline",):
        flags = [*_ISAS[isa], *_VECTORS.get(isa, []), "-ffp-contract=off", "-Wno-psabi"]
        names = [f"-DHICACHE_ISA={isa}", f'-DHICACHE_ISA_NAME="{isa}"']
        commands[f"kernels_{isa}.o"] = [*host, *flags, *names, "-c", str(csrc / "cpu_kernels.cpp")]
    if arch is not None:
        compiler = nvcc()
        if compiler is None:
            raise BuildError("no nvcc")
        device = [compiler, *common, "-ccbin", cxx, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        device += [*definitions, "--fmad=false", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        commands["cuda.o"] = [*device, "-c", str(csrc / "cuda.cpp")]
        for kind in ("float", "bf16", "fp16", "double"):
            source = str(csrc / "cuda_kernels.cu")
            commands[f"cuda_{kind}.o"] = [*device, f"-DHICACHE_TYPE={kind}", "-c", source]
    return {
        str(build_dir / name): [*command, "-o", str(build_dir / name)] for name, command in commands.items()
    }


def _by_hand(build_dir: Path, arch: str | None, deadline: float) -> Path:
    commands = compile_commands(build_dir, arch)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(functools.partial(_run, deadline=deadline), commands.values()))
    made = build_dir / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if arch is None:
        [compiler] = {command[0] for command in commands.values()}
        link = [compiler, "-shared", "-pthread"]
    else:
        link = [str(nvcc()), "-shared", "-cudart", "static", "-Xcompiler", "-pthread"]
    _run([*link, *commands, "-o", made], deadline)
    return made
