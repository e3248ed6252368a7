"""What the runtime asks of a clock of runs and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from hicache.handle import Steps
from hicache.hooks.timesteps import Rule


class StepClock(Steps, Protocol):
    """Counts runs and steps."""

    run: int
    step: int  # of the run, from 0

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, where they are known."""

    @property
    def rules(self) -> Sequence[Rule]:
        """The ways in which the run's timesteps may come out of a scheduler's, where there is one."""

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The scheduler's noise levels in the run, one a step, where it has them; reads the device."""

    def counts_alone(self, scheduler: Any) -> bool:
        """Whether a scheduler's calls can only be of its run, if it is the only clock."""

    def tick(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """A call of a transformer begins, with these arguments by name."""

    def abort(self) -> None:
        """A call raised."""
