"""Which steps are full."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from hicache.config import HiCacheConfig


class Schedule(Protocol):
    """A rule that says which steps are full."""

    def __call__(
        self, config: HiCacheConfig, step: int, last_full: int | None, num_steps: int | None = None
    ) -> bool:
        """See :func:`is_full`, which is the paper's."""


def is_full(config: HiCacheConfig, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
    """Whether the transformer runs at this step.

    A step is full in the warm-up, when ``interval - 1`` steps were skipped since the last full one, when
    there is no full step yet to forecast from, and, if so configured, when it is the last of the run.

    Args:
        step: ordinal of the step, from 0.
        last_full: ordinal of the last full step; None if there was none.
        num_steps: steps of the run, if known.
    """
    if last_full is None or step < config.warmup or step - last_full >= config.interval:
        return True
    return config.last_step_full and num_steps is not None and step >= num_steps - 1


def full_steps(config: HiCacheConfig, num_steps: int) -> list[int]:
    """The full steps of a run: 0, 1, 2, 9, 16, 23, 30, 37, 44 for the defaults and 50 steps."""
    steps: list[int] = []
    for step in range(num_steps):
        if is_full(config, step, steps[-1] if steps else None, num_steps):
            steps.append(step)
    return steps


def bound(config: HiCacheConfig, num_steps: int) -> float:
    """The highest speed-up a run can have: steps / full steps."""
    return num_steps / len(full_steps(config, num_steps)) if num_steps else 1.0


def with_speedup(config: HiCacheConfig, speedup: float, num_steps: int) -> HiCacheConfig:
    """``config`` with the smallest interval whose bound reaches ``speedup`` in a run of ``num_steps``.

    Where no interval reaches it (the warm-up alone may take too many steps), the smallest with the highest
    bound.
    """
    best = replace(config, interval=1)
    for interval in range(1, num_steps + 1):
        candidate = replace(config, interval=interval)
        if bound(candidate, num_steps) > bound(best, num_steps):
            best = candidate
        # Steps and full steps are whole numbers; speedup often is their rounded quotient (5.56 for 50/9 =
        # 5.555…).
        if round(bound(best, num_steps), 2) >= round(speedup, 2):
            break
    return best
