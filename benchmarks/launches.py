"""Counts what a skipped step launches: ours, eager torch and ``torch._foreach_*``, by number of features.

``python -m benchmarks.launches --csv benchmarks/results/launches.csv``

Torch's operators are counted by a ``TorchDispatchMode`` as they run; an operator that computes is at least
one kernel on a GPU, views are none. An operator over a list of tensors counts once, the least it can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import command, tables
from benchmarks.common.timing import Call
from benchmarks.kernels.problems import OPS, Problem, Size

FEATURES = (1, 2, 4, 8, 16, 32, 76, 120)
# operators that only make memory, or another view of it
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
}  # fmt: skip


class OperatorCounter(TorchDispatchMode):
    """Counts operators that compute, by name, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_view = func.is_view or func.overloadpacket.__name__ in _FREE
        if not is_view:
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def count(call: Call) -> Counter[str]:
    """Count the operators that compute in one call, by name."""
    counter = OperatorCounter()
    with counter:
        call()
    return counter.counts


def table(features: Sequence[int] = FEATURES, order: int = 2) -> list[tuple[str, int, str, int]]:
    """Return rows ``(op, features, contestant, operators)`` of the forms of a skipped step."""
    rows = []
    for name in ("update_forecast_", "gated_sum", "gated_sum, update"):
        op = OPS[name]
        for number in features:
            problem = Problem(Size(number, 2, 64), order, torch.float32, "cpu")
            calls = {"ours": problem.call(op, "auto"), **problem.eager_calls(op)}
            rows += [(name, number, key, count(call).total()) for key, call in calls.items()]
    return rows


def main() -> None:
    parser = command.parser(__doc__)
    options = parser.parse_args()
    rows = table()
    for op, features, contestant, operators in rows:
        print(f"{op:<20} {features:>4} features {contestant:<8} {operators:>6} operators")
    tables.save_csv(options.csv, ["op", "features", "contestant", "operators"], rows)


if __name__ == "__main__":
    main()
