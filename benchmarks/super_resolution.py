"""Super-resolution by 4 with and without a cache: how near to the full run, and to the true picture.

``python -m benchmarks.super_resolution --csv benchmarks/results/super-resolution.csv``: the bundled upscaler,
28 steps, pictures of shapes that it was not trained on. ``whole``: 8 × 8 pixels to 32 × 32, one call a step.
``tiled``: 16 × 16 to 64 × 64 by four tiles, four calls a step with histories of their own. ``module`` records
every attention and MLP; ``output`` what the transformer returns. Bicubic interpolation is beside it.

``--picture FILE`` draws the first six too: small, bicubic, the full run, two cached ones, the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

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
    pipe, small, images = upscaled(count, size)
    wanted = _shown(images)
    full = draw(pipe, small, steps)
    rows = [
        Row(size, "bicubic", None, _shown(upscaler.enlarge(small * 2 - 1))),
        Row(size, "full run", steps, full),
    ]
    for granularity in GRANULARITIES:
        for interval in INTERVALS:
            config = HiCacheConfig(interval=interval)
            with hicache.fast.apply(pipe, config, granularity=granularity):
                drawn = draw(pipe, small, steps)
            rows.append(
                Row(size, f"HiCache {granularity} N={interval}", len(full_steps(config, steps)), drawn)
            )
    return [row.cells(full, wanted) for row in rows]


def sheet(steps: int, count: int = 6) -> Image.Image:
    """Rows: pictures. Columns: small, bicubic, the full run, N=3 and N=7 by output, the truth."""
    pipe, small, images = upscaled(count, "tiled")
    shown = functional.interpolate(small, scale_factor=upscaler.SCALE, mode="nearest")
    columns = [_shown(shown * 2 - 1), _shown(upscaler.enlarge(small * 2 - 1)), draw(pipe, small, steps)]
    for interval in (3, 7):
        with hicache.fast.apply(pipe, HiCacheConfig(interval=interval), granularity="output"):
            columns.append(draw(pipe, small, steps))
    columns.append(_shown(images))
    whole = np.concatenate([np.concatenate(list(column), axis=0) for column in columns], axis=1)
    made = Image.fromarray((whole * 255).round().astype("uint8"))
    return made.resize((made.width * 2, made.height * 2), Image.Resampling.NEAREST)


def upscaled(count: int, size: str) -> tuple[upscaler.ShapesUpscaler, torch.Tensor, torch.Tensor]:
    """The upscaler, pictures of one of :data:`SIZES` made small, in [0, 1], and as they are, in [−1, 1]."""
    pipe = hicache.demo.load_upscaler()
    pipe.set_progress_bar_config(disable=True)
    _, images = pictures.sample(count, torch.Generator().manual_seed(SEED), SIZES[size])
    return pipe, upscaler.shrink(images / 2 + 0.5), images


def draw(pipe: upscaler.ShapesUpscaler, small: torch.Tensor, steps: int) -> Pictures:
    """The pictures, each from noise of its own."""
    noise = [torch.Generator().manual_seed(NOISE_SEED + index) for index in range(len(small))]
    drawn: Pictures = pipe(small, steps, generator=noise, output_type="np").images
    return drawn


def _shown(images: torch.Tensor) -> Pictures:
    """``[pictures, 3, height, width]`` in [−1, 1] as pictures."""
    shown: Pictures = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return shown


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--picture", type=Path, help="a sheet of the first pictures")
    options = parser.parse_args()
    if options.picture:
        sheet(options.steps).save(options.picture)
    rows = [row for size in SIZES for row in sweep(size, options.pictures, options.steps)]
    print(tables.markdown(HEADER, rows))
    software = versions()
    tables.save_csv(options.csv, (*HEADER, "versions"), [(*row, software) for row in rows])


if __name__ == "__main__":
    main()
