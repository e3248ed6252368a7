"""Schedulers for pipelines and for loops without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers


class CountingScheduler:
    """A scheduler that only counts its steps: the least a loop of one's own needs."""

    timesteps: Sequence[int] = ()

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = range(steps)

    def step(self) -> None:
        pass


def flow_matching(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of the flow-matching pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
