"""The promises a CPU can keep. Each is measured in one run, all sides in turn; a busy machine gets three
tries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.common.machine import available_bytes, last_level_cache
from benchmarks.demo import kernel_rows, pipeline_rows
from benchmarks.kernels.measure import time_op
from benchmarks.kernels.problems import DTYPES, OPS, Op, Problem, Size, minimum_bytes
from hicache_kernels import backend_status

pytestmark = pytest.mark.perf


def best_of(measure: Callable[[], float], wanted: float, tries: int = 3) -> float:
    best = 0.0
    for _ in range(tries):
        best = max(best, measure())
        if best >= wanted:
            break
    return best


@pytest.fixture
def _native():
    if (reason := backend_status("cpu")["native"]) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("_native")
def test_native_update_forecast_is_three_times_the_eager_reference():
    """16 Mi bf16 numbers, order 2."""

    def ratio() -> float:
        [value] = [value for name, value, _ in kernel_rows() if name.endswith("over reference")]
        return value

    assert best_of(ratio, 3.0) >= 3.0


def past_the_cache(op: Op, terms: int, order: int, itemsize: int) -> Size:
    """A size at which the op moves four times the last-level cache, or a sixth of a smaller memory."""
    wanted = min(4 * last_level_cache(), available_bytes("cpu") // 6)
    a_row = minimum_bytes(op, Size(terms, 1, 3072), order, itemsize)
    return Size(terms, wanted // a_row, 3072)


def measured(name: str, terms: int, dtype: str) -> tuple[float, float]:
    """Share of a copy's bandwidth, and how often eager torch's time, with two threads."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    op = OPS[name]
    problem = Problem(past_the_cache(op, terms, 2, DTYPES[dtype].itemsize), 2, DTYPES[dtype], "cpu")
    native, eager = {"native": problem.call(op, "native")}, {"eager": problem.peers(op)["eager"]}

    def share() -> float:
        [row] = time_op("", problem, op, native, rounds=9, seconds=3.0)
        return row.share_of_copy

    def ratio() -> float:
        row, _ = time_op("", problem, op, native | eager, rounds=3, seconds=3.0)
        return row.over_eager

    return best_of(share, 0.8), best_of(ratio, 4.0)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("update_forecast_", 1),
        ("gated_sum, no gates", 1),
        ("gated_sum", 32),
        ("gated_sum, no gates, update", 1),
        ("gated_sum, update", 32),
    ],
)
def test_native_keeps_up_with_a_copy_and_outruns_eager(name, terms, dtype):
    """Past the caches, order 2: 80% of the bandwidth of a copy of as many bytes, and 4 times eager torch.

    In a process of its own: the demo tells malloc to keep what is freed, which spares eager torch the page
    faults of its temporaries, and is not how anybody finds it.
    """
    here = Path(__file__).parent
    script = f"import test_performance; print(*test_performance.measured({name!r}, {terms}, {dtype!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    share, ratio = map(float, done.stdout.split()[-2:])
    assert share >= 0.8
    assert ratio >= 4.0


def test_bundled_model_keeps_most_of_the_bound():
    """50 steps, N=7, O=2, batch 8: 9 full steps, and at least 85% of 50 / 9 on the clock."""

    def share() -> float:
        rows = {name: value for name, value, _ in pipeline_rows(repeats=3)}
        assert rows["full steps"] == 9
        return rows["speed-up"] / (50 / 9)

    # within a percent of what is promised, as a neighbour's load is
    assert best_of(share, 0.85, tries=8) >= 0.85
