"""How far pictures are from full ones with full steps that are decided online, on the bundled model.

``python -m benchmarks.online --csv benchmarks/results/online.csv``: 50 steps, order 2, by stack, 16 random
prompts one at a time, each from noise of its own; PSNR of each picture against its full run. ``Interval(7)``
has 9 full steps, every ``InputChange`` at most as many. Frozen places are those of the first picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

import hicache.demo
import hicache.fast
from benchmarks.common import command, tables
from benchmarks.common.machine import versions
from hicache import HiCacheConfig, InputChange, Interval, Schedule
from hicache.demo.pipeline import ShapesPipeline
from hicache.demo.prompts import random_prompts

STEPS: Final = 50
PROMPTS: Final = 16
SEED: Final = 2026  # of prompts that nothing was chosen by
BASES: Final = ("hermite", "reuse")
SCHEDULES: Final[dict[str, Schedule]] = {
    "Interval(7)": Interval(7),
    "InputChange(9)": InputChange(9),
    "InputChange(9, freeze=True)": InputChange(9, freeze=True),
    "InputChange(9, filter='sea')": InputChange(9, filter="sea"),
    "InputChange(9, last_step_full=True)": InputChange(9, last_step_full=True),
}
HEADER: Final = ("basis", "schedule", "full steps, mean", "full steps, most", "mean PSNR dB", "worst PSNR dB")


@dataclass(frozen=True)
class Row:
    """One of :data:`SCHEDULES` with one basis."""

    basis: str
    schedule: str
    full: list[int]  # full steps, picture by picture
    psnr: list[float]

    @property
    def cells(self) -> tuple[str, ...]:
        """As in :data:`HEADER`."""
        numbers = f"{np.mean(self.full):.2f}", str(max(self.full)), f"{np.mean(self.psnr):.2f}"
        return (self.basis, self.schedule, *numbers, f"{min(self.psnr):.2f}")


def draw(pipe: ShapesPipeline, prompt: str, seed: int, steps: int) -> np.ndarray[Any, Any]:
    """A picture ``[height, width, 3]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    picture: np.ndarray[Any, Any] = pipe(prompt, steps, generator=generator, output_type="np").images[0]
    return picture


def sweep(steps: int = STEPS, count: int = PROMPTS) -> list[Row]:
    """Measure every schedule with every basis."""
    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    prompts = list(enumerate(random_prompts(count, SEED)))
    full = [draw(pipe, prompt, seed, steps) for seed, prompt in prompts]
    rows = []
    for basis in BASES:
        for name, schedule in SCHEDULES.items():
            psnr, places = [], []
            config = HiCacheConfig(basis=basis, schedule=schedule)
            with hicache.fast.apply(pipe, config, granularity="stack") as handle:
                for seed, prompt in prompts:
                    drawn = draw(pipe, prompt, seed, steps)
                    psnr.append(float(peak_signal_noise_ratio(full[seed], drawn, data_range=1.0)))
                    places.append(len(handle.stats.places))
            rows.append(Row(basis, name, places, psnr))
    return rows


def main() -> None:
    options = command.parser(__doc__).parse_args()
    rows = [row.cells for row in sweep()]
    print(tables.markdown(HEADER, rows))
    software = versions()
    tables.save_csv(options.csv, [*HEADER, "versions"], [(*row, software) for row in rows])


if __name__ == "__main__":
    main()
