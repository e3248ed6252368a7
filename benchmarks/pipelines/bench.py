"""One model, its inputs, its loop, and the ways to run it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

import hicache.fast
from benchmarks.common.machine import available_bytes
from benchmarks.pipelines.models import Model, build, denoise, random_inputs
from hicache import HiCacheConfig
from hicache.planned import Plan
from hicache.schedule import full_steps

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
PARITY_STEPS = 2  # compared with interval=1: a step that is learned from, and one that is not
_BUDGET = 1 << 50  # bytes: what is cached is asked for by name, and graphs are timed whatever they take
_MARGIN = 1.15  # over what full steps alone take


@dataclass(frozen=True)
class Variant:
    """A way to run a loop: cached by what, replayed, compiled."""

    granularity: str | None  # None: uncached
    graphs: bool | str = False  # apply()'s cuda_graphs
    compiled: bool = False

    def __str__(self) -> str:
        parts = [self.granularity or "uncached"]
        if self.graphs:
            parts.append("CUDA graphs" + " of skipped steps" * (self.graphs == "skipped"))
        parts += ["compiled"] * self.compiled
        return ", ".join(parts)


class StepTimer:
    """Milliseconds between calls, each of which waits until the device is idle."""

    def __init__(self, device: str) -> None:
        self.ms: list[float] = []
        self._device = device
        self._last: Any = None

    def __call__(self) -> None:
        now: Any
        if self._device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            now.synchronize()
            if self._last is not None:
                self.ms.append(self._last.elapsed_time(now))
        else:
            now = time.perf_counter()
            if self._last is not None:
                self.ms.append((now - self._last) * 1e3)
        self._last = now


class Bench:
    """One model, its inputs and its loop.

    Args:
        model: of ``MODELS``.
        config: the cache's settings.
        steps: of a whole loop.
        device: ``"cuda"`` or ``"cpu"``.
        deadline: of ``time.monotonic()``.
    """

    def __init__(self, model: Model, config: HiCacheConfig, steps: int, device: str, deadline: float) -> None:
        self.model, self.config, self.steps, self.device = model, config, steps, device
        self._deadline = deadline
        dtype = DTYPES[device]
        self.transformer = build(model, device, dtype)
        self.inputs = random_inputs(model, self.transformer, device, dtype)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.full = full_steps(config, steps)
        self.reset_peak()
        weights = self.peak()
        marks = StepTimer(device)
        self.reference = self.run(PARITY_STEPS, marks)
        self.activations = self.peak() - weights
        self.full_seconds = marks.ms[-1] / 1e3

    def run(
        self, stop: int | None = None, mark: Callable[[], None] | None = None, replay: bool = True
    ) -> Tensor:
        """Run the loop, or its first steps.

        ``replay=False`` runs the steps of a cache with CUDA graphs eagerly: gradients are enabled, with which
        no graph is used, and nothing requires one.
        """
        with torch.set_grad_enabled(not replay):
            return denoise(self.transformer, self.inputs, self.scheduler, self.steps, stop, mark)

    def timed(self) -> tuple[Tensor, float]:
        """Run a whole loop; return its latents and its seconds."""
        self._synchronize()
        start = time.perf_counter()
        latents = self.run()
        self._synchronize()
        return latents, time.perf_counter() - start

    def step_ms(self, stop: int) -> tuple[float | None, float | None]:
        """Time the first ``stop`` steps of a loop; return median milliseconds of full and of skipped ones."""
        marks = StepTimer(self.device)
        self.run(stop, marks)
        full = [ms for step, ms in enumerate(marks.ms) if step in self.full]
        skipped = [ms for step, ms in enumerate(marks.ms) if step not in self.full]
        return median(full[1:] or full), median(skipped)

    def apply(self, variant: Variant, config: HiCacheConfig | None = None) -> hicache.fast.Handle:
        """Cache the transformer as a variant does."""
        assert variant.granularity is not None
        return hicache.fast.apply(
            self.transformer,
            config or self.config,
            scheduler=self.scheduler,
            granularity=variant.granularity,
            memory_budget=_BUDGET,
            cuda_graphs=variant.graphs,
        )

    def first_steps(self, variant: Variant, whole: bool) -> int:
        """Count the steps a variant is warmed up with, which are then timed by themselves.

        Of a cached one, beside whole loops: over two intervals, as full steps are captured at the second
        time and skipped ones after that. Without: to the last skipped step after the warm-up.
        """
        if variant.granularity is None:
            return PARITY_STEPS
        warmup, interval = self.config.warmup, self.config.interval
        return min(self.steps, warmup + 2 * interval + 1 if whole else warmup + max(1, interval - 1))

    def cost(self, variant: Variant, whole: bool) -> int:
        """Count the full steps of measuring a variant."""
        first = self.first_steps(variant, whole)
        if variant.granularity is None:
            return first + PARITY_STEPS + 1 + self.steps * whole
        runs = 3 if variant.graphs else 2
        return runs * sum(step < first for step in self.full) + len(self.full) * whole

    def affords(self, steps: float) -> bool:
        """Say whether there is time for so many full steps."""
        return time.monotonic() + _MARGIN * self.full_seconds * steps <= self._deadline

    def module_fits(self) -> bool:
        """Say whether the history by module fits beside the activations, a graph's included."""
        release(self.device)
        history = self._plan(Variant("module")).history_bytes
        return history + 2 * self.activations <= 0.9 * available_bytes(self.device)

    def planned_graphs_bytes(self, variant: Variant) -> int:
        """Return what ``plan()`` says of the CUDA graphs of a variant."""
        [plan] = self._plan(variant).denoisers.values()
        return plan.graphs_nbytes

    def _plan(self, variant: Variant) -> Plan:
        assert variant.granularity is not None
        return hicache.fast.plan(
            self.transformer,
            self.config,
            **self.model.drawn,
            granularity=variant.granularity,
            memory_budget=_BUDGET,
            cuda_graphs=variant.graphs,
            dtype=DTYPES[self.device],
        )

    def reset_peak(self) -> None:
        """Count the bytes allocated at most from here on."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the most bytes allocated since :meth:`reset_peak`; 0 on a CPU, where nobody counts."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def compiled_blocks(transformer: Any) -> Iterator[None]:
    """Compile the blocks for as long as this lasts; torch keeps what is compiled once."""
    # compile_repeated_blocks() does the same where the class names its blocks, which SD3's does not
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what compile() set


def release(device: str) -> None:
    """Give a GPU's memory back that nobody uses; a CPU has enough for small models."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def median(values: Sequence[float]) -> float | None:
    """Return the median; None without values."""
    return statistics.median(values) if values else None
