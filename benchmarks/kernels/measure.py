"""Times every op of every contestant, beside a plain copy that moves as many bytes."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch

from benchmarks.common.machine import available_bytes
from benchmarks.common.timing import Call, time_in_graph, time_together
from benchmarks.kernels.problems import (
    DTYPES,
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
from hicache_kernels.backends import native

ORDERS = (2, 1, 3, 0, 4)
COMPILED = ("update_forecast_", "gated_sum", "gated_sum, no gates")
_LARGE = 2**25  # elements of all features
_GRAPHED = 64 * 2**20  # bytes; above, a launch costs nothing to speak of


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a contestant on an op. Times are of one call."""

    size: str
    features: int
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
    """The calls to time: our backends that run here, but the specification, and torch's forms that fit."""
    itemsize = problem.dtype.itemsize
    names = usable_backends(problem.device, problem.dtype, problem.order + 1)
    calls = {name: problem.call(op, name) for name in names if name not in {"reference", *without}}
    for name, call in problem.eager_calls(op).items():
        if peak_bytes(op, problem.size, problem.order, itemsize, name) <= room:
            calls[name] = call
    calls |= problem.product(op)
    if compiled and peak_bytes(op, problem.size, problem.order, itemsize, "compiled") <= room:
        calls |= problem.compiled(op)
    return calls


def time_op(
    name: str, problem: Problem, op: Op, calls: dict[str, Call], rounds: int, seconds: float
) -> list[Row]:
    """Time one op on one problem, all contestants and the copy in one run; a row a contestant."""
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
        graphed = device == "cuda" and moved <= _GRAPHED and contestant not in ("compiled", "foreach", "mm")
        rows.append(
            Row(
                name,
                size.features,
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
    """Yield the rows of every op on every problem that fits in memory and in time.

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


def tactics() -> Iterator[str]:
    """Say what the native backend has measured of sums that no cache of this processor holds, and taken."""
    if native.unavailable(torch.device("cpu")) is not None:
        return
    for kind in native.tactics():
        what = f"{kind.dtype} sums{', gated' * kind.gated}{', with an update' * kind.update}"
        sizes = f"{kind.num_features} features and more, {kind.numel} numbers and more"
        each = ", ".join(f"{cost:.0f}" for cost in kind.costs)
        yield f"{what}, {sizes}: tactic {kind.chosen} is taken, of {each} ns a KiB of history"


def _rank(chosen: tuple[int, str, str]) -> tuple[bool, int, bool]:
    """Sort order 2 and small sizes first, large sizes at other orders last."""
    order, name, _ = chosen
    large = SIZES[name].features * SIZES[name].numel > _LARGE
    return large and order != 2, ORDERS.index(order), large


def line(row: Row) -> str:
    """Format a row for a terminal."""
    over = "" if row.over_eager is None else f"{row.over_eager:7.2f}x eager"
    graph = "" if row.graph_us is None else f" {row.graph_us:9.2f} us in a graph"
    return (
        f"{row.size:<24} {row.dtype} O={row.order} {row.op:<28} {row.backend:<9} {row.p50_ms:10.4f} ms "
        f"{row.GBps:8.1f} GB/s {row.share_of_copy:6.2f} of copy {over}{graph}"
    )
