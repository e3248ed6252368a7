"""What the authors ship beside HiCache, beside plain HiCache at equal full steps: quality and seconds.

``python -m benchmarks.extras --csv benchmarks/results/extras.csv``: the bundled model, 50 steps, by module,
pictures that nothing was fitted to, one thread; the upscaler, 28 steps. A picture's PSNR and SSIM are against
its full run. Of the full run and of every method the loop is timed in turns, ``--rounds`` times, and the
fastest counts. What these methods cost on a CPU with 64 tokens says nothing of a GPU and thousands of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

import hicache.demo
import hicache.fast
from benchmarks import super_resolution
from benchmarks.common import command, judging, tables
from benchmarks.common.machine import device_name, versions
from hicache import HiCacheConfig
from hicache.companions.analytic import AnalyticHermite
from hicache.companions.clusca import ClusCa
from hicache.companions.sparse import SparseAttention
from hicache.demo.compare import Pictures, keep_freed_memory, psnr, ssim

STEPS: Final = 50
PICTURES: Final = 16
INTERVALS: Final = (5, 7)
HEADER: Final = (
    "pictures",
    "method",
    "full steps",
    "mean PSNR dB",
    "worst PSNR dB",
    "mean SSIM",
    "seconds",
    "speed-up",
)
# of 64 tokens of a picture, and 5 of text: the defaults are made for thousands
_CLUSTERS: Final = 8
_SPARSE: Final = SparseAttention(keep=0.25, group=16, refresh=3, dense_layers=2)


@dataclass(frozen=True)
class Method:
    """One way to cache.

    Args:
        name: in the table.
        config: settings of the cache, but for the interval.
        options: others of :func:`hicache.fast.apply`.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: Final = (
    Method("hicache"),
    Method("taylor", {"basis": "taylor"}),
    Method("hicache-analytic", {"basis": AnalyticHermite()}),
    Method("clusca", {"basis": "taylor"}, {"clusters": ClusCa(clusters=_CLUSTERS)}),
    Method("hi-clusca", {}, {"clusters": ClusCa(clusters=_CLUSTERS)}),
    Method("hi-clusca, upstream", {}, {"clusters": ClusCa(clusters=_CLUSTERS, variant="upstream")}),
    Method("hi-clusca, residual", {}, {"clusters": ClusCa(clusters=_CLUSTERS, variant="residual")}),
    Method("sparse", {}, {"sparse": _SPARSE}),
)
SUPER_RESOLUTION: Final = (Method("hicache"), Method("hicache by output", {}, {"granularity": "output"}))


@dataclass
class Measured:
    """A method at one interval."""

    method: Method
    interval: int
    full_steps: int = 0
    drawn: Pictures | None = None
    seconds: list[float] = field(default_factory=list)

    def draw(self, pipe: Any, loop: Callable[[], Pictures]) -> None:
        """Draw and time all pictures once more."""
        config = HiCacheConfig(interval=self.interval, **self.method.config)
        options = {"granularity": "module", **self.method.options}
        cached = nullcontext() if self.interval == 1 else hicache.fast.apply(pipe, config, **options)
        with cached as handle:
            if self.drawn is None:
                self.drawn = loop()  # and with it histories are allocated
            start = time.perf_counter()
            loop()
            self.seconds.append(time.perf_counter() - start)
            if handle is not None:
                self.full_steps = handle.stats.full_steps


def sweep(
    what: str, pipe: Any, loop: Callable[[], Pictures], methods: Sequence[Method], steps: int, rounds: int
) -> list[tuple[str, ...]]:
    """Measure all methods at all intervals beside the full run, in turns."""
    pipe.set_progress_bar_config(disable=True)
    full = Measured(Method("full run"), 1, full_steps=steps)
    found = [full, *(Measured(method, interval) for interval in INTERVALS for method in methods)]
    for _ in range(rounds):
        for measured in found:
            measured.draw(pipe, loop)
    return [_cells(what, measured, full) for measured in found]


def _cells(what: str, measured: Measured, full: Measured) -> tuple[str, ...]:
    """As in :data:`HEADER`."""
    assert measured.drawn is not None
    assert full.drawn is not None
    near = ("", "", "")
    if measured is not full:
        decibels, likeness = psnr(full.drawn, measured.drawn), ssim(full.drawn, measured.drawn)
        near = f"{np.mean(decibels):.2f}", f"{min(decibels):.2f}", f"{np.mean(likeness):.4f}"
    name = measured.method.name + ("" if measured is full else f" N={measured.interval}")
    ratio = min(full.seconds) / min(measured.seconds)
    return (what, name, str(measured.full_steps), *near, f"{min(measured.seconds):.2f}", f"{ratio:.2f}")


def shapes(count: int) -> tuple[Any, Callable[[], Pictures]]:
    """The bundled pipeline, and what draws judged pictures with it."""
    pipe, subjects = hicache.demo.load(), judging.subjects(count)
    prompts, latents = [one.prompt for one in subjects], torch.cat([one.latents for one in subjects])

    def loop() -> Pictures:
        drawn: Pictures = pipe(prompts, STEPS, latents=latents.clone(), output_type="np").images
        return drawn

    return pipe, loop


def enlarged(count: int) -> tuple[Any, Callable[[], Pictures]]:
    """The upscaler, and what enlarges pictures with it."""
    pipe, small, _ = super_resolution.upscaled(count, "whole")
    return pipe, lambda: super_resolution.draw(pipe, small, super_resolution.STEPS)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    count, rounds = options.pictures, options.rounds
    rows = sweep("shapes", *shapes(count), METHODS, STEPS, rounds)
    rows += sweep("enlarged shapes", *enlarged(count), SUPER_RESOLUTION, super_resolution.STEPS, rounds)
    print(tables.markdown(HEADER, rows))
    where = device_name("cpu"), versions()
    tables.save_csv(options.csv, (*HEADER, "device", "versions"), [(*row, *where) for row in rows])


if __name__ == "__main__":
    main()
