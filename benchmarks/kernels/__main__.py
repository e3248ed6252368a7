"""Every op against eager torch, at the sizes of real models: ``python -m benchmarks.kernels --device cpu``.

Correctness comes first: every contestant's result is compared with float64 before anything is timed
(benchmarks/kernels/parity.py). Then all are timed in turn, beside a plain copy that moves as many bytes, and
reported as GB/s of the least bytes the op must move (each input once, each output once;
hicache_kernels/README.md) and as a share of that copy's bandwidth. Order 2, the paper's, goes first:
``--minutes`` cuts off the rest.
"""

from __future__ import annotations

import sys
import time

from benchmarks.common import command, tables
from benchmarks.common.machine import device_name, place, versions
from benchmarks.kernels.measure import ORDERS, Row, line, measure, tactics
from benchmarks.kernels.parity import check_parity
from benchmarks.kernels.problems import DTYPES, OPS, SIZES


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--orders", nargs="+", type=int, choices=range(5), default=list(ORDERS))
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument(
        "--compiled",
        nargs="*",
        choices=list(SIZES),
        help="also time torch.compile, at order 2, at these sizes; at all of them if none is named",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of each op, at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each op, about")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything, about")
    options = parser.parse_args()
    command.require(options.device)
    deadline = time.monotonic() + 60 * options.minutes
    compiled = list(SIZES) if options.compiled == [] else options.compiled or []
    checks = check_parity(options.device, [DTYPES[key] for key in options.dtypes], compiled=bool(compiled))
    print(f"parity: {checks} checks passed on {device_name(options.device)}; {versions()}")
    rows: list[Row] = []
    for block in measure(
        options.device,
        options.sizes,
        options.dtypes,
        options.orders,
        options.ops,
        compiled=compiled,
        rounds=options.rounds,
        seconds=options.seconds,
        deadline=deadline,
    ):
        for row in block:
            print(line(row), flush=True)
        rows += block
    if options.device == "cpu":
        print(*tactics(), sep="\n", file=sys.stderr)
    if options.csv:
        tables.write_rows(options.csv, Row, rows, place(options.device))
        print(f"saved {options.csv}", file=sys.stderr)


if __name__ == "__main__":
    main()
