"""How far cached pictures are from full ones, by interval, granularity and basis, on the bundled model.

``python -m benchmarks.quality --csv benchmarks/results/quality.csv --plot docs/quality.png``: 50 steps, order
2, warm-up 3, the eight prompts of ``hicache demo``, PSNR of each picture against its full run, averaged.
Every picture is a function of its seed, so the numbers do not depend on the machine beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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

STEPS = 50
INTERVALS = range(3, 11)
BASES = ("hermite", "taylor", "scaled_taylor", "reuse")
GRANULARITIES = {"module": "-", "stack": "--", "output": ":"}  # → how lines are drawn
SIGMAS = (0.3, 0.4, 0.5, 0.6, 0.7, 1.0)  # at the default interval

Row = tuple[str, str, float, int, int, float, float]
HEADER = ("granularity", "basis", "sigma", "interval", "full steps", "mean PSNR dB", "worst PSNR dB")


def draw(pipe: ShapesPipeline) -> np.ndarray[Any, Any]:
    """Draw the eight prompts from a fixed seed: ``[8, height, width, 3]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    pictures: np.ndarray[Any, Any] = pipe(
        list(PROMPTS), STEPS, guidance_scale=4.0, generator=generator, output_type="np"
    ).images
    return pictures


def measure(pipe: ShapesPipeline, full: np.ndarray[Any, Any], granularity: str, config: HiCacheConfig) -> Row:
    """Compare one cached run with the full one."""
    with hicache.fast.apply(pipe, config, granularity=granularity) as handle:
        cached = draw(pipe)
        stats = handle.stats
    psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(full, cached, strict=True)]
    return (
        granularity,
        str(config.basis),
        config.sigma,
        config.interval,
        stats.full_steps,
        float(np.mean(psnr)),
        float(min(psnr)),
    )


def sweep(intervals: Sequence[int], bases: Sequence[str], sigmas: Sequence[float]) -> list[Row]:
    """Measure every granularity and basis over the intervals, then Hermite over σ."""
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    full = draw(pipe)
    configs = [HiCacheConfig(basis=basis, interval=n) for basis in bases for n in intervals]
    configs += [HiCacheConfig(sigma=sigma) for sigma in sigmas if sigma != HiCacheConfig().sigma]
    return [measure(pipe, full, granularity, config) for granularity in GRANULARITIES for config in configs]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw PSNR over the interval, a line for every granularity and basis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for granularity, basis, sigma, interval, _, mean, _ in rows:
        if sigma == HiCacheConfig().sigma:
            lines.setdefault((basis, granularity), {})[interval] = mean
    colours = dict(zip(BASES, ("C0", "C1", "C2", "C7"), strict=True))
    for (basis, granularity), points in lines.items():
        style, label = GRANULARITIES[granularity], f"{basis}, {granularity}"
        axes.plot(
            list(points), list(points.values()), style, marker="o", ms=3, color=colours[basis], label=label
        )
    axes.set_xlabel("interval N (50 steps, order 2)")
    axes.set_ylabel("mean PSNR against the full run, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--intervals", type=int, nargs="+", default=list(INTERVALS))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--plot", type=Path, help="also draw them (needs matplotlib)")
    options = parser.parse_args()
    rows = sweep(options.intervals, options.bases, SIGMAS)
    for row in rows:
        print("{:<8} {:<14} σ={:<4} N={:<3} {:>3} full  {:6.2f} dB, worst {:6.2f}".format(*row))
    software = versions()
    cells = [(*row[:5], f"{row[5]:.2f}", f"{row[6]:.2f}", software) for row in rows]
    tables.save_csv(options.csv, [*HEADER, "versions"], cells)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
