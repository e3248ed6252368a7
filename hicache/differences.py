"""Which differences exist at a step of a run, and the numbers that forecasts and updates need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def coming(
        self, config: HiCacheConfig, span: Span, is_full: Callable[[int, int | None], bool]
    ) -> Iterator[tuple[float, ...]]:
        """The numbers of all steps to come."""
        differences = self
        for step in range((self.last_full or 0) + 1, span.num_steps or 0):
            if is_full(step, differences.last_full):
                differences = differences.after(step, config)
                yield differences.inv_gap
            else:
                yield differences.coeffs(step, config, span, padded=False)
                yield differences.coeffs(step, config, span, padded=True)


def positions(config: HiCacheConfig, num_steps: int, context: str = "") -> dict[int, Position]:
    """Where the forecasts of a run's skipped steps are made, by step.

    Args:
        config: settings of the run.
        num_steps: of the run.
        context: see :meth:`Engine.reset`.
    """
    differences, found, span = Differences(), {}, Span(num_steps, None, context)
    for step in range(num_steps):
        if is_full(config, step, differences.last_full, num_steps):
            differences = differences.after(step, config)
        else:
            found[step] = differences.position(step, span)
    return found
