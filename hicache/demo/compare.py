"""Draw the same prompts with and without the cache, and compare pictures and time."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import hicache.fast
from hicache.config import HiCacheConfig
from hicache.demo.pipeline import ShapesPipeline

Pictures = np.ndarray[Any, Any]  # [n, height, width, 3] in [0, 1]


def psnr(full: Pictures, cached: Pictures) -> list[float]:
    """PSNR of each cached picture against its full one, dB; inf where they are equal."""
    with np.errstate(divide="ignore"):
        return [
            float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(full, cached, strict=True)
        ]


def ssim(full: Pictures, cached: Pictures) -> list[float]:
    """Structural similarity of each cached picture to its full one; 1 where they are equal."""
    return [
        float(structural_similarity(a, b, data_range=1.0, channel_axis=-1))
        for a, b in zip(full, cached, strict=True)
    ]


@dataclass
class Run:
    """Pictures ``[n, 32, 32, 3]`` in [0, 1] and the seconds the denoising loop took."""

    pictures: Pictures
    seconds: float


@dataclass
class Comparison:
    """A full run beside a cached one of the same prompts, noise and steps."""

    full: Run
    cached: Run
    stats: hicache.fast.Stats

    @property
    def speedup(self) -> float:
        """Wall-clock, of the denoising loop."""
        return self.full.seconds / self.cached.seconds

    @property
    def psnr(self) -> list[float]:
        """PSNR of each cached picture against its full one, dB; inf where they are equal."""
        return psnr(self.full.pictures, self.cached.pictures)

    @property
    def ssim(self) -> list[float]:
        """Structural similarity of each cached picture to its full one; 1 where they are equal."""
        return ssim(self.full.pictures, self.cached.pictures)


def compare(
    pipe: ShapesPipeline,
    prompts: Sequence[str],
    config: HiCacheConfig | None = None,
    *,
    speedup: float | None = None,
    steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    granularity: str = "stack",
    backend: str = "auto",
    repeats: int = 3,
) -> Comparison:
    """Run the pipeline in full and with HiCache, in turn, ``repeats`` times; medians of the times count.

    Arguments are those of :func:`hicache.fast.apply` and of the pipeline. The stack is cached by default: on
    a model this small, reading the history of its modules takes as long as its head. One step of each kind
    comes first, untimed: threads are started and the history is allocated there.
    """
    keep_freed_memory()

    def draw(count: int) -> Run:
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        # latents: the time is the denoising loop's, without making pictures
        latents = pipe(
            list(prompts), count, guidance_scale=guidance_scale, generator=generator, output_type="latent"
        ).images
        seconds = time.perf_counter() - start
        return Run(pipe.decode(latents, "np"), seconds)

    def draw_cached(count: int) -> tuple[Run, hicache.fast.Stats]:
        applied = hicache.fast.apply(pipe, config, speedup=speedup, granularity=granularity, backend=backend)
        with applied as handle:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one step is out of reach of any speedup=
                draw(1)
            return draw(count), handle.stats

    draw(1)
    pairs = [(draw(steps), draw_cached(steps)) for _ in range(repeats)]
    full, cached = [full for full, _ in pairs], [run for _, (run, _) in pairs]
    _, (_, stats) = pairs[-1]
    return Comparison(_median(full), _median(cached), stats)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed.

    It hands large blocks back to the kernel, and getting them again takes up to a fifth of a step on a CPU:
    now on one side of a comparison, now on the other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)


def _median(runs: list[Run]) -> Run:
    """The same pictures each time, and the median of the times."""
    return Run(runs[0].pictures, statistics.median(run.seconds for run in runs))
