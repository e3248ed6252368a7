"""Interleaved timing of a few functions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass
class Timing:
    """Seconds a call: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def time_together(
    functions: Mapping[str, Callable[[], object]], rounds: int = 15, device: str = "cpu"
) -> dict[str, Timing]:
    """Call every function once a round, in turn, so that a busy moment of the machine hits all alike.

    The first round is not counted. On ``cuda`` a call is timed by events, with the L2 cache flushed first.
    """
    measure = _on_cuda() if device == "cuda" else _on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(rounds + 1), desc="timing", leave=False):
        for name, function in functions.items():
            elapsed = measure(function)
            if index:
                seconds[name].append(elapsed)
    timings = {}
    for name, values in seconds.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        timings[name] = Timing(cuts[1], statistics.median(values), cuts[7])
    return timings


def _on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _on_cuda() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2

    def measure(function: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return measure
