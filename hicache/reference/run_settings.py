"""The settings of the run that goes on: one choice of full steps for all parts of a pipeline."""

from __future__ import annotations

from typing import Any

import torch

from hicache.config import HiCacheConfig
from hicache.input_filter import relative
from hicache.reference.context import tensors
from hicache.reference.steps import Steps
from hicache.run import Run


class RunSettings:
    """Settings by which a run's full steps are chosen, before it or as it goes.

    Args:
        config: as asked for.
        steps: counts the steps of the pipeline.
    """

    def __init__(self, config: HiCacheConfig, steps: Steps) -> None:
        self.config = self._asked = config
        self.sigmas: tuple[float, ...] | None = None
        self.places: set[int] = set()  # the full steps of the run
        self._steps = steps
        self._decided: dict[Any, tuple[int, ...]] = {}
        self._run = -1

    def follow(self) -> None:
        """A call of one of the pipeline's parts has been counted: it may be the first of a run."""
        steps = self._steps
        if self._run == steps.run:
            return
        self._run = steps.run
        self.sigmas = steps.sigmas if self._asked.reads_sigmas else None
        self.config = self._asked.for_run(Run(steps.num_steps, self.sigmas, decided=self._decided))
        self.places = set()
        self._step = -1
        self._held: list[torch.Tensor] = []
        self._changes: dict[int, float] = {}

    def see(self, step: int, latents: Any) -> None:
        """A transformer is called with these: what a schedule may decide by, the first time in a step."""
        online = self.config.places_by.online
        if online is None or step == self._step or not online.measures(step):
            return
        held = [online.filtered(tensor, step) for tensor in tensors(latents)]
        if step == self._step + 1 and [old.shape for old in self._held] == [new.shape for new in held]:
            moved = sum(float((new - old).abs().sum()) for new, old in zip(held, self._held, strict=True))
            size = sum(float(old.abs().sum()) for old in self._held)
            self._changes[step] = relative(moved, size)
        self._step, self._held = step, held
        if online.asks(step):
            changes, self._changes = self._changes, {}
            online.ask(step, lambda: changes)

    def note(self, step: int) -> None:
        """A step is full."""
        self.places.add(step)
        online = self.config.places_by.online
        if online is not None:
            online.note(step)

    def end(self, step: int) -> None:
        """A call of a step has ended."""
        online = self.config.places_by.online
        if online is not None:
            online.end(step)
