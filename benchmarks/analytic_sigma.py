"""Analytic σ beside fixed ones, on the bundled model: ``python -m benchmarks.analytic_sigma``.

As :mod:`benchmarks.quality`, by module: 50 steps, order 2, warm-up 3, eight prompts, mean PSNR in dB of the
pictures against their full runs.
"""

from __future__ import annotations

from dataclasses import replace

import hicache.demo
from benchmarks.common import command, tables
from benchmarks.quality import draw, measure
from hicache import AnalyticHermite, HiCacheConfig

INTERVALS = (3, 5, 7, 10)
COLUMNS = {
    "fixed 0.3": HiCacheConfig(sigma=0.3),
    "fixed 0.5": HiCacheConfig(sigma=0.5),
    "fixed 0.7": HiCacheConfig(sigma=0.7),
    "analytic, by layer": HiCacheConfig(basis=AnalyticHermite()),
    "analytic, by feature": HiCacheConfig(basis=AnalyticHermite(key="feature")),
}
HEADER = ("N", "full steps", *COLUMNS)


def rows(intervals: tuple[int, ...] = INTERVALS) -> list[list[object]]:
    """A row of :data:`HEADER` for every interval."""
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    full = draw(pipe)
    found: list[list[object]] = []
    for interval in intervals:
        configs = [replace(config, interval=interval) for config in COLUMNS.values()]
        measured = [measure(pipe, full, "module", config) for config in configs]
        found.append([interval, measured[0][4], *(f"{one[5]:.1f}" for one in measured)])
    return found


def main() -> None:
    options = command.parser(__doc__).parse_args()
    found = rows()
    print(tables.markdown(HEADER, found))
    tables.save_csv(options.csv, HEADER, found)


if __name__ == "__main__":
    main()
