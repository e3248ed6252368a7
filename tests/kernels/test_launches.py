"""One op is one launch, whatever the number of features and their shapes: counted, not assumed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from benchmarks.launches import OperatorCounter, count
from hicache import Engine, HiCacheConfig
from hicache_kernels import History, backend_status, forecast, gated_sum, update_, update_forecast_
from hicache_kernels.backends import native

FEATURES = 76
MIXED = [(1, 3 + index % 5, 16 + 7 * (index % 3)) for index in range(FEATURES)]
ALIKE = [(2, 5, 48)] * FEATURES

needs_native = pytest.mark.skipif(
    backend_status("cpu")["native"] is not None, reason=str(backend_status("cpu")["native"])
)


def calls(backend):
    """Every op on a history of many features, by name."""
    mixed, alike = (History(shapes, 2) for shapes in (MIXED, ALIKE))
    mixed.orders.normal_()
    alike.orders.normal_()
    inv_gap, coeffs = torch.tensor(0.2), torch.tensor([1.0, 0.5, -0.125])
    base, gates = torch.randn(2, 5, 48), torch.randn(FEATURES, 2, 48)
    pending = {"inv_gap": inv_gap, "filled": 2}
    return {
        "update_": lambda: update_(mixed.orders, inv_gap, 2, backend=backend),
        "forecast": lambda: forecast(mixed.orders, coeffs, backend=backend),
        "update_forecast_": lambda: update_forecast_(mixed.orders, inv_gap, coeffs, 2, backend=backend),
        "gated_sum": lambda: gated_sum(base, alike.orders_by_feature(), gates, coeffs, backend=backend),
        "gated_sum, no gates": lambda: gated_sum(
            base, alike.orders_by_feature(), None, coeffs, backend=backend
        ),
        "gated_sum, update": lambda: gated_sum(
            base, alike.orders_by_feature(), gates, coeffs, backend=backend, **pending
        ),
    }


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
    script = """
        from unittest import mock
        import sys
        sys.path.insert(0, "tests/kernels")
        import test_launches
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction
        from hicache_kernels.backends import triton as backend

        assert backend.interpreted()
        kernels = [value for name, value in vars(backend).items() if name.endswith("_kernel")]
        assert len(kernels) == 4 and all(isinstance(kernel, InterpretedFunction) for kernel in kernels)
        launched = []
        run = GridExecutor.__call__

        def counted(self, *args, **kwargs):
            launched.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        with mock.patch.object(GridExecutor, "__call__", counted):
            for name, call in test_launches.calls("triton").items():
                launched.clear()
                call()
                print(name, len(launched), sep=": ")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."},
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
