"""One op is one launch, whatever the number of features and their shapes: counted, not assumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_calls import ALIKE, FEATURES, calls

from benchmarks.launches import OperatorCounter, count
from hicache import Engine, HiCacheConfig
from hicache_kernels import backend_status
from hicache_kernels.backends import native

needs_native = pytest.mark.skipif(
    backend_status("cpu")["native"] is not None, reason=str(backend_status("cpu")["native"])
)


@needs_native
@pytest.mark.parametrize("name", calls("native"))
def test_native_is_called_once_for_all_features(name):
    call = calls("native")[name]
    before = native.launches()
    call()
    assert native.launches() == before + 1


def test_triton_launches_once_for_all_features():
    """In Triton's interpreter, in a process of its own: every launch of every kernel is counted."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).parent / "scripts" / "triton_launches.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{name}: 1" for name in calls("auto")]


@pytest.fixture
def engine():
    """Two full steps of many features recorded, an update waiting."""
    engine = Engine(HiCacheConfig(interval=5, order=2, warmup=2))
    for step in (0, 1):
        engine.record(step, [torch.randn(shape) for shape in ALIKE])
    return engine


@pytest.mark.parametrize("waiting", [True, False], ids=["update waiting", "settled"])
def test_a_skipped_step_of_the_engine_is_one_op(engine, waiting):
    """Nothing but the op touches a feature: what else is dispatched is the host's numbers and views."""
    base, gates = torch.randn(2, 5, 48), torch.randn(FEATURES, 2, 48)
    for step, skipped, op in (
        (2, lambda step: engine.gated_sum(step, base, gates), "gated_sum"),
        (3, engine.forecast, "forecast"),
    ):
        engine.record(4 * step, [torch.randn(shape) for shape in ALIKE])
        if not waiting:
            skipped(4 * step + 1)
        expected = {
            "gated_sum": "gated_sum_update_" if waiting else "gated_sum",
            "forecast": "update_forecast_" if waiting else "forecast",
        }[op]
        before = native.launches() if backend_status("cpu")["native"] is None else None
        counts = count(lambda step=step, skipped=skipped: skipped(4 * step + 2))
        assert counts[f"hicache.{expected}"] == 1
        assert counts.total() == 1, counts
        if before is not None:
            assert native.launches() == before + 1


def test_the_counter_counts():
    """Operators that compute are counted, views and fresh memory are not."""
    with OperatorCounter() as counter:
        x = torch.empty(4, 4)
        x.view(16)[2:].add_(1).mul_(2)
        torch._foreach_add_([x[0], x[1]], 1.0)
    assert counter.counts == {"aten.add_": 1, "aten.mul_": 1, "aten._foreach_add_": 1}
