"""Which steps are full: schedules, and what follows from one for a run.

A schedule is a class with settings of its own:

>>> import dataclasses
>>> from hicache import HiCacheConfig, Schedule, full_steps
>>> @dataclasses.dataclass(frozen=True)
... class EveryOther(Schedule):
...     def is_full(self, step, last_full, num_steps=None):
...         return step % 2 == 0
>>> full_steps(HiCacheConfig(schedule=EveryOther()), 6)
[0, 2, 4]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from hicache.checks import check_whole
from hicache.run import Run


class Online(Protocol):
    """Decides which steps are full while a run goes on, from what the model is given.

    Steps are those of the run. Until a step has come, the schedule's ``is_full`` says what is expected of it.
    """

    def measures(self, step: int) -> bool:
        """Whether it matters how much the latents of a step have changed."""

    def asks(self, step: int) -> bool:
        """Whether the steps after this one, which is full, are to be decided now."""

    def filtered(self, latents: Tensor, step: int) -> Tensor:
        """What of latents is compared with those of the next step: another tensor, of a shape that stays."""

    def ask(self, step: int, answer: Callable[[], Mapping[int, float]]) -> None:
        """Full step ``step`` begins: ``answer`` gives changes, by step, and may wait for the device."""

    def hear(self) -> None:
        """Decide the steps after the one asked at, from its answer."""

    def note(self, step: int) -> None:
        """A step is full, whether that was decided or not."""

    def end(self, step: int) -> None:
        """A call of a step has ended."""


class Schedule(ABC):
    """A rule that says which steps are full."""

    #: Whether it looks at the scheduler's noise levels, which are read from the device once a run.
    reads_sigmas: ClassVar[bool] = False
    #: Why another rule is followed in this run, if one is.
    fallback: str | None = None

    @property
    def online(self) -> Online | None:
        """What decides while the run goes on; None where all is known before it."""
        return None

    @abstractmethod
    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        """Whether the transformer runs at this step.

        Args:
            step: ordinal of the step, from 0.
            last_full: ordinal of the last full step; None if there was none, and then there is nothing to
                forecast from: the step is full whatever this says.
            num_steps: steps of the run, if known.
        """

    def for_run(self, run: Run) -> Schedule:
        """What is followed in a run; itself, unless it depends on the run."""
        return self

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        """The same kind of schedule with ``count`` full steps in a run, or fewer: for ``speedup=``.

        Raises:
            ValueError: its steps are given.
        """
        raise ValueError(
            f"hicache: speedup= chooses the number of full steps, and {type(self).__name__} has its own: "
            "leave one of them out"
        )


@dataclass(frozen=True)
class Interval(Schedule):
    """The paper's: a warm-up, then one of ``interval`` steps.

    A step is full in the warm-up, when ``interval - 1`` steps were skipped since the last full one, and, if
    so chosen, when it is the last of the run.

    Args:
        interval: N >= 1.
        warmup: full steps at the start, >= 1.
        last_step_full: run the transformer at the last step, too.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    interval: int = 7
    warmup: int = 3
    last_step_full: bool = False

    def __post_init__(self) -> None:
        check_whole("Interval.interval", self.interval)
        check_whole("Interval.warmup", self.warmup)

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        if last_full is None or step < self.warmup or step - last_full >= self.interval:
            return True
        return self.last_step_full and num_steps is not None and step >= num_steps - 1

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        """The smallest interval with no more full steps; where none has, the smallest with the least."""
        best = replace(self, interval=1)
        for interval in range(1, (run.num_steps or 0) + 1):
            candidate = replace(self, interval=interval)
            if len(places(candidate, run.num_steps)) < len(places(best, run.num_steps)):
                best = candidate
            if len(places(best, run.num_steps)) <= count:
                break
        return best


class Steps(Schedule):
    """These steps: ``Steps(0, 1, 2, 4, 6, 11, 24, 41, 49)``; the first is full in any case.

    Args:
        steps: ordinals from 0, each once, rising.

    Raises:
        TypeError, ValueError: no ordinals, or not rising.
    """

    def __init__(self, *steps: int) -> None:
        for step in steps:
            check_whole("Steps", step, 0)
        if not steps or list(steps) != sorted(set(steps)):
            raise ValueError(f"Steps: expected at least one ordinal, rising, got {steps}")
        self.steps = tuple(int(step) for step in steps)
        self._members = frozenset(self.steps)

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return step in self._members

    def __repr__(self) -> str:
        return f"Steps({', '.join(map(str, self.steps))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and other.steps == self.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def to_plain(self) -> dict[str, Any]:
        """For :mod:`hicache.plain_data`."""
        return {"steps": list(self.steps)}

    @classmethod
    def from_plain(cls, steps: list[int]) -> Steps:
        """For :mod:`hicache.plain_data`."""
        return cls(*steps)


