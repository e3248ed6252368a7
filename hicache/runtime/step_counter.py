"""Which call of which step of a run a denoiser is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hicache.hooks.timesteps import timestep_of
from hicache.runtime.reading import reading
from hicache.runtime.session import Session


class StepCounter:
    """Which call of which step this is, for one denoiser.

    Args:
        session: the pipeline's.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.run = -1
        self.step = -1
        self.ordinal = 0  # of the call in the step
        self._timestep: Any = None  # of the step's first call
        # whether a later one had another, which may not be known yet; None: there was none
        self._moved: Callable[[], Any] | None = None

    @property
    def outdated(self) -> bool:
        """Whether another run has had steps since the last call."""
        clock = self._session.clock
        return self.run != clock.run and clock.step > 0

    def tick(self, module: nn.Module, model_kwargs: Mapping[str, Any]) -> bool:
        """A call begins; whether it is the first of a run."""
        clock = self._session.clock
        clock.tick(module, model_kwargs)
        started = self.run != clock.run
        if started:
            self.run, self.step, self._moved = clock.run, -1, None
        if self.step != clock.step:
            self.step, self.ordinal = clock.step, 0
            self._timestep = None if self.step else timestep_of(model_kwargs)
        else:
            self.ordinal += 1
        return started

    def stands_still(self, model_kwargs: Mapping[str, Any]) -> bool:
        """Whether the scheduler was not stepped between two steps; looked at in a run's first step.

        Never waits for a CUDA device, which may answer at a later call.
        """
        if self.ordinal and self._timestep is not None:
            timestep = timestep_of(model_kwargs)
            moved = timestep is not None and timestep != self._timestep
            self._moved = reading(moved) if isinstance(moved, Tensor) else lambda: moved
        return self._moved is not None and bool(self._moved())
