"""How long the reference spends recording and forecasting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Timer:
    """Milliseconds of the current run. A GPU is waited for only when they are asked for."""

    def __init__(self) -> None:
        self._run = 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []  # (start, end) on a GPU

    def start_run(self, run: int) -> None:
        """Begin at zero, unless this run has begun already: its denoisers share the timer."""
        if run != self._run:
            self._run, self._seconds = run, 0.0
            self._events.clear()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time of what is done inside, on ``device``."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record(torch.cuda.current_stream(device))  # whichever GPU is current
        yield
        events[1].record(torch.cuda.current_stream(device))
        self._events.append(events)

    @property
    def milliseconds(self) -> float:
        """The sum so far."""
        for _, end in self._events:
            end.synchronize()
        return self._seconds * 1e3 + sum(float(start.elapsed_time(end)) for start, end in self._events)
