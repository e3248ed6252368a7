"""Times a few functions in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float
    calls: int


def time_together(
    functions: Mapping[str, Call],
    rounds: int = 15,
    device: str = "cpu",
    seconds: float = float("inf"),
    before: Call | None = None,
) -> dict[str, Timing]:
    """Call every function once a round, so that a busy moment of the machine hits all alike.

    The order changes from round to round: a call pays for writing back what the one before it left in the
    caches. The first round is not counted. On ``cuda`` a call is timed by events, with the L2 cache flushed
    first.

    Args:
        functions: what to time, by name.
        rounds: counted rounds.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: stop early when counted rounds took this long, but not before three of them; a function one
            call of which takes longer is counted once.
        before: called before every call, not timed.
    """
    measure = _on_cuda() if device == "cuda" else _on_cpu
    values: dict[str, list[float]] = {name: [] for name in functions}
    slow: set[str] = set()
    shuffle = random.Random(0)
    started = 0.0
    for index in range(rounds + 1):
        for name in shuffle.sample(list(functions), len(functions)):
            if name in slow:
                continue
            if before is not None:
                before()
            elapsed = measure(functions[name])
            if index:  # the first call may have compiled something
                values[name].append(elapsed)
                if elapsed > seconds > 0:
                    slow.add(name)
        if index == 0:
            started = time.perf_counter()
        if index >= 3 and time.perf_counter() - started > seconds:
            break
    timings = {}
    for name, taken in values.items():
        if len(taken) == 1:
            timings[name] = Timing(taken[0], taken[0], taken[0], 1)
            continue
        cuts = statistics.quantiles(taken, n=10, method="inclusive")
        timings[name] = Timing(cuts[1], statistics.median(taken), cuts[7], len(taken))
    return timings


def capture(function: Call, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """Capture calls into one CUDA graph, after a call outside of it: kernels must be compiled before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return graph


def time_in_graph(function: Call, repeats: int = 32, rounds: int = 9) -> float:
    """Return median seconds a call inside one CUDA graph, caches warm: no Python in between."""
    graph = capture(function, repeats)
    taken = []
    for index in range(rounds + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if index:
            taken.append(float(start.elapsed_time(stop)) / 1e3 / repeats)
    return statistics.median(taken)


def _on_cpu(function: Call) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _on_cuda() -> Callable[[Call], float]:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any L2

    def measure(function: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return measure
