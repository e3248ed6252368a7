"""The two promises a CPU can keep. Each is measured in one run, both sides in turn; a busy machine gets three
tries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.demo import kernel_rows, pipeline_rows
from hicache_kernels import backend_status

pytestmark = pytest.mark.perf


def best_of_three(measure: Callable[[], float], wanted: float) -> float:
    best = 0.0
    for _ in range(3):
        best = max(best, measure())
        if best >= wanted:
            break
    return best


def test_native_update_forecast_is_three_times_the_eager_reference():
    """16 Mi bf16 numbers, order 2."""
    if (reason := backend_status("cpu")["native"]) is not None:
        pytest.skip(reason)

    def ratio() -> float:
        [value] = [value for name, value, _ in kernel_rows() if name.endswith("over reference")]
        return value

    assert best_of_three(ratio, 3.0) >= 3.0


def test_bundled_model_keeps_most_of_the_bound():
    """50 steps, N=7, O=2, batch 8: 9 full steps, and at least 85% of 50 / 9 on the clock."""

    def share() -> float:
        rows = {name: value for name, value, _ in pipeline_rows(repeats=5)}
        assert rows["full steps"] == 9
        return rows["speed-up"] / (50 / 9)

    assert best_of_three(share, 0.85) >= 0.85
