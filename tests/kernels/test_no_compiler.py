"""Triton compiles what it launches with: where it cannot, that is found out before a run, and said.

In processes of their own, over a stub of libcuda: Triton's real driver is built, or is not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import stub_driver

triton = pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "triton_without_compiler.py"
ONE_LAUNCHER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
needs_native = pytest.mark.skipif(
    not list((ROOT / "hicache_kernels").glob("_native*.so")), reason="the native extension is not built"
)

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or bool(os.environ.get("TRITON_INTERPRET")), reason="no gcc, or interpreted"
)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub_driver.build(tmp_path_factory.mktemp("stub"), "gcc").parent


def told(stub: Path, cache: Path, built: str = "native", **environment: str) -> dict[str, Any]:
    """What the script says, with this cache of Triton's and this environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(stub), built],
        env={**inherited, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_native
def test_without_a_compiler_auto_goes_on_and_a_name_is_refused(stub, tmp_path):
    nothing = tmp_path / "bin"
    nothing.mkdir()
    found = told(stub, tmp_path, PATH=str(nothing))
    why = "Triton builds its launcher with a C compiler, and there is none: install gcc or clang"
    assert found["triton"].startswith(why)
    assert found["auto"] == "native"
    assert found["words"].startswith(f"native (not triton: {why}")
    assert found["told"]["auto"] == "cached"
    assert found["told"]["triton"].startswith(f"hicache: backend 'triton' cannot run: {why}")
    assert found["left"] == []


def test_without_cuda_in_the_extension_the_reference_is_left(stub, tmp_path):
    found = told(stub, tmp_path, "no CUDA", CC=str(tmp_path / "nowhere"))
    assert "and CC=" in found["triton"]
    assert found["auto"] == "reference"
    assert "not triton: " in found["words"]
    assert "not native: " in found["words"]


@pytest.mark.slow
def test_with_a_compiler_triton_is_built_at_apply_and_found_later(stub, tmp_path):
    found = told(stub, tmp_path)
    assert (found["triton"], found["auto"], found["words"]) == (None, "triton", "triton")
    assert found["told"] == {"auto": "cached", "triton": "cached"}
    assert list(tmp_path.rglob("cuda_utils*.so"))
    later = told(stub, tmp_path, CC=str(tmp_path / "nowhere"))
    # up to 3.6 every signature of a kernel has a launcher of its own, which would still have to be built
    assert (later["triton"] is None) == ONE_LAUNCHER


@pytest.mark.slow
def test_a_compiler_that_fails_is_named(stub, tmp_path):
    found = told(stub, tmp_path, CC=shutil.which("false"))
    assert found["triton"].startswith("Triton cannot build its launcher: ")
    assert "false failed with status 1" in found["triton"]
    assert found["auto"] != "triton"
