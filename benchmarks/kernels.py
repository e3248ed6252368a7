"""Every op against eager torch, at the sizes of real models: ``python -m benchmarks.kernels --device cpu``.

Correctness comes first: every contestant's result is compared with float64 before anything is timed
(benchmarks/gate.py). Then all are timed in turn, beside a plain copy that moves as many bytes, and reported
as GB/s of the least bytes the op must move (each input once, each output once; hicache_kernels/README.md)
and as a share of that copy's bandwidth. Order 2, the paper's, goes first: ``--minutes`` cuts off the rest.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from benchmarks.gate import gate
from benchmarks.machine import available_bytes, device_name, driver, versions
from benchmarks.problems import (
    DTYPES,
    OPS,
    SIZES,
    Op,
    Problem,
    copy_call,
    flop,
    minimum_bytes,
    ops_at,
    peak_bytes,
    usable_backends,
)
from benchmarks.timing import Call, time_in_graph, time_together

_ORDERS = (2, 1, 3, 0, 4)
COMPILED = ("update_forecast_", "gated_sum", "gated_sum, no gates")
_LARGE = 2**25  # numbers of all features
_GRAPHED = 64 * 2**20  # bytes; above, a launch costs nothing to speak of


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a contestant on an op. Times are of one call."""

    size: str
    terms: int
    dtype: str
    order: int
    op: str
    backend: str
    bytes: int  # the least the op must move
    flop: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    calls: int  # timed ones
    GBps: float
    copy_GBps: float
    share_of_copy: float
    over_eager: float | None  # how many times faster than the eager row; None: eager did not fit
    graph_us: float | None  # a call inside a CUDA graph, caches warm; small sizes on CUDA only


def contestants(
    problem: Problem, op: Op, compiled: bool, room: int, without: Set[str] = frozenset()
) -> dict[str, Call]:
    """Our backends that run here (the reference, which is the specification, left out) and torch's forms."""
    itemsize = problem.dtype.itemsize
    names = usable_backends(problem.device, problem.dtype, problem.order + 1)
    calls = {name: problem.call(op, name) for name in names if name not in {"reference", *without}}
    for name, call in problem.peers(op).items():
        if peak_bytes(op, problem.size, problem.order, itemsize, name) <= room:
            calls[name] = call
    if compiled and peak_bytes(op, problem.size, problem.order, itemsize, "compiled") <= room:
        calls |= problem.compiled(op)
    return calls


def time_op(
    name: str, problem: Problem, op: Op, calls: dict[str, Call], rounds: int, seconds: float
) -> list[Row]:
    """Rows of one op on one problem, all contestants and the copy timed in one run."""
    size, order, device = problem.size, problem.order, problem.device
    moved = minimum_bytes(op, size, order, problem.dtype.itemsize)
    timings = time_together(
        {"copy": copy_call(moved, problem.dtype, device), **calls},
        rounds,
        device,
        seconds,
        before=problem.record if op.updates else None,
    )
    copied = moved / timings["copy"].p50 / 1e9
    [dtype] = [key for key, value in DTYPES.items() if value == problem.dtype]
    rows = []
    for contestant, call in calls.items():
        timing = timings[contestant]
        speed = moved / timing.p50 / 1e9
        graphed = device == "cuda" and moved <= _GRAPHED and contestant not in ("compiled", "foreach")
        rows.append(
            Row(
                name,
                size.terms,
                dtype,
                order,
                op.name,
                contestant,
                moved,
                flop(op, size, order),
                timing.p20 * 1e3,
                timing.p50 * 1e3,
                timing.p80 * 1e3,
                timing.calls,
                speed,
                copied,
                speed / copied,
                timings["eager"].p50 / timing.p50 if "eager" in timings else None,
                time_in_graph(call) * 1e6 if graphed else None,
            )
        )
    return rows


