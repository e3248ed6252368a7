"""For tests that time something; all of them are marked ``perf``."""

from __future__ import annotations

from collections.abc import Callable


def best_of(measure: Callable[[], float], wanted: float, tries: int = 3) -> float:
    """The best of some measurements, the last of them the first that reaches ``wanted``."""
    best = 0.0
    for _ in range(tries):
        best = max(best, measure())
        if best >= wanted:
            break
    return best
