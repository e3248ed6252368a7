"""What ``hicache generate`` adds to a loop of one's own, what a second worker brings: ratios in one run.

1. The bundled model, cached, ``--steps`` steps: a loop that calls the pipeline and saves each picture,
   against the launcher in the same process, with its folder, lines and digests. Of both, the time outside
   the pipeline's calls, a picture: medians of ``--rounds`` rounds in turn. The overhead is what the launcher
   takes more of it, relative to the time inside.
2. Pictures a second of one process and of two Ray workers, one thread each, loading and the first pictures
   of each left out. Needs two idle cores and ``hicache[cluster]``.

Prints both and writes a CSV with the machine and the versions.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, tables
from benchmarks.common.machine import device_name, versions
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.prompts import random_prompts
from hicache.launch.drawing import Painter
from hicache.launch.hiring import hire
from hicache.launch.loading import Place, load, resolve
from hicache.launch.manifest import RunFolder
from hicache.launch.prompts import given
from hicache.launch.run import run
from hicache.launch.settings import Settings
from hicache.launch.tasks import Task, Work
from hicache.launch.workers import Result, Staff, Workers

Row = tuple[str, float, str]


class _Loaded:
    """Workers that have loaded the model already."""

    count = 1

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    def draw(self, tasks: Iterator[Task]) -> Iterator[Result]:
        for task in tasks:
            yield from self._painter.draw(task)

    def close(self) -> None:
        """It draws again in the next round."""


class _Timed(ShapesPipeline):
    """The bundled pipeline, and the seconds spent in it."""

    seconds = 0.0

    @functools.wraps(ShapesPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        start = time.perf_counter()
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def overhead_rows(pictures: int, steps: int, rounds: int) -> list[Row]:
    """A bare loop against the launcher."""
    prompts = random_prompts(pictures, 3)
    settings, backend = resolve(Settings(steps=steps))
    pipe = load(settings, Place())
    pipe.__class__ = _Timed
    painter = Painter(pipe, settings, backend)
    taken: dict[str, list[tuple[float, float]]] = {"bare loop": [], "hicache generate": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            out = Path(folder) / f"{number}"
            out.mkdir()
            ours = out / "launched"
            calls = {
                "bare loop": functools.partial(_bare, pipe, prompts, steps, out),
                "hicache generate": functools.partial(_launched, painter, prompts, settings, ours),
            }
            for name, call in calls.items():
                pipe.seconds, start = 0.0, time.perf_counter()
                call()
                total = time.perf_counter() - start
                taken[name].append((total - pipe.seconds, pipe.seconds))
    outside = {name: statistics.median(pair[0] for pair in pairs[1:]) for name, pairs in taken.items()}
    inside = statistics.median(pair[1] for pairs in taken.values() for pair in pairs[1:])
    return [
        ("inside the pipeline", 1e3 * inside / pictures, "ms a picture"),
        *((f"outside, {name}", 1e3 * value / pictures, "ms a picture") for name, value in outside.items()),
        ("overhead", 100 * (outside["hicache generate"] - outside["bare loop"]) / inside, "%"),
    ]


def _bare(pipe: Any, prompts: list[str], steps: int, out: Path) -> None:
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(index)
        picture = pipe(prompt, steps, guidance_scale=4.0, generator=generator).images[0]
        picture.save(out / f"{index:06d}.png")


def _launched(painter: Painter, prompts: list[str], settings: Settings, out: Path) -> None:
    with RunFolder(out, settings) as folder:
        run(Work(given(prompts), settings), folder, lambda: _Loaded(painter))


def worker_rows(pictures: int, steps: int, rounds: int) -> list[Row]:
    """One process against two workers, in turn; medians of rounds."""
    settings, backend = resolve(Settings(steps=steps))
    work = Work(given(random_prompts(pictures, 3)), settings)
    rates: dict[int, list[float]] = {1: [], 2: []}
    teams = {count: hire(Staff(gpus="cpu", workers=count, threads=1), settings, backend) for count in rates}
    for workers in teams.values():
        _rate(workers, work)  # loads, and draws the first pictures
    for _ in range(rounds):
        for count, workers in teams.items():
            rates[count].append(_rate(workers, work))
    for workers in teams.values():
        workers.close()
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    return [
        ("one process", one, "pictures a second"),
        ("two workers", two, "pictures a second"),
        ("two workers over one process", two / one, "x"),
    ]


def _rate(workers: Workers, work: Work) -> float:
    """Pictures a second."""
    start = time.perf_counter()
    count = sum(1 for _ in workers.draw(work.tasks(lambda picture: True)))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=16, help="of a round")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-workers", action="store_true", help="leave out the second part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = overhead_rows(options.pictures, options.steps, options.rounds)
    if not options.no_workers:
        rows += worker_rows(options.pictures, options.steps, options.rounds)
    print(
        tables.markdown(
            ("what", "value", "unit"), [(name, f"{value:.4g}", unit) for name, value, unit in rows]
        )
    )
    where = (device_name("cpu"), versions())
    tables.save_csv(
        options.csv, ("what", "value", "unit", "device", "versions"), [(*row, *where) for row in rows]
    )


if __name__ == "__main__":
    main()
