"""What a cache reports of itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hicache.config import HiCacheConfig
from hicache.schedule import Steps


@dataclass
class ContextStats:
    """One context: one call of a denoiser in every step (conditional, unconditional, …)."""

    full_steps: int
    skipped_steps: int
    history_bytes: int


@dataclass
class GraphStats:
    """What CUDA graphs did for one transformer since :func:`hicache.fast.apply`."""

    captures: int = 0
    replays: int = 0
    pool_nbytes: int = 0  # of device memory that captures took
    input_nbytes: int = 0  # beside that: copies of what captured calls are given
    eager: str | None = None  # why calls run without, if they do
    partly: str | None = None  # what is captured, and why not all, if only a part is

    @property
    def nbytes(self) -> int:
        """Bytes of the device that graphs hold."""
        return self.pool_nbytes + self.input_nbytes


@dataclass
class ControlNetStats:
    """The calls of one ControlNet in a run, and how often it ran: not at steps that all contexts skip."""

    calls: int = 0
    runs: int = 0
    always: str | None = None  # why it runs whenever it is called, if it does


@dataclass
class LowRankStats:
    """Gates of low rank, of the worst of a denoiser's contexts."""

    rank: int
    errors: list[float]  # what gates of rank 0 (the stack), 1, … are off by, relative

    @property
    def error(self) -> float:
        """What they are off by, relative."""
        return self.errors[self.rank]


@dataclass
class Stats:
    """What the cache did in the current run, or in the last one if none is going on."""

    config: HiCacheConfig  # as used: with speedup=, the interval it chose
    granularity: str  # "module", "low-rank", "stack", or several where denoisers differ
    backend: str  # as asked for
    contexts: dict[str, ContextStats] = field(default_factory=dict)
    places: tuple[int, ...] = ()  # the full steps of the run, of any of its contexts
    history_bytes: int = 0  # held, all contexts together, those the run no longer uses included
    gates_bytes: int = 0  # of gates held: of steps to come, and of low rank of whole runs
    kept_bytes: int = 0  # of what else is kept for a run: coefficients, embeddings, prompts, companions'
    cache_ms: float = 0.0  # time in recording and forecasting
    choices: dict[str, str] = field(default_factory=dict)  # denoiser → what is cached of it, and why
    backends: dict[str, str] = field(default_factory=dict)  # denoiser → what runs, and why nothing better
    graphs: dict[str, GraphStats] = field(default_factory=dict)  # denoiser → captures, replays, or why none
    controlnets: dict[str, ControlNetStats] = field(default_factory=dict)  # by the pipeline's names for them
    sigmas: dict[str, dict[str, float]] = field(default_factory=dict)  # context → layer → σ, where measured
    low_rank: dict[str, LowRankStats] = field(default_factory=dict)  # denoiser → its gates, where so cached
    companions: dict[str, str] = field(default_factory=dict)  # denoiser → what else changed its full steps

    @property
    def nbytes(self) -> int:
        """Bytes that caching holds: histories, gates, graphs, and what else is kept for a run."""
        graphs = sum(one.nbytes for one in self.graphs.values())
        return self.history_bytes + self.gates_bytes + self.kept_bytes + graphs

    @property
    def schedule(self) -> Steps:
        """The full steps of the run as a schedule, for runs that are to have the same.

        Raises:
            ValueError: no step has been full yet.
        """
        return Steps(*self.places)

    @property
    def full_steps(self) -> int:
        """Full steps of the run: of each denoiser's longest context."""
        return sum(context.full_steps for context in self._longest)

    @property
    def skipped_steps(self) -> int:
        """Skipped steps of the run: of each denoiser's longest context."""
        return sum(context.skipped_steps for context in self._longest)

    @property
    def bound(self) -> float:
        """Steps / full steps: the speed-up if skipped steps took no time."""
        return (self.full_steps + self.skipped_steps) / max(1, self.full_steps)

    @property
    def _longest(self) -> list[ContextStats]:
        """Of every denoiser the context that had most steps: denoisers take turns, contexts share steps."""
        longest: dict[str, ContextStats] = {}
        for label, context in self.contexts.items():
            denoiser = label.split("[")[0]
            held = longest.setdefault(denoiser, context)
            if context.full_steps + context.skipped_steps > held.full_steps + held.skipped_steps:
                longest[denoiser] = context
        return list(longest.values())

    def __str__(self) -> str:
        lines = [
            f"{self.granularity} granularity, {self.backend} backend, {self.config}",
            *(
                f"  {name}: {context.full_steps} full, {context.skipped_steps} skipped, "
                f"{context.history_bytes:,} bytes"
                for name, context in self.contexts.items()
            ),
            f"  full steps: {', '.join(map(str, self.places)) or 'none yet'}",
            *(f"  {name}: {choice}" for name, choice in self.choices.items()),
            *(f"  {name}: backend {taken}" for name, taken in self.backends.items()),
            *(f"  {name}: {what}" for name, what in self.companions.items()),
            *(
                f"  {name}: {graphs.captures} graphs captured, {graphs.nbytes:,} bytes, "
                f"{graphs.replays} replays"
                + (f"; without graphs: {graphs.eager}" if graphs.eager else "")
                + (f"; {graphs.partly}" if graphs.partly else "")
                for name, graphs in self.graphs.items()
            ),
            *(
                f"  {name}: "
                + (
                    f"runs at every step: {net.always}"
                    if net.always
                    else f"{net.runs} of {net.calls} calls run"
                )
                for name, net in self.controlnets.items()
            ),
            *(
                f"  {name}: σ " + ", ".join(f"{layer} {sigma:.3g}" for layer, sigma in sigmas.items())
                for name, sigmas in self.sigmas.items()
            ),
            f"  {self.nbytes:,} bytes held: history {self.history_bytes:,}, gates {self.gates_bytes:,}, else "
            f"{self.kept_bytes:,}, graphs the rest",
            f"  bound {self.bound:.2f}x, cache {self.cache_ms:.2f} ms",
        ]
        return "\n".join(lines)


class Stopwatch:
    """Milliseconds spent in the cache, without waiting for a GPU until they are asked for."""

    def __init__(self) -> None:
        self._ms = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Count what is done inside."""
        started = self.start(device)
        yield
        self.stop(started)

    def start(self, device: torch.device) -> Any:
        """A moment: of the host, or of a GPU's current stream, whichever GPU is current."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event, device

    def stop(self, started: Any) -> None:
        """Count what was done since :meth:`start`."""
        if isinstance(started, float):
            self._ms += (time.perf_counter() - started) * 1e3
        else:
            event, device = started
            self._events.append((event, self.start(device)[0]))

    def read(self) -> float:
        for started, stopped in self._events:
            stopped.synchronize()
            self._ms += started.elapsed_time(stopped)
        self._events.clear()
        return self._ms

    def reset(self) -> None:
        self._ms = 0.0
        self._events.clear()
