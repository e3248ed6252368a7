"""The bundled model and the kernel under it, timed in one run: ``python -m benchmarks.demo``.

1. ``update_forecast_`` native against the eager reference at 16 Mi bf16 numbers, order 2, after checking that
   both give the same bits;
2. the denoising loop of the bundled model, full against HiCache, 50 steps, N=7, O=2, batch 8.

Prints both and writes a CSV with the machine and the versions.
"""

from __future__ import annotations

import functools

import torch

import hicache.demo
from benchmarks.common import command, tables
from benchmarks.common.machine import device_name, versions
from benchmarks.common.timing import time_together
from hicache import HiCacheConfig
from hicache.demo.compare import compare
from hicache.demo.prompts import PROMPTS
from hicache_kernels import History, update_forecast_

NUMEL = 16 * 2**20
ORDER = 2


def kernel_rows() -> list[tuple[str, float, str]]:
    """Time ``update_forecast_`` on both backends, after a parity check: they must not differ in a bit."""
    history = History([(NUMEL,)], ORDER, torch.bfloat16)
    history.orders.copy_(torch.randn(history.orders.shape, generator=torch.Generator().manual_seed(0)))
    inv_gap, coeffs = torch.tensor(1 / 7), torch.tensor([1.0, 0.5, -0.125])
    results = {}
    for backend in ("reference", "native"):
        orders = history.orders.clone()
        results[backend] = (update_forecast_(orders, inv_gap, coeffs, ORDER, backend=backend), orders)
    for ours, theirs in zip(results["native"], results["reference"], strict=True):
        if not torch.equal(ours, theirs):
            raise SystemExit("update_forecast_: native and reference differ")
    del results
    row = torch.empty(NUMEL, dtype=torch.bfloat16)

    def call(backend: str) -> None:
        update_forecast_(history.orders, inv_gap, coeffs, ORDER, out=row, backend=backend)

    def record() -> None:  # a new feature each time, or repeated updates end in subnormal numbers
        torch.neg(history.orders[0], out=history.orders[-1])

    calls = {name: functools.partial(call, name) for name in ("reference", "native")}
    timings = time_together(calls, before=record)
    eager, native = timings["reference"].p50, timings["native"].p50
    moved = (2 * (ORDER + 1) + 1) * row.nbytes  # every order read and written, the forecast written
    return [
        ("update_forecast_ reference", eager * 1e3, "ms"),
        ("update_forecast_ native", native * 1e3, "ms"),
        ("update_forecast_ native", moved / native / 1e9, "GB/s"),
        ("update_forecast_ native over reference", eager / native, "x"),
    ]


def pipeline_rows(repeats: int) -> list[tuple[str, float, str]]:
    """Time the bundled model with and without the cache."""
    result = compare(hicache.demo.load(), PROMPTS, HiCacheConfig(), repeats=repeats)
    stats = result.stats
    return [
        ("full run", result.full.seconds, "s"),
        ("HiCache run", result.cached.seconds, "s"),
        ("full steps", stats.full_steps, ""),
        ("speed-up", result.speedup, "x"),
        ("bound", stats.bound, "x"),
        ("share of bound", 100 * result.speedup / stats.bound, "%"),
        ("cache", stats.cache_ms, "ms"),
        ("mean PSNR", sum(result.psnr) / len(result.psnr), "dB"),
        ("mean SSIM", sum(result.ssim) / len(result.ssim), ""),
    ]


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind; medians count")
    options = parser.parse_args()
    rows = kernel_rows() + pipeline_rows(options.repeats)
    for name, value, unit in rows:
        print(f"{name:<40} {value:10.3f} {unit}")
    where = (device_name("cpu"), versions())
    tables.save_csv(
        options.csv,
        ["measure", "value", "unit", "device", "versions"],
        [(name, f"{value:.4g}", unit, *where) for name, value, unit in rows],
    )


if __name__ == "__main__":
    main()
