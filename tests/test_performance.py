"""The promises a CPU can keep. Each is measured in one run, all sides in turn; a busy machine gets three
tries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.demo import kernel_rows, pipeline_rows
from hicache_kernels import backend_status
from tests.support.scripts import run_script
from tests.support.timing import best_of

pytestmark = pytest.mark.perf


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    """Other tests take one."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


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
    done = run_script("measure_op.py", name, str(terms), dtype)
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
