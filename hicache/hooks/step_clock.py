"""Which denoising step a pipeline is at, without trusting the pipeline to say so.

The scheduler *instance* is watched: ``set_timesteps`` starts a run, ``step`` ends a step. Where there is no
scheduler (a user's own loop around a bare transformer) the timestep that the transformer is called with tells
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch

from hicache.pipeline import check_scheduler

_METHODS: Final = ("set_timesteps", "step")
_TIMESTEPS: Final = ("timestep", "timesteps", "t")  # what transformers call it


class _Watched:
    """A bound method of one scheduler that tells its watchers after every call that succeeds."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        # what stood in the instance before, if anything: restored exactly
        self.shadowed = owner.__dict__.get(name)
        self.method = getattr(owner, name)
        self.watchers: list[Callable[[], None]] = []
        # retrieve_timesteps() inspects the signature to see whether custom sigmas are accepted
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        for watcher in tuple(self.watchers):
            watcher()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Some pipelines copy their scheduler; the copy must drive itself, not this one.
        owner = memo.get(id(self.owner))
        return self if owner is None else functools.partial(getattr(type(owner), self.name), owner)

    def restore(self) -> None:
        if self.owner.__dict__.get(self.name) is not self:
            return  # wrapped by somebody else since: without watchers this only passes calls on
        if self.shadowed is None:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.shadowed


class SchedulerClock:
    """Counts the steps of a scheduler instance, such as ``pipe.scheduler``.

    Args:
        source: gives the scheduler in use, so that one put in its place later is found.

    Raises:
        TypeError: it cannot be watched.
    """

    def __init__(self, source: Callable[[], Any]) -> None:
        self._source = source
        self.run = 0
        self.step = 0
        self._watched: list[tuple[_Watched, Callable[[], None]]] = []
        self._attach(source())

    def _attach(self, scheduler: Any) -> None:
        check_scheduler(scheduler)
        self.detach()
        self._scheduler = scheduler
        for name, watcher in zip(_METHODS, (self.restart, self._on_step), strict=True):
            watched = scheduler.__dict__.get(name)
            if not isinstance(watched, _Watched):
                watched = _Watched(scheduler, name)
                scheduler.__dict__[name] = watched
            watched.watchers.append(watcher)
            self._watched.append((watched, watcher))

    def _on_step(self) -> None:
        self.step += 1

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps, those before its ``begin_index`` included; None if it has none."""
        return getattr(self._scheduler, "timesteps", None)

    @property
    def num_steps(self) -> int | None:
        """Steps of the run: the scheduler's timesteps, less those before its ``begin_index``.

        Image-to-image pipelines that leave out steps set that; a loop over a slice of the timesteps has to.
        """
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return None
        return len(timesteps) - (getattr(self._scheduler, "begin_index", None) or 0)

    def tick(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        """Called before every call of a denoiser: follow the pipeline, should it use another scheduler
        now."""
        current = self._source()
        if current is not self._scheduler:
            self._attach(current)
            self.restart()
        elif self.num_steps is not None and self.step >= self.num_steps:
            # past the last step without set_timesteps: another picture, not one more step of the last
            self.restart()

    def abort(self) -> None:
        """A call raised: nothing to do, the next run begins with ``set_timesteps``."""

    def restart(self) -> None:
        """Start a new run at the next call."""
        self.run += 1
        self.step = 0

    def detach(self) -> None:
        """Leave the scheduler as it was."""
        for watched, watcher in self._watched:
            watched.watchers.remove(watcher)
            if not watched.watchers:
                watched.restore()
        self._watched.clear()


class TimestepClock:
    """Counts steps by the ``timestep`` a bare transformer is called with.

    Another timestep is the next step; the same one again is another call of the same step. Timesteps run one
    way within a run, so a step back starts a new run. Reads the timestep on the host: on a GPU that waits for
    the device, which a scheduler (``apply(..., scheduler=...)``) avoids.
    """

    num_steps: int | None = None
    timesteps: Any = None

    def __init__(self) -> None:
        self.run = -1
        self.restart()

    def restart(self) -> None:
        """Start a new run at the next call."""
        self.run += 1
        self.step = 0
        self._last: float | None = None
        self._direction = 0.0

    def tick(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        """Called before every call of the transformer, with its arguments by name.

        Raises:
            ValueError: it was called without a timestep.
        """
        timestep = next((kwargs[name] for name in _TIMESTEPS if kwargs.get(name) is not None), None)
        if timestep is None:
            raise ValueError(
                f"hicache: expected {type(module).__name__} to be called with `timestep`, got "
                f"{', '.join(sorted(kwargs)) or 'nothing'}; pass apply(..., scheduler=...) to count steps "
                f"instead"
            )
        # Per-token timesteps (Wan 2.2 TI2V) hold zeros for the tokens that are given: the largest is the
        # step's.
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self._last is None:
            self._last = value
            return
        move = value - self._last
        if self._direction * move < 0:
            self.restart()
        elif move:
            self._direction = move
            self.step += 1
        self._last = value

    def abort(self) -> None:
        """A call raised: what comes next is a new run."""
        self.restart()

    def detach(self) -> None:
        """Nothing is held."""
