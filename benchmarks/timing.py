"""Interleaved timing of a few functions on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm


@dataclass
class Timing:
    """Seconds a call: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def time_together(functions: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, Timing]:
    """Call every function once a round, in turn, so that a busy moment of the machine hits all alike.

    The first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(rounds + 1), desc="timing", leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if index:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        timings[name] = Timing(cuts[1], statistics.median(values), cuts[7])
    return timings
