"""Time an op past the caches: ``measure_op.py OP FEATURES DTYPE``, of order 2, with two threads.

Prints the native backend's share of the bandwidth of a copy of as many bytes, and eager torch's time over it.
"""

from __future__ import annotations

import os
import sys

import torch

from benchmarks.common.machine import available_bytes, last_level_cache
from benchmarks.kernels.measure import time_op
from benchmarks.kernels.problems import DTYPES, OPS, Op, Problem, Size, minimum_bytes
from tests.support.timing import best_of

ORDER = 2


def past_the_cache(op: Op, features: int, itemsize: int) -> Size:
    """A size at which the op moves four times the last-level cache, or a sixth of a smaller memory."""
    wanted = min(4 * last_level_cache(), available_bytes("cpu") // 6)
    a_row = minimum_bytes(op, Size(features, 1, 3072), ORDER, itemsize)
    return Size(features, wanted // a_row, 3072)


def main() -> None:
    name, features, dtype = sys.argv[1], int(sys.argv[2]), DTYPES[sys.argv[3]]
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    op = OPS[name]
    problem = Problem(past_the_cache(op, features, dtype.itemsize), ORDER, dtype, "cpu")
    native, eager = {"native": problem.call(op, "native")}, {"eager": problem.eager_calls(op)["eager"]}

    def share() -> float:
        [row] = time_op("", problem, op, native, rounds=9, seconds=3.0)
        return row.share_of_copy

    def ratio() -> float:
        row, _ = time_op("", problem, op, native | eager, rounds=3, seconds=3.0)
        return row.over_eager

    print(best_of(share, 0.8), best_of(ratio, 4.0))


if __name__ == "__main__":
    main()
