"""What is built from a checkout: the source distribution, the wheel, their README; what decides a rebuild."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hicache import __version__

ROOT = Path(__file__).parents[1]
URL = "https://example.org/somebody/hicache"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    setuptools = pytest.importorskip("setuptools", "77", reason="it builds with setuptools 77 and newer")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def tracked() -> list[str]:
    """Files under version control."""
    if shutil.which("git") is None:
        pytest.skip("no git, so what belongs into the source distribution is not known")
    done = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("no git checkout, so what belongs into the source distribution is not known")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture
def checkout(build: dict[str, Any], tmp_path: Path) -> Path:
    """A copy that nothing was built in."""
    for name in tracked():
        (tmp_path / "hicache" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "hicache" / name)
    return tmp_path / "hicache"


def make(kind: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``sdist`` or ``wheel`` of a checkout, without the extension."""
    monkeypatch.setenv("HICACHE_SKIP_NATIVE_BUILD", "1")
    script = f"import setuptools.build_meta as b; b.build_{kind}('out')"
    subprocess.run([sys.executable, "-c", script], cwd=checkout, check=True, capture_output=True)
    [made] = (checkout / "out").iterdir()
    return made


def test_the_source_distribution_has_all_that_its_tests_read(checkout, monkeypatch):
    with tarfile.open(make("sdist", checkout, monkeypatch)) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert not set(tracked()) - packed


def test_wheel(checkout, monkeypatch):
    """It has no module of an earlier version, and says where the project is published, if it is."""
    for package in ("hicache", "hicache_kernels"):
        stale = checkout / "build" / "lib" / package / "gone.py"
        stale.parent.mkdir(parents=True)
        stale.write_text("raise AssertionError")
    monkeypatch.setenv("HICACHE_REPOSITORY_URL", URL + "/")
    wheel = zipfile.ZipFile(make("wheel", checkout, monkeypatch))
    assert {"hicache/fast.py", "hicache/compare/templates/page.html.j2"} <= set(wheel.namelist())
    assert not [name for name in wheel.namelist() if name.endswith("gone.py")]
    text = wheel.read(f"hicache-{__version__}.dist-info/METADATA").decode()
    assert "Description-Content-Type: text/markdown\n" in text
    assert f"Project-URL: Repository, {URL}\n" in text
    assert f"({URL}/raw/HEAD/docs/demo.png)" in text
    assert {"all", "bench", "compare", "demo", "test"} <= set(
        re.findall(r"^Provides-Extra: (\w+)$", text, re.MULTILINE)
    )
    for package in ("transformers", "accelerate", "peft", "sentencepiece"):
        assert re.search(rf"^Requires-Dist: {package}.*extra == .all.$", text, re.MULTILINE), package


def test_the_index_gets_no_link_into_a_checkout(build):
    alone = build["long_description"](None)
    assert "docs/installing.md" in alone  # named still
    assert not re.findall(r"\]\((?!https?://)", alone)
    assert "![" not in alone
    published = build["long_description"](URL)
    assert not re.findall(r"\]\((?!https?://)", published)
    assert f"![Each pair: the full run and HiCache]({URL}/raw/HEAD/docs/demo.png)" in published
    assert f"]({URL}/blob/HEAD/docs/algorithm.md)" in published


# What makes an extension that was kept from an earlier build another one.


@pytest.fixture
def digest(build: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    compiler = tmp_path / "c++"

    def of(says: str = "c++ 12", **environment: str) -> str:
        compiler.write_text(f"#!/bin/sh\necho {says}\n")
        compiler.chmod(0o755)
        result = build["digest"]({"PATH": str(tmp_path), **environment})
        assert isinstance(result, str)
        return result

    return of


@pytest.mark.parametrize(
    "variable",
    [
        *("CC", "CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH"),
        *("CMAKE_ARGS", "CMAKE_BUILD_TYPE", "CMAKE_PREFIX_PATH", "CMAKE_TOOLCHAIN_FILE"),
        *("NVCC_PREPEND_FLAGS", "CUDAHOSTCXX", "HICACHE_CUDA_ARCHS"),
    ],
)
def test_an_option_is_another_build(digest, variable):
    assert digest() == digest(UNRELATED="1")
    assert digest(**{variable: "-DSOME=1"}) != digest()


def test_another_version_of_a_compiler_is_another_build(digest):
    assert digest() != digest("c++ 13")
    assert digest(CXX="c++ -m64") != digest("c++ 13", CXX="c++ -m64")


def test_the_same_cmake_elsewhere_is_the_same_build(build, tmp_path):
    """pip installs it into a new folder for every build."""
    found = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cmake = tmp_path / name / "cmake"
        cmake.write_text("#!/bin/sh\necho cmake version 4.0\n")
        cmake.chmod(0o755)
        found.add(build["digest"]({"PATH": str(cmake.parent)}))
    assert len(found) == 1


def test_arguments_reach_cmake(build, tmp_path, monkeypatch):
    from setuptools import Distribution

    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(subprocess, "run", run)
    builder = build["CMakeBuild"](Distribution({"packages": []}))
    builder.build_temp = str(tmp_path)
    builder.cmake(tmp_path / "_native.so", {"CMAKE_ARGS": "-DONE=1 '-DTWO=a b'"})
    [configure] = [command for command in commands if "-S" in command]
    assert configure[-2:] == ["-DONE=1", "-DTWO=a b"]
