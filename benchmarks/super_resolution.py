"""Super-resolution by 4 with and without a cache: how near to the full run, and to the true picture.

``python -m benchmarks.super_resolution --csv benchmarks/results/super-resolution.csv``: the bundled upscaler,
28 steps, pictures of shapes that it was not trained on. ``whole``: 8 × 8 pixels to 32 × 32, one call a step.
``tiled``: 16 × 16 to 64 × 64 by four tiles, four calls a step with histories of their own. ``module`` records
every attention and MLP; ``output`` what the transformer returns. Bicubic interpolation is beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

import hicache.demo
import hicache.fast
from benchmarks.common import command, tables
from benchmarks.common.machine import versions
from hicache import HiCacheConfig, full_steps
from hicache.demo import pictures, upscaler
from hicache.demo.compare import Pictures, psnr, ssim

STEPS: Final = 28
PICTURES: Final = 48
SEED: Final = 515_151  # of pictures
NOISE_SEED: Final = 616_161  # the n-th picture's noise is of this seed + n
INTERVALS: Final = (2, 3, 4, 5, 6, 7)
GRANULARITIES: Final = ("module", "output")
SIZES: Final = {"whole": upscaler.TILE, "tiled": 2 * upscaler.TILE}
HEADER: Final = (
    "pictures",
    "method",
    "full steps",
    "PSNR to full, mean",
    "PSNR to full, worst",
    "SSIM to full, mean",
    "PSNR to truth, mean",
    "SSIM to truth, mean",
)


@dataclass(frozen=True)
class Row:
    """What one method made of all pictures."""

    size: str
    method: str
    full_steps: int | None
    drawn: Pictures = field(repr=False)

    def cells(self, full: Pictures, truth: Pictures) -> tuple[str, ...]:
        """As in :data:`HEADER`; nothing is compared with itself."""
        near = ("", "", "") if self.drawn is full else _near(self.drawn, full)
        true, _, like = _near(self.drawn, truth)
        steps = "" if self.full_steps is None else str(self.full_steps)
        return (self.size, self.method, steps, *near, true, like)


def _near(drawn: Pictures, wanted: Pictures) -> tuple[str, str, str]:
    """PSNR in dB, its mean and its worst, and the mean SSIM."""
    decibels = psnr(wanted, drawn)
    return f"{np.mean(decibels):.2f}", f"{min(decibels):.2f}", f"{np.mean(ssim(wanted, drawn)):.4f}"


def sweep(size: str, count: int, steps: int) -> list[tuple[str, ...]]:
    """Measure every method on the pictures of one of :data:`SIZES`."""
    pipe = hicache.demo.load_upscaler(torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    _, images = pictures.sample(count, torch.Generator().manual_seed(SEED), SIZES[size])
    truth = _shown(images)
    small = upscaler.shrink(images / 2 + 0.5)

    def draw() -> Pictures:
        noise = [torch.Generator().manual_seed(NOISE_SEED + index) for index in range(count)]
        drawn: Pictures = pipe(small, steps, generator=noise, output_type="np").images
        return drawn

    full = draw()
    rows = [
        Row(size, "bicubic", None, _shown(upscaler.enlarge(small * 2 - 1))),
        Row(size, "full run", steps, full),
    ]
    for granularity in GRANULARITIES:
        for interval in INTERVALS:
            config = HiCacheConfig(interval=interval)
            with hicache.fast.apply(pipe, config, granularity=granularity):
                drawn = draw()
            rows.append(
                Row(size, f"HiCache {granularity} N={interval}", len(full_steps(config, steps)), drawn)
            )
    return [row.cells(full, truth) for row in rows]


def _shown(images: torch.Tensor) -> Pictures:
    """``[pictures, 3, height, width]`` in [−1, 1] as pictures."""
    shown: Pictures = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return shown


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    rows = [row for size in SIZES for row in sweep(size, options.pictures, options.steps)]
    print(tables.markdown(HEADER, rows))
    software = versions()
    tables.save_csv(options.csv, (*HEADER, "versions"), [(*row, software) for row in rows])


if __name__ == "__main__":
    main()
