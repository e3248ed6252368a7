"""Schedulers for pipelines and for loops without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
from torch import Tensor


class CountingScheduler:
    """A scheduler that only counts its steps: the least a loop of one's own needs."""

    timesteps: Sequence[int] | Tensor = ()

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = range(steps)

    def step(self) -> None:
        pass


class RecordedScheduler(CountingScheduler):
    """One that has the timesteps of recorded calls.

    Args:
        timesteps: one a step.
    """

    def __init__(self, timesteps: Tensor) -> None:
        self._recorded = timesteps

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = self._recorded[:steps]


def flow_matching(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of the flow-matching pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
