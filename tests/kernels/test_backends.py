"""What a backend must have, that the ones there have it, and what adding one takes."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hicache_kernels
from hicache_kernels import BACKENDS, backends
from hicache_kernels.backend import Backend

PACKAGE = Path(hicache_kernels.__file__).parent
MEMBERS = [name for name in vars(Backend) if not name.startswith("_") and name != "name"]
SCRIPTS = Path(__file__).parent / "scripts"


def test_the_protocol_has_the_ops():
    assert set(MEMBERS) == {
        "unavailable", "unsupported", "update_", "forecast", "update_forecast_", "gated_sum",
    }  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_takes_what_the_protocol_says(name, member):
    """By name and order; mypy compares the types as well."""
    _, *expected = inspect.signature(getattr(Backend, member)).parameters
    assert list(inspect.signature(getattr(BACKENDS[name], member)).parameters) == expected
    assert getattr(BACKENDS[name], member).__doc__, f"{name}.{member} says nothing"


@pytest.mark.parametrize("wrong", [{}, {"name": "another"}], ids=["incomplete", "misnamed"])
def test_what_is_no_backend_is_refused(wrong, monkeypatch):
    whole = {} if not wrong else dict.fromkeys(MEMBERS, print)
    module = SimpleNamespace(__name__="hicache_kernels.backends.wrong", **whole, **wrong)
    monkeypatch.setattr(backends, "NAMES", ("wrong",))
    monkeypatch.setattr(backends, "import_module", lambda path: module)
    with pytest.raises(
        TypeError, match=r"hicache_kernels\.backends\.wrong: expected a backend called 'wrong'"
    ):
        backends.load()


def test_a_new_backend_is_a_module_and_a_line(tmp_path):
    copy = tmp_path / "hicache_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SCRIPTS / "doubling.py", copy / "backends")
    table = copy / "backends" / "__init__.py"
    before = table.read_text()
    after = before.replace('"triton")', '"triton", "doubling")')
    table.write_text(after)
    changed = [
        pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]
    ]
    assert len(changed) == 1
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "use_doubling.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_backend_that_cannot_run_on_a_gpu_leaves_the_others_tested(monkeypatch: pytest.MonkeyPatch):
    """Without nvcc, ``pytest -m gpu`` has Triton's numbers, graphs and launches all the same."""
    status = {"reference": None, "triton": None, "native": "no nvcc"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hicache_kernels, "backend_status", lambda device: status)
    monkeypatch.delitem(sys.modules, "tests.kernels.test_gpu", raising=False)
    module = importlib.import_module("tests.kernels.test_gpu")
    monkeypatch.delitem(sys.modules, "tests.kernels.test_gpu")
    skipped = {
        parameter.values[0]: [mark.kwargs["reason"] for mark in parameter.marks if mark.args[0]]
        for parameter in module.backends.args[1]
    }
    assert skipped == {"triton": [], "native": ["native: no nvcc"]}
    for name in ("test_cascades", "test_gated_sum", "test_a_captured_step_replays_with_new_coefficients"):
        assert module.backends.mark in getattr(module, name).pytestmark
    assert module.pytestmark.name == "gpu"
