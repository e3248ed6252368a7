"""Parity checks: nothing is timed before every contestant agrees with float64.

The rule for a kernel is the project's: at most twice the error of eager torch in the same dtype, in maximum
and in relative RMS, plus a rounding of the largest number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.common.timing import Call
from benchmarks.kernels.problems import Op, Problem, Size, ops_at, usable_backends
from hicache_kernels.backends import triton

# slots with padding and without; rows that no vector divides
PARITY_SIZES = (Size(3, 16, 48, batch=2), Size(2, 5, 31), Size(1, 7, 129))


class WrongResult(AssertionError):
    """A contestant differs from float64 by more than the rule allows."""


def assert_no_worse(what: str, ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = 1.0) -> float:
    """Check the rule; return the largest error, relative to the largest number.

    Raises:
        WrongResult: the rule is broken, or a number is not finite.
    """
    step = 1e-12 if ours.dtype == torch.float64 else ulps * torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    largest = float(exact.abs().max())
    pairs = (
        ("max", float(error.max()), 2 * float(allowed.max()) + step * largest),
        ("RMS", float(error.norm()), 2 * float(allowed.norm()) + step * float(exact.norm())),
    )
    for name, found, limit in pairs:
        if not (math.isfinite(found) and found <= limit):
            raise WrongResult(f"{what}: {name} error {found:.3e}, allowed {limit:.3e}")
    return pairs[0][1] / largest


def check_op(problem: Problem, op: Op, name: str, call: Call, ulps: float = 1.0) -> float:
    """Run one contestant once on poisoned outputs and check what it wrote; return the largest relative error.

    The problem's history is as before afterwards.

    Raises:
        WrongResult: a result breaks the rule, or a history that was only to be read is changed.
    """
    start = problem.orders.clone()
    exact_orders, exact = problem.eagerly(op, torch.float64)
    eager_orders, eager = problem.eagerly(op, problem.dtype)
    problem.out.fill_(float("nan"))
    problem.row.fill_(float("nan"))
    returned = call()
    what = f"{op.name}, {name}, {problem.dtype}, order {problem.order}, {problem.size}, {problem.device}"
    try:
        ours, eager_slots, exact_slots = map(problem.unpadded, (problem.orders, eager_orders, exact_orders))
        worst = assert_no_worse(f"{what}, history", ours, eager_slots, exact_slots, ulps)
        if exact is not None and eager is not None:
            result = returned if op.sums else problem.unpadded(problem.row)
            assert isinstance(result, Tensor)
            worst = max(worst, assert_no_worse(what, result, eager, exact, ulps))
        if not op.updates and not torch.equal(problem.orders, start):
            raise WrongResult(f"{what}: the history was changed")
    finally:
        problem.orders.copy_(start)
    return worst


def rounding(name: str, dtype: torch.dtype) -> float:
    """Return the roundings that the rule allows: Triton's interpreter truncates bf16, a GPU rounds it."""
    return 2.0 if name == "triton" and triton.interpreted() and dtype == torch.bfloat16 else 1.0


def check_parity(
    device: str,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    orders: Iterable[int] = range(5),
    sizes: Sequence[Size] = PARITY_SIZES,
    compiled: bool = False,
) -> int:
    """Check every op, order, dtype and contestant; return the number of checks made.

    Raises:
        WrongResult: one of them fails.
    """
    count = 0
    for dtype in dtypes:
        for order in orders:
            for size in sizes:
                torch.manual_seed(order)
                problem = Problem(size, order, dtype, device)
                for op in ops_at(order):
                    backends = usable_backends(device, dtype, order + 1)
                    calls = {name: problem.call(op, name) for name in backends} | problem.eager_calls(op)
                    calls |= problem.product(op)
                    if compiled and order == 2 and size == sizes[0]:
                        calls |= problem.compiled(op)
                    for name, call in calls.items():
                        check_op(problem, op, name, call, rounding(name, dtype))
                        count += 1
    return count
