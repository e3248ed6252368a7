"""Which step of which run this is: the reference's own counting, independent of the fast path's.

A scheduler instance keeps a journal of its runs, which is read at every call of a denoiser; a transformer
without a scheduler is counted by the timesteps it has been called with. Either way ``run`` is another number
in every run, and ``step`` counts from 0 in each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from hicache.noise_levels import noise_levels
from hicache.pipeline import check_scheduler
from hicache.shadow import shadow

# What transformers call their timestep.
_TIMESTEPS: Final = ("timestep", "timesteps", "t")


class _Journal:
    """How many steps each run of one scheduler has had, since somebody reads.

    Args:
        scheduler: its ``set_timesteps`` and ``step`` are replaced, in the instance, while anybody reads.
    """

    def __init__(self, scheduler: Any) -> None:
        self.steps = [0]  # run by run, the current one last
        self._readers = 0
        self.scheduler = scheduler
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def open(cls, scheduler: Any) -> _Journal:
        """The journal of a scheduler: that of its other readers, if there are any.

        Raises:
            TypeError: it cannot be watched.
        """
        check_scheduler(scheduler)
        step = scheduler.__dict__.get("step")
        journal = step.journal if isinstance(step, _Noting) else cls(scheduler)
        if not journal._readers:
            for name in ("set_timesteps", "step"):
                journal._undo.append(shadow(scheduler, name, _Noting(journal, name)))
        journal._readers += 1
        return journal

    def close(self) -> None:
        """One reader less. The last one leaves the scheduler as it was.

        Who has put a wrapper around ours since goes on calling it: it only passes calls on.
        """
        self._readers -= 1
        if self._readers:
            return
        while self._undo:
            self._undo.pop()()

    def note(self, name: str) -> None:
        """A method of the scheduler has done its work."""
        if name == "set_timesteps":
            self.steps.append(0)
        else:
            self.steps[-1] += 1


class _Noting:
    """A method of one scheduler that notes its calls in the journal."""

    def __init__(self, journal: _Journal, name: str) -> None:
        self.journal = journal
        self.name = name
        self._method = getattr(journal.scheduler, name)
        functools.update_wrapper(self, self._method)  # pipelines read its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self.journal.note(self.name)
        return result


class SchedulerSteps:
    """Counts by the scheduler: ``set_timesteps`` starts a run, ``step`` ends a step.

    Args:
        source: gives the scheduler in use.

    Raises:
        TypeError: the scheduler cannot be watched.
    """

    def __init__(self, source: Callable[[], Any]) -> None:
        self._source = source
        self._journal = _Journal.open(source())
        self.run = 0
        self._begin()

    def _begin(self) -> None:
        """The run starts here: steps the journal has already are not its own."""
        self._runs_noted = len(self._journal.steps)
        self._before = self._journal.steps[-1]

    def _next(self) -> None:
        self.run += 1
        self._begin()

    @property
    def step(self) -> int:
        """The current step of the run."""
        return self._journal.steps[-1] - self._before

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, from the scheduler's ``begin_index`` on; None where it does not say."""
        scheduler = self._journal.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or not len(timesteps):
            return None
        return len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The scheduler's noise levels in the run, one a step, where it has them."""
        return noise_levels(self._journal.scheduler, self.num_steps)

    def count(self, module: nn.Module, named: dict[str, Any]) -> None:
        """A denoiser is about to be called: bring ``run`` and ``step`` up to date.

        Args:
            module: the denoiser.
            named: its arguments by name.

        Raises:
            TypeError: the pipeline has another scheduler now, which cannot be watched.
        """
        scheduler = self._source()
        if scheduler is not self._journal.scheduler:
            journal = _Journal.open(scheduler)
            self._journal.close()
            self._journal = journal
            self._next()
            return
        if len(self._journal.steps) != self._runs_noted:
            self.run += 1
            self._runs_noted, self._before = len(self._journal.steps), 0
        # set_timesteps is not called where the same timesteps are used for another picture
        if self.num_steps is not None and self.step >= self.num_steps:
            self._next()

    def restart(self) -> None:
        """Start a new run at the next call."""
        self._next()

    def abort(self) -> None:
        """A call has failed. The steps of this run go on counting: ``set_timesteps`` starts the next."""

    def detach(self) -> None:
        """Leave the scheduler as it was."""
        self._journal.close()


class TimestepSteps:
    """Counts by the timesteps of a bare transformer: within a run they only fall, or only rise."""

    num_steps: int | None = None  # nobody says
    sigmas: tuple[float, ...] | None = None  # likewise

    def __init__(self) -> None:
        self.run = 0
        self._seen: list[float] = []  # the run's timesteps, each once

    @property
    def step(self) -> int:
        """The current step of the run."""
        return max(0, len(self._seen) - 1)

    def count(self, module: nn.Module, named: dict[str, Any]) -> None:
        """The transformer is about to be called: bring ``run`` and ``step`` up to date.

        Args:
            module: the transformer.
            named: its arguments by name; a timestep is a number or a tensor, of which the largest element
                counts: tokens that are given (Wan 2.2 TI2V) are at zero.

        Raises:
            ValueError: it is called without a timestep.
        """
        given = [named[name] for name in _TIMESTEPS if named.get(name) is not None]
        if not given:
            raise ValueError(
                f"hicache: expected {type(module).__name__} to be called with `timestep`, got "
                f"{', '.join(sorted(named)) or 'nothing'}; pass apply(..., scheduler=...) to count steps "
                "instead"
            )
        timestep = float(torch.as_tensor(given[0]).max())
        if self._seen and timestep == self._seen[-1]:
            return  # another call of the same step
        seen = [*self._seen, timestep]
        if seen not in (sorted(seen), sorted(seen, reverse=True)):
            self.run += 1
            seen = [timestep]
        self._seen = seen

    def restart(self) -> None:
        """Start a new run at the next call."""
        self.run += 1
        self._seen = []

    def abort(self) -> None:
        """A call has failed: what comes next is a new run."""
        self.restart()

    def detach(self) -> None:
        """Nothing is held."""


Steps = SchedulerSteps | TimestepSteps


def count_steps(source: Callable[[], Any] | None) -> Steps:
    """Count by what :func:`hicache.pipeline.find_scheduler` found.

    Raises:
        TypeError: the scheduler cannot be watched.
    """
    return TimestepSteps() if source is None else SchedulerSteps(source)
