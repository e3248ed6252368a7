"""Which differences exist at a step of a run, and the numbers that forecasts and updates need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hicache.basis import evaluate
from hicache.config import HiCacheConfig
from hicache.run import Position
from hicache.schedule import is_full


@dataclass(frozen=True)
class Span:
    """What is known of the steps that an engine serves."""

    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    context: str = ""


@dataclass(frozen=True)
class Differences:
    """Which differences exist after the full steps of a run so far."""

    last_full: int | None = None
    filled: int = 0  # how many, D0 included
    gaps: tuple[int, ...] = ()  # behind them, newest first
    taken: int = 0  # by the update of the last full step

    def after(self, step: int, config: HiCacheConfig) -> Differences:
        """Those after one more full step."""
        # Differences are taken from the last warm-up step on (docs/algorithm.md, "Finite differences").
        if step <= config.warmup - 2 or self.last_full is None:
            return Differences(step, 1, self.gaps)
        taken = min(self.filled, config.order)
        gaps = (step - self.last_full, *self.gaps)[: config.order]
        return Differences(step, taken + 1, gaps, taken)

    def check_before(self, step: int) -> None:
        """Raise ValueError unless a step is after the last full one."""
        if self.last_full is not None and step <= self.last_full:
            raise ValueError(f"Engine: expected a step after the last full step {self.last_full}, got {step}")

    @property
    def inv_gap(self) -> tuple[float]:
        """What the update multiplies by."""
        return (1.0 / self.gaps[0] if self.taken else 1.0,)

    def position(self, step: int, span: Span) -> Position:
        """Where a forecast of a skipped step is made."""
        assert self.last_full is not None
        gaps = self.gaps[: self.filled - 1]
        return Position(step, self.last_full, gaps, self.filled, span.num_steps, span.sigmas, span.context)

    def coeffs(self, step: int, config: HiCacheConfig, span: Span, padded: bool) -> tuple[float, ...]:
        """Coefficients at a skipped step, of all orders if ``padded``."""
        weights = evaluate(config.weighed_by, self.position(step, span))
        return (*weights, *[0.0] * (config.order + 1 - len(weights) if padded else 0))

    def ahead(self, config: HiCacheConfig, span: Span) -> Iterator[tuple[int, bool, Differences]]:
        """The steps to come: each, whether it is full, and the differences that exist once it is done."""
        differences = self
        for step in range(0 if self.last_full is None else self.last_full + 1, span.num_steps or 0):
            full = is_full(config, step, differences.last_full, span.num_steps)
            if full:
                differences = differences.after(step, config)
            yield step, full, differences


def positions(config: HiCacheConfig, num_steps: int, context: str = "") -> dict[int, Position]:
    """Where the forecasts of a run's skipped steps are made, by step.

    Args:
        config: settings of the run.
        num_steps: of the run.
        context: see :meth:`Engine.reset`.
    """
    span = Span(num_steps, None, context)
    return {
        step: differences.position(step, span)
        for step, full, differences in Differences().ahead(config, span)
        if not full
    }
