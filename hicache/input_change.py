"""A schedule that is decided while a run goes on, by how much the latents have changed, within a budget.

The relative change of the latents from one step to the next, ``δ_s = mean|φ(x_s) - φ(x_{s-1})|`` over
``mean|φ(x_{s-1})|``, costs no block. A step is full once the changes since the last full one sum up to a
threshold τ. That is what the rest of the run is expected to change by, shared among the full steps that are
left: so there are never more than the budget has.

A host that waits for δ of a skipped step waits for the full step before it, and launches nothing meanwhile.
So the next full step is chosen at a full one, from all changes up to there: those to come are taken to be as
those since the full step before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from hicache.checks import check_positive, check_whole
from hicache.input_filter import FILTERS
from hicache.plain_data import to_plain
from hicache.run import Run
from hicache.schedule import Online, Schedule


@dataclass(frozen=True)
class InputChange(Schedule):
    """Full steps where the latents change most, at most ``budget`` of them in a run.

    All calls of a step (conditional, unconditional) follow one decision, made from the latents of the first.
    The budget is exceeded only where there is nothing to forecast from: a full step was not finite, or a
    second transformer takes over when it is spent.

    Args:
        budget: B, most full steps of a run, those of the warm-up and the last one included. None: as many as
            ``speedup=`` asks for, or any number where there is a threshold.
        threshold: least sum of changes that a full step is spent on.
        warmup: full steps at the start, >= 1.
        last_step_full: the last step is full, too.
        max_skips: most skipped steps in a row, while the budget lasts; None for any number.
        filter: φ, ``"identity"`` or ``"sea"`` (:mod:`hicache.input_filter`).
        power: p of ``"sea"``, > 0.
        freeze: the first whole run of a number of steps and noise levels decides for all later ones.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of range.
    """

    budget: int | None = None
    threshold: float = 0.0
    warmup: int = 3
    last_step_full: bool = False
    max_skips: int | None = None
    filter: str = "identity"
    power: float = 2.0
    freeze: bool = False

    reads_sigmas: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("InputChange.warmup", self.warmup)
        if self.budget is not None:
            check_whole("InputChange.budget", self.budget, self._least)
        if self.max_skips is not None:
            check_whole("InputChange.max_skips", self.max_skips)
        check_positive("InputChange.threshold", self.threshold, zero=True)
        check_positive("InputChange.power", self.power)
        if self.filter not in FILTERS:
            raise ValueError(f"InputChange.filter: expected one of {', '.join(FILTERS)}, got {self.filter!r}")
        for name in ("last_step_full", "freeze"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"InputChange.{name}: expected True or False, got {getattr(self, name)!r}")

    @property
    def _least(self) -> int:
        """Full steps that are there in any case."""
        return int(self.warmup) + bool(self.last_step_full)

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        """As it is expected before anything is known of a run: all changes alike."""
        return step in _expected(self, num_steps)

    def for_run(self, run: Run) -> Schedule:
        if self.filter != "identity" and run.sigmas is None:
            raise ValueError(
                f"hicache: InputChange(filter={self.filter!r}) needs noise levels: this scheduler has none"
            )
        if self.freeze and run.num_steps is not None and self._key(run) in run.decided:
            return Frozen(run.decided[self._key(run)], run.num_steps)
        return Decisions(self, run)

    def with_full_steps(self, count: int, run: Run) -> Schedule:
        if self.budget is not None:
            return super().with_full_steps(count, run)
        return replace(self, budget=max(count, self._least))

    def keep(self, run: Run, full_steps: tuple[int, ...]) -> None:
        """A run has decided: the first one counts, where decisions are frozen."""
        if self.freeze:
            run.decided.setdefault(self._key(run), full_steps)

    def _key(self, run: Run) -> tuple[Any, ...]:
        return self, run.num_steps, run.sigmas


@dataclass(frozen=True)
class Frozen(Schedule):
    """The full steps of an earlier run, again.

    A context that begins later in a run has them where the earlier one's did, unlike with
    :class:`~hicache.Steps`, which it counts from its own first step.

    Args:
        places: ordinals of the run's steps.
        num_steps: of the run.
    """

    places: tuple[int, ...]
    num_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))  # JSON has lists

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        return step + _late(self.num_steps, num_steps) in self.places


class Decisions(Schedule, Online):
    """What an :class:`InputChange` decides in one run.

    Args:
        rule: the settings.
        run: the run.

    Raises:
        ValueError: the number of steps is not known, or nothing bounds that of full steps.
    """

    def __init__(self, rule: InputChange, run: Run) -> None:
        if run.num_steps is None:
            raise ValueError("hicache: InputChange needs the number of steps: pass scheduler=")
        if rule.budget is None and not rule.threshold:
            raise ValueError("hicache: InputChange needs a budget=, a threshold= or speedup=")
        self._rule = rule
        self._run = run
        self._end = run.num_steps
        self._most = run.num_steps if rule.budget is None else min(rule.budget, run.num_steps)
        self._full: set[int] = set()  # steps that were
        self._changes: dict[int, float] = {}  # of the latents, by step
        self._asked = 0  # the last full step at which changes were asked for
        self._answer: Callable[[], Mapping[int, float]] | None = None  # not looked at yet
        self._plan(-1, 1.0, 1.0)

    @property
    def online(self) -> Online:
        return self

    @property
    def places(self) -> tuple[int, ...]:
        """The full steps of the run: those that were, and those to come as they are expected now."""
        return self._places

    def is_full(self, step: int, last_full: int | None, num_steps: int | None = None) -> bool:
        late = _late(self._end, num_steps)
        if step + late > self._asked:
            self.hear()
        # a context that begins later warms up as far as the budget goes
        warming = late > 0 and step < self._rule.warmup and len(self._full) < self._most
        return warming or step + late in self._places

    # Told by whoever runs the model.

    def measures(self, step: int) -> bool:
        return step <= self._last_question

    def asks(self, step: int) -> bool:
        return step >= self._rule.warmup - 1 and self.measures(step) and step in self._places

    def filtered(self, latents: Tensor, step: int) -> Tensor:
        sigma = 0.0 if self._run.sigmas is None else self._run.sigmas[step]
        return FILTERS[self._rule.filter](latents, sigma, self._rule.power)

    def ask(self, step: int, answer: Callable[[], Mapping[int, float]]) -> None:
        self.hear()
        self._full.add(step)
        self._asked, self._answer = step, answer

    def hear(self) -> None:
        if self._answer is None:
            return
        answer, self._answer = self._answer, None
        heard = {step: change for step, change in answer().items() if math.isfinite(change)}
        self._changes.update(heard)
        if heard:
            now = sum(heard.values()) / len(heard)
            average = sum(self._changes.values()) / len(self._changes)
            # of the rest of the run nobody knows: half as it is now, half as it was so far
            self._plan(self._asked, now, (now + average) / 2)

    def note(self, step: int) -> None:
        self._full.add(step)
        if step not in self._places:  # there was nothing to forecast from: it takes the place of the next
            coming = [place for place in self._places if place > step]
            spent = len(coming) - (self._most - len(self._full))
            self._settle(coming[max(0, spent) :])

    def end(self, step: int) -> None:
        self.hear()
        if step == self._end - 1:
            self._rule.keep(self._run, tuple(sorted(self._full)))

    def _plan(self, last: int, now: float, usual: float) -> None:
        """Choose the full steps after a full one.

        Args:
            last: that one; -1 before the run.
            now: change of a step, as it is up to the next full one.
            usual: likewise, as it is in the rest of the run.
        """
        rule = self._rule
        coming = [*range(last + 1, min(rule.warmup, self._end))]
        left, last = self._most - len(self._full) - len(coming), coming[-1] if coming else last
        closed = rule.last_step_full and left > 0 and last < self._end - 1
        left, stop = left - closed, self._end - closed
        while left > 0:
            # of what the latents will change by, as much goes to each gap, the one before the end included
            share = 0.0 if rule.budget is None else usual * (stop - last) / (left + 1)
            last += self._gap(max(rule.threshold, share), now)
            if last >= stop:
                break
            coming.append(last)
            left, now = left - 1, usual
        self._settle([*coming, *[self._end - 1] * closed])

    def _settle(self, coming: list[int]) -> None:
        """Take these for the full steps to come."""
        self._places = tuple(sorted({*self._full, *coming}))
        free = self._most - self._rule.last_step_full
        after = [place for index, place in enumerate(self._places, start=1) if index < free]
        self._last_question = max((place for place in after if place < self._end - 1), default=-1)

    def _gap(self, threshold: float, change: float) -> int:
        """Steps until changes, of so much each, sum up to a threshold."""
        most = self._end if self._rule.max_skips is None else self._rule.max_skips + 1
        if threshold >= change * most:
            return most
        return max(1, math.ceil(threshold / change - 1e-6))

    def to_plain(self) -> dict[str, Any]:
        """For :mod:`hicache.plain_data`: the settings, which decide anew."""
        return to_plain(self._rule)

    def __repr__(self) -> str:
        return repr(self._rule)


def _late(run: int, context: int | None) -> int:
    """Steps of a run before a context's first one, which is the one that it counts from.

    Args:
        run: steps of the run.
        context: steps of the context.
    """
    return 0 if context is None else run - context


@functools.lru_cache(maxsize=64)
def _expected(rule: InputChange, num_steps: int | None) -> tuple[int, ...]:
    return Decisions(rule, Run(num_steps)).places