def measure(
    device: str,
    sizes: Sequence[str],
    dtypes: Sequence[str],
    orders: Sequence[int],
    ops: Sequence[str],
    *,
    compiled: Sequence[str] = (),
    rounds: int = 15,
    seconds: float = 2.0,
    deadline: float = float("inf"),
    without: Set[str] = frozenset(),
    left_out: list[str] | None = None,
) -> Iterator[list[Row]]:
    """Rows of every op on every problem that fits in memory and in time.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        sizes, dtypes, orders, ops: names in ``SIZES``, ``DTYPES`` and ``OPS``; order 2 goes first.
        compiled: sizes at which ``torch.compile`` is timed too, at order 2, of the ops a skipped step is.
        rounds, seconds: of each op on each problem, at most.
        deadline: of ``time.monotonic()``, past which nothing more is begun.
        without: backends not to time.
        left_out: what does not fit is said here, and on stderr.
    """
    notes = left_out if left_out is not None else []

    def leave_out(what: str) -> None:
        notes.append(what)
        print(what, file=sys.stderr)

    for order, name, key in sorted(itertools.product(orders, sizes, dtypes), key=_rank):
        size, dtype = SIZES[name], DTYPES[key]
        wanted = [op for op in ops_at(order) if op.name in ops]
        room = int(0.8 * available_bytes(device))
        fits = [op for op in wanted if peak_bytes(op, size, order, dtype.itemsize, "native") <= room]
        where = f"{name}, {key}, order {order}"
        if len(fits) < len(wanted):
            leave_out(f"{where}: {len(wanted) - len(fits)} ops left out: over 80% of the free memory")
        if not fits:
            continue
        if time.monotonic() > deadline:
            leave_out(f"{where}: left out: out of time")
            continue
        problem = Problem(size, order, dtype, device)
        for op in fits:
            if time.monotonic() > deadline:
                leave_out(f"{where}, {op.name}: left out: out of time")
                continue
            with_compiled = name in compiled and order == 2 and op.name in COMPILED
            calls = contestants(problem, op, with_compiled, room, without)
            yield time_op(name, problem, op, calls, rounds, seconds)
            del calls
        del problem
        if device == "cuda":
            torch.cuda.empty_cache()


def _rank(chosen: tuple[int, str, str]) -> tuple[bool, int, bool]:
    """What to time first: order 2, sizes that take moments before the others; other orders of those last."""
    order, name, _ = chosen
    large = SIZES[name].terms * SIZES[name].feature > _LARGE
    return large and order != 2, _ORDERS.index(order), large


def line(row: Row) -> str:
    """A row for a person."""
    over = "" if row.over_eager is None else f"{row.over_eager:7.2f}x eager"
    graph = "" if row.graph_us is None else f" {row.graph_us:9.2f} us in a graph"
    return (
        f"{row.size:<24} {row.dtype} O={row.order} {row.op:<28} {row.backend:<9} {row.p50_ms:10.4f} ms "
        f"{row.GBps:8.1f} GB/s {row.share_of_copy:6.2f} of copy {over}{graph}"
    )


def write_csv(path: Path, rows: Sequence[Row], device: str) -> None:
    """The rows, and on every one the device, its driver and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = (device_name(device), driver(), versions())
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Row)), "device", "driver", "versions"])
        for row in rows:
            values = [f"{value:.5g}" if isinstance(value, float) else value for value in astuple(row)]
            writer.writerow([*values, *where])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--orders", nargs="+", type=int, choices=range(5), default=list(_ORDERS))
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
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device")
    deadline = time.monotonic() + 60 * options.minutes
    compiled = list(SIZES) if options.compiled == [] else options.compiled or []
    checks = gate(options.device, [DTYPES[key] for key in options.dtypes], compiled=bool(compiled))
    print(f"gate: {checks} checks passed on {device_name(options.device)}; {versions()}")
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
    if options.csv:
        write_csv(options.csv, rows, options.device)
        print(f"saved {options.csv}", file=sys.stderr)


if __name__ == "__main__":
    main()