@dataclass(frozen=True)
class Instead(Schedule):
    """A schedule in the place of one that does not hold for a run."""

    taken: Schedule
    fallback: str | None = None

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return self.taken.is_full(step, last_full, num_steps)


@dataclass(frozen=True)
class Geometric(Schedule):
    """A warm-up, then gaps that grow by one factor up to the last step, which is full.

    Args:
        count: full steps of a run, more than ``warmup``.
        warmup: full steps at the start, >= 1.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    count: int = 9
    warmup: int = 3

    def __post_init__(self) -> None:
        check_whole("Geometric.warmup", self.warmup)
        check_whole("Geometric.count", self.count, int(self.warmup) + 1)

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        if num_steps is None:
            raise ValueError("hicache: Geometric needs the number of steps: pass scheduler=")
        return step in self.places(num_steps)

    def for_run(self, run: Run) -> Schedule:
        return self if run.num_steps is None else Steps(*self.places(run.num_steps))

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        return replace(self, count=max(count, self.warmup + 1))

    def places(self, num_steps: int) -> list[int]:
        """The full steps of a run."""
        warmup, left = self.warmup, self.count - self.warmup
        if num_steps <= self.count:
            return list(range(num_steps))
        reach = num_steps - warmup  # from the last step of the warm-up to the last of the run
        low, high = 1.0, float(reach)
        for _ in range(60):  # halvings on the way to the factor at which the gaps reach that far
            factor = (low + high) / 2
            total = sum(factor**k for k in range(1, left + 1))
            low, high = (low, factor) if total > reach else (factor, high)
        found = list(range(warmup))
        for index in range(1, left + 1):
            share = sum(low**k for k in range(1, index + 1)) / sum(low**k for k in range(1, left + 1))
            # whole steps, each later than the one before, that leave one for each that is still to come
            place = max(found[-1] + 1, warmup - 1 + round(reach * share))
            found.append(min(place, num_steps - 1 - (left - index)))
        return found


class _Settings(Protocol):
    """What of :class:`~hicache.HiCacheConfig` says which steps are full."""

    @property
    def warmup(self) -> int:
        """Full steps at the start."""

    @property
    def places_by(self) -> Schedule:
        """The schedule."""

    def with_schedule(self: Settings, schedule: Schedule) -> Settings:
        """The same settings with another schedule."""


Settings = TypeVar("Settings", bound=_Settings)


def is_full(config: _Settings, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
    """Whether the transformer runs at this step: as the schedule says, and where there was no full step yet.

    Args:
        config: the cache's settings.
        step: ordinal of the step, from 0.
        last_full: ordinal of the last full step; None if there was none.
        num_steps: steps of the run, if known.
    """
    return last_full is None or config.places_by.is_full(step, last_full, num_steps)


def places(schedule: Schedule, num_steps: int | None) -> list[int]:
    """The full steps of a run of so many."""
    steps: list[int] = []
    for step in range(num_steps or 0):
        if not steps or schedule.is_full(step, steps[-1], num_steps):
            steps.append(step)
    return steps


def full_steps(config: _Settings, num_steps: int) -> list[int]:
    """The full steps of a run: 0, 1, 2, 9, 16, 23, 30, 37, 44 for the defaults and 50 steps."""
    return places(config.places_by, num_steps)


def bound(config: _Settings, num_steps: int) -> float:
    """The highest speed-up a run can have: steps / full steps."""
    return num_steps / len(full_steps(config, num_steps)) if num_steps else 1.0


def with_speedup(config: Settings, speedup: float, num_steps: int, run: Run | None = None) -> Settings:
    """``config`` with the most full steps whose bound reaches ``speedup`` in a run of ``num_steps``.

    Where no number of its schedule reaches it (the warm-up alone may take too many steps), with the fewest.

    Args:
        config: the cache's settings; its schedule places the full steps.
        speedup: steps / full steps, >= 1.
        num_steps: of the run.
        run: what else is known of it.

    Raises:
        ValueError: the schedule has its own number of full steps.
    """
    run = replace(run or Run(), num_steps=num_steps)
    # Steps and full steps are whole numbers; speedup often is their rounded quotient (5.56 for 50/9 = 5.555…)
    counts = [count for count in range(1, num_steps + 1) if round(num_steps / count, 2) >= round(speedup, 2)]
    return config.with_schedule(config.places_by.with_full_steps(max(counts, default=1), run))
