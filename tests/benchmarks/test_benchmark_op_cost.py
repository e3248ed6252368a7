"""The benchmark of an op's host time: every op and backend is timed, over Triton's own launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import op_cost
from benchmarks.common import stub_driver

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_every_op_is_timed_beside_its_launch(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    library = stub_driver.build(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, op_cost.__file__, "--measure", str(library), "1", "1"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert list(found) == list(op_cost.calls())
    for times in found.values():
        assert {"launch", "triton", "reference"} <= set(times)
        assert min(times.values()) > 0
