"""Builds the native extension with CMake and ninja; everything else about the package is in pyproject.toml.

It needs no torch, so it builds in pip's isolated build. Without a working C++ compiler the package installs
without the extension and runs on torch alone; ``HICACHE_FORCE_NATIVE_BUILD=1`` makes that an error, and
``HICACHE_SKIP_NATIVE_BUILD=1`` does not try. The CUDA kernels are part of it where nvcc is found:
csrc/cuda.cmake names the options. Without ``HICACHE_FORCE_CUDA_BUILD=1``, an nvcc that fails leaves the
CPU kernels. What CMake reads, it gets: ``CC``, ``CXX``, ``CFLAGS``, ``LDFLAGS``, ``CMAKE_…``; and
``CMAKE_ARGS`` on its command line.

``HICACHE_REPOSITORY_URL`` is where the repository is published. With it the README's links and pictures
work on a package index too; without it that copy has neither.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


# What compilers, linkers and CMake read of the environment; PATH by the tools that are found on it.
OPTIONS = (
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH",
    "GCC_EXEC_PREFIX", "COMPILER_PATH", "CUDA", "NVCC_", "CMAKE_", "HICACHE_",
)  # fmt: skip


def digest(environment: Mapping[str, str], *more: str) -> str:
    """Of all that decides what is built: sources, compilers and their versions, Python, options."""
    found = hashlib.sha256()
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]
    for path in sorted(path for path in sources if path.is_file()):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    chosen = sorted(item for item in environment.items() if item[0].startswith(OPTIONS))
    compilers = [*filter(None, map(environment.get, ("CC", "CXX", "CUDACXX"))), "c++", "g++", "clang++"]
    compilers += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    # pip puts CMake into another folder each time
    tools = [(place(tool, environment), version(tool, environment)) for tool in compilers]
    more = *more, version("ld", environment), version("cmake", environment)
    system = sys.version, sys.executable, sysconfig.get_platform()
    found.update(repr((chosen, tools, system, more)).encode())
    return found.hexdigest()[:16]


def place(command: str, environment: Mapping[str, str]) -> str | None:
    """The program that a command runs; None where there is none."""
    return shutil.which(shlex.split(command)[0], path=environment.get("PATH"))


def version(command: str, environment: Mapping[str, str]) -> str:
    """What a tool says of itself, if it is there: an upgrade leaves its path as it was."""
    path = place(command, environment)
    if path is None:
        return ""
    asked = [path, *shlex.split(command)[1:], "--version"]
    done = subprocess.run(asked, check=False, env=environment, capture_output=True, text=True)
    return str(done.stdout)


def long_description(repository: str | None) -> str:
    """The README for a package index, which has no files beside it: links are absolute, or are no links.

    Args:
        repository: where it is published, as ``https://HOST/OWNER/NAME``; None where it is not.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"(?!\w+:|#)([^)]+)\)"
    if repository is None:
        text = re.sub(r"!\[[^]]*\]\(" + relative + r"\n*", "", text)
        return re.sub(r"\[([^]]*)\]\(" + relative, r"\1", text)
    text = re.sub(r"(!\[[^]]*\])\(" + relative, rf"\1({repository}/raw/HEAD/\2)", text)
    return re.sub(r"(\[[^]]*\])\(" + relative, rf"\1({repository}/blob/HEAD/\2)", text)


class CleanBuild(build_py):
    """Starts from nothing: ``build/lib`` would go into the wheel with the modules of an earlier version."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in {name.split(".")[0] for name in self.packages or ()}:
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


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
            *shlex.split(environment.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        if target.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target, kept)


repository = os.environ.get("HICACHE_REPOSITORY_URL", "").rstrip("/") or None
setup(
    long_description=long_description(repository),
    long_description_content_type="text/markdown",
    project_urls={"Repository": repository} if repository else {},
    ext_modules=[Extension("hicache_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild},
)
