"""Whether what was fitted is better, on pictures it was not fitted to and by the path that users run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

import hicache.fast
from hicache.config import HiCacheConfig
from hicache.fitting.pictures import Pictures


@dataclass(frozen=True)
class Verdict:
    """PSNR against full runs, dB, of every held-out picture, by the prior and by what was fitted."""

    prior: tuple[float, ...]
    fitted: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self._gains)

    @property
    def better(self) -> bool:
        """Whether the gain is no chance: more than twice its standard error."""
        error = statistics.stdev(self._gains) / math.sqrt(len(self._gains)) if len(self._gains) > 1 else 0.0
        return self.gain > 2 * error

    @property
    def _gains(self) -> list[float]:
        return [new - old for old, new in zip(self.prior, self.fitted, strict=True)]

    def scores(self) -> dict[str, float]:
        """For the file."""
        named = {"prior": self.prior, "fitted": self.fitted}
        found: dict[str, float] = {"pictures": len(self.fitted)}
        for name, values in named.items():
            found[f"{name} mean dB"] = round(statistics.fmean(values), 2)
            found[f"{name} worst dB"] = round(min(values), 2)
        return found


class Judge:
    """Draws held-out pictures in full once, and with any settings beside them.

    Args:
        pipe: the pipeline, not cached.
        pictures: that nothing is fitted to.
        granularity: what is cached.
    """

    def __init__(self, pipe: Any, pictures: Pictures, granularity: str = "stack") -> None:
        self._pipe = pipe
        self._pictures = pictures
        self._granularity = granularity
        self._full = self._draw()

    def psnr(self, config: HiCacheConfig) -> tuple[float, ...]:
        """Of every picture, dB."""
        with hicache.fast.apply(self._pipe, config, granularity=self._granularity):
            drawn = self._draw()
        return tuple(_psnr(one, other) for one, other in zip(self._full, drawn, strict=True))

    def _draw(self) -> list[Any]:
        found: list[Any] = []
        for batch in self._pictures.batches():
            found += list(self._pipe(**self._pictures.arguments(batch, "np"))[0])
        return found


def _psnr(one: Any, other: Any) -> float:
    error = float(np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())
    return 10 * math.log10(1 / max(error, 1e-10))
