"""A pipeline's run with rows that are still being fitted: eager, and differentiable where that is asked for.

What a row weighs is kept as snapshots, out of place, so that gradients may go through forecasts, heads and
full steps (:mod:`hicache.snapshots` has how rows of differences weigh snapshots).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hicache.fitting.features import features_of
from hicache.hooks.step_clock import SchedulerClock
from hicache.pipeline import find_denoisers, find_scheduler


class Rule(Protocol):
    """Says what becomes of each step of a run."""

    def is_full(self, step: int) -> bool:
        """Whether the transformer runs."""

    def record(self, context: str, step: int, feature: Tensor) -> None:
        """A full step has given these features (:mod:`hicache.fitting.features`)."""

    def forecast(self, context: str, step: int) -> Tensor:
        """The features at a skipped step."""


@dataclass
class Trajectory:
    """What a run went through."""

    inputs: list[Tensor] = field(default_factory=list)  # of every step: what the first denoiser is given
    contexts: list[str] = field(default_factory=list)  # those that had a call in its first step
    output: Any = None  # the pipeline's


class _Watched:
    """One denoiser of a pipeline that is being replayed."""

    def __init__(self, name: str, module: nn.Module, replay: Replay, granularity: str) -> None:
        self._name = name
        self._replay = replay
        self.features = features_of(module, granularity)
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._step = -1
        self._ordinal = 0
        self._grad: bool | None = None

    def install(self) -> list[Callable[[], None]]:
        watch = self.features.hooked.watch
        return [*self.features.install(self._forecast), *watch(self._before, self._after, self._end)]

    def start_run(self) -> None:
        self._step = -1

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        replay = self._replay
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        step = replay.tick(module, named)
        self._ordinal = self._ordinal + 1 if step == self._step else 0
        self._step = step
        self._context = f"{self._name}[{self._ordinal}]"
        replay.note(step, self._context, next(v for v in named.values() if isinstance(v, Tensor)))
        if not replay.rule.is_full(step):
            self.features.begin_skipped()
            return
        self.features.begin_full(named, self._record)
        if not replay.through_full_steps:
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(False)

    def _record(self, features: Tensor) -> None:
        self._replay.rule.record(self._context, self._step, features)

    def _forecast(self) -> Tensor:
        return self._replay.rule.forecast(self._context, self._step)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.features.end(output)
        self._end()

    def _end(self) -> None:
        """A call has ended, or never came to its end."""
        if self._grad is not None:
            torch.set_grad_enabled(self._grad)
            self._grad = None
        self.features.hooked.end()


class Replay:
    """Runs a pipeline by a rule; leave the ``with`` block to get it back as it was.

    Args:
        pipe: a diffusers pipeline whose denoisers :mod:`hicache.fast` could cache.
        granularity: of :data:`hicache.fitting.features.GRANULARITIES`: what is forecast.

    Raises:
        TypeError, ValueError: there is nothing to hook, or nobody knows the modules.
    """

    def __init__(self, pipe: Any, granularity: str = "stack") -> None:
        self._pipe = pipe
        source = find_scheduler(pipe, None)
        if source is None:
            raise TypeError(f"hicache: expected a pipeline with a scheduler, got {type(pipe).__name__}")
        self._source = source
        modules = find_denoisers(pipe, unets=granularity == "output")
        self._watched = [_Watched(name, module, self, granularity) for name, module in modules.items()]
        self._modules = list(modules.values())
        counts = {watched.features.count for watched in self._watched}
        if len(counts) > 1:
            raise ValueError(
                f"hicache: granularity={granularity!r}: expected denoisers with as many features, got "
                f"{', '.join(map(str, sorted(counts, key=str)))}"
            )
        [self.features] = counts  # that have rows of their own; None: one row serves all

    def __enter__(self) -> Replay:
        self._clock = SchedulerClock(self._source())
        self._frozen = [
            weight for module in self._modules for weight in module.parameters() if weight.requires_grad
        ]
        for weight in self._frozen:
            weight.requires_grad_(False)
        self._undo = [undo for watched in self._watched for undo in watched.install()]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._clock.detach()

    def run(
        self, rule: Rule, call: Mapping[str, Any], gradients: bool = False, through_full_steps: bool = False
    ) -> Trajectory:
        """One call of the pipeline.

        Args:
            rule: what becomes of each step.
            call: the pipeline's arguments.
            gradients: keep what gradients of the output need. A pipeline's own ``torch.no_grad()`` is left
                out, then.
            through_full_steps: through full steps, too; without, those are constants.
        """
        self.rule, self.through_full_steps = rule, through_full_steps
        self._trajectory = Trajectory()
        for watched in self._watched:
            watched.start_run()
        with torch.set_grad_enabled(gradients):
            forward = inspect.unwrap(type(self._pipe).__call__) if gradients else type(self._pipe).__call__
            self._trajectory.output = forward(self._pipe, **call)
        return self._trajectory

    def tick(self, module: nn.Module, named: Mapping[str, Any]) -> int:
        """A denoiser is called: the step it is in."""
        self._clock.tick(module, named)
        return self._clock.step

    def note(self, step: int, context: str, given: Tensor) -> None:
        """A call was given this: the first of a step, or one of a context."""
        if step == len(self._trajectory.inputs):
            self._trajectory.inputs.append(given)
        if step == 0:
            self._trajectory.contexts.append(context)

    @property
    def contexts(self) -> list[str]:
        """Contexts of the last run that began with it."""
        return list(self._trajectory.contexts)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """Noise levels of the last run."""
        return self._clock.sigmas
