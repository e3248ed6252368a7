"""Builds the native extension with CMake and ninja; everything else about the package is in pyproject.toml.

It needs no torch, so it builds in pip's isolated build. Without a working C++ compiler the package installs
without the extension and runs on torch alone; ``HICACHE_FORCE_NATIVE_BUILD=1`` makes that an error, and
``HICACHE_SKIP_NATIVE_BUILD=1`` does not try. The CUDA kernels are part of it where nvcc is found:
csrc/cuda.cmake names the options. Without ``HICACHE_FORCE_CUDA_BUILD=1``, an nvcc that fails leaves the
CPU kernels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def digest(environment: Mapping[str, str], *more: str) -> str:
    """Of all that decides what is built: sources, compilers, Python, options."""
    found = hashlib.sha256()
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]
    for path in sorted(path for path in sources if path.is_file()):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    options = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "HICACHE_")
    chosen = sorted(item for item in environment.items() if item[0].startswith(options))
    tools = [shutil.which(name, path=environment.get("PATH")) for name in ("nvcc", "c++", "g++", "clang++")]
    found.update(repr((chosen, tools, sys.version, sys.executable, sysconfig.get_platform(), more)).encode())
    return found.hexdigest()[:16]


class CMakeBuild(build_ext):
    """Hands the extension to CMake. It is marked optional, so that setuptools accepts its absence."""

    def build_extension(self, ext: Extension) -> None:
        if flag("HICACHE_SKIP_NATIVE_BUILD"):
            print("hicache: HICACHE_SKIP_NATIVE_BUILD=1: no native extension", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cpu_only = flag("HICACHE_SKIP_CUDA_BUILD")
        forced_cuda = flag("HICACHE_FORCE_CUDA_BUILD")
        try:
            try:
                self.cmake(target, os.environ)
            except subprocess.CalledProcessError as error:
                if cpu_only or forced_cuda:
                    raise
                print(f"hicache: the build failed, trying again without CUDA: {error}", file=sys.stderr)
                self.cmake(target, {**os.environ, "HICACHE_SKIP_CUDA_BUILD": "1"})
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if flag("HICACHE_FORCE_NATIVE_BUILD") or forced_cuda:
                raise
            print(f"hicache: built without the native extension: {error}", file=sys.stderr)

    def cmake(self, target: Path, environment: Mapping[str, str]) -> None:
        import pybind11

        # A minute and a half with CUDA, and make installs three times: what was built of the same is kept.
        kept = ROOT / "build" / f"native-{digest(environment, pybind11.__version__)}" / target.name
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            shutil.copy2(kept, target)
            return
        # From nothing: an older cache names the ninja of a build environment that is gone.
        build = (Path(self.build_temp) / "native").resolve()
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        if target.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target, kept)


setup(
    ext_modules=[Extension("hicache_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
