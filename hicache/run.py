"""What forecasting may know: of a run before it begins, and of the place a forecast is made at."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from hicache.model_key import ModelKey


@dataclass(frozen=True)
class Run:
    """A run that is about to begin; what is not known is None, or empty."""

    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None  # the scheduler's noise levels, one a step
    models: Mapping[str, ModelKey] = field(default_factory=dict)  # denoiser → its model
    guidance: str | None = None  # how the pipeline is guided: "none", "classifier-free"
    granularity: str | None = None  # what is cached, where that was asked for
    full_steps: tuple[int, ...] | None = None  # once its schedule is settled
    order: int = 0  # highest difference that is kept
    warmup: int = 1  # no differences are taken before the last of so many steps
    # full steps that earlier runs of the pipeline decided on, for schedules that keep them, by whatever key
    decided: MutableMapping[Any, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Position:
    """Where a forecast is made: all that a basis may look at.

    Args:
        step: of the context, from 0.
        last_full: its last full step.
        gaps: steps between the full steps behind the differences, newest first: ``num_coeffs - 1``.
        num_coeffs: number of differences that exist, >= 1.
        num_steps: of the context, if known.
        sigmas: the scheduler's noise levels, one a step of the context; None unless the basis or the schedule
            asks for them (``reads_sigmas``) and the scheduler has them.
        context: its label, such as ``"transformer[0]"``; "" outside of a pipeline.
    """

    step: int
    last_full: int
    gaps: tuple[float, ...]
    num_coeffs: int
    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    context: str = ""

    @property
    def distance(self) -> int:
        """Steps since the last full one, > 0."""
        return self.step - self.last_full
