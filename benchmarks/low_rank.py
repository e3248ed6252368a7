"""How far pictures cached with gates of low rank are from full ones, by rank, on the bundled model.

``python -m benchmarks.low_rank --csv benchmarks/results/low-rank.csv``: 50 steps, order 2, the eight prompts
of ``hicache demo`` from two seeds, PSNR of each picture against its full run. Beside every rank stand
module and stack, and what a history in bf16 costs them. Every picture is a function of its seed, so the
numbers do not depend on the machine beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

import hicache.demo
import hicache.fast
from benchmarks.common import command, tables
from benchmarks.common.machine import versions
from hicache import HiCacheConfig
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.prompts import PROMPTS
from hicache.plan import RANKS

STEPS = 50
SEEDS = (0, 1)
INTERVALS = (3, 5, 7)

HEADER = (
    "granularity", "rank", "history", "interval", "full steps", "history bytes", "gate error",
    "mean PSNR dB", "worst PSNR dB",
)  # fmt: skip
Row = tuple[str, int | None, str, int, int, int, float | None, float, float]


class Bench:
    """The bundled pipeline, and what it draws without a cache."""

    def __init__(self) -> None:
        self._pipe: ShapesPipeline = hicache.demo.load()
        self._pipe.set_progress_bar_config(disable=True)
        self._full = self._draw()

    def _draw(self) -> np.ndarray[Any, Any]:
        """``[pictures, height, width, 3]`` in [0, 1]."""
        drawn = [
            self._pipe(
                list(PROMPTS), STEPS, generator=torch.Generator().manual_seed(seed), output_type="np"
            ).images
            for seed in SEEDS
        ]
        return np.concatenate(drawn)

    def gate_errors(self, config: HiCacheConfig) -> list[float]:
        """What gates of every rank are off by."""
        with hicache.fast.apply(self._pipe, config, granularity="low-rank") as handle:
            self._pipe(list(PROMPTS), STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
            return handle.stats.low_rank["transformer"].errors

    def row(self, config: HiCacheConfig, granularity: str, **more: Any) -> Row:
        """Compare one cached run of every seed with the full ones."""
        with hicache.fast.apply(self._pipe, config, granularity=granularity, **more) as handle:
            cached = self._draw()
            stats = handle.stats
        psnr = [
            peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(self._full, cached, strict=True)
        ]
        dtype = str(config.history_dtype or self._pipe.transformer.dtype).removeprefix("torch.")
        gates = stats.low_rank.get("transformer")
        return (
            granularity,
            None if gates is None else gates.rank,
            dtype,
            config.interval,
            stats.full_steps,
            stats.history_bytes,
            None if gates is None else gates.error,
            float(np.mean(psnr)),
            float(min(psnr)),
        )


def rows(bench: Bench, interval: int) -> Iterator[Row]:
    """All granularities and ranks at an interval."""
    config = HiCacheConfig(interval=interval)
    halved = HiCacheConfig(interval=interval, history_dtype=torch.bfloat16)
    errors = bench.gate_errors(config)
    yield bench.row(config, "stack")
    yield bench.row(config, "module")
    for rank in range(1, RANKS + 1):
        yield bench.row(config, "low-rank", gate_tolerance=errors[rank] * (1 + 1e-6))
    for granularity in ("stack", "module", "low-rank"):  # of the rank that is taken by default
        yield bench.row(halved, granularity)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--intervals", type=int, nargs="+", default=list(INTERVALS))
    options = parser.parse_args()
    bench = Bench()
    cells = []
    for interval in options.intervals:
        for row in rows(bench, interval):
            error = None if row[6] is None else f"{row[6]:.4f}"
            cells.append((*row[:6], error, f"{row[7]:.2f}", f"{row[8]:.2f}", versions()))
            print(*cells[-1][:-1], flush=True)
    tables.save_csv(options.csv, [*HEADER, "versions"], cells)


if __name__ == "__main__":
    main()
