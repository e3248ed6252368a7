"""What all denoisers of a pipeline share: the step clock, the settings of the current run, the stopwatch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from hicache.config import HiCacheConfig
from hicache.handle import Steps
from hicache.schedule import bound, with_speedup
from hicache.stats import Stopwatch


class StepClock(Steps, Protocol):
    """Counts runs and steps."""

    run: int
    step: int  # of the run, from 0

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, where they are known."""

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps, where there is one."""

    def tick(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """A call of a transformer begins, with these arguments by name."""

    def abort(self) -> None:
        """A call raised."""


class Session:
    """What all denoisers of a pipeline share.

    Args:
        clock: counts runs and steps.
        config: the settings; with ``speedup``, all but the interval.
        speedup: bound to reach; None takes the config's interval.
        backend: of :mod:`hicache_kernels`.
    """

    def __init__(self, clock: StepClock, config: HiCacheConfig, speedup: float | None, backend: str) -> None:
        self.clock = clock
        self.config = config  # of the current run
        self.speedup = speedup
        self.backend = backend
        self.watch = Stopwatch()
        self._run = -1

    def start_run(self, run: int, num_steps: int | None) -> None:
        """Called by every denoiser at its first call in a run.

        Raises:
            ValueError: a speed-up is wanted and the number of steps is not known.
        """
        if run == self._run:
            return
        self._run = run
        self.watch.reset()
        if self.speedup is None:
            return
        if num_steps is None:
            raise ValueError(
                "hicache: speedup= needs a scheduler that has its `timesteps` after set_timesteps()"
            )
        self.config = with_speedup(self.config, self.speedup, num_steps)
        reached = bound(self.config, num_steps)
        if round(reached, 2) < round(self.speedup, 2):
            warnings.warn(
                f"hicache: speedup={self.speedup} is out of reach in {num_steps} steps with warmup="
                f"{self.config.warmup}: this run's bound is {reached:.2f}",
                RuntimeWarning,
                stacklevel=6,
            )


class StepCounter:
    """Which call of which step this is, for one denoiser.

    Args:
        session: the pipeline's.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._run = -1
        self.step = -1
        self.ordinal = 0  # of the call in the step

    def tick(self, module: nn.Module, model_kwargs: Mapping[str, Any]) -> bool:
        """A call begins; whether it is the first of a run."""
        clock = self._session.clock
        clock.tick(module, dict(model_kwargs))
        started = self._run != clock.run
        if started:
            self._run, self.step = clock.run, -1
        if self.step != clock.step:
            self.step, self.ordinal = clock.step, 0
        else:
            self.ordinal += 1
        return started
