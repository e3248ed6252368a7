"""Which denoising step a pipeline is at, without trusting the pipeline to say so.

The scheduler *instance* is watched: ``set_timesteps`` starts a run, ``step`` ends a step. Where there is no
scheduler (a user's own loop around a bare transformer) the timestep that the transformer is called with tells
the same.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from hicache.hooks.timesteps import Rule, index_of, run_start, timestep_of
from hicache.noise_levels import noise_levels
from hicache.pipeline import check_scheduler
from hicache.shadow import shadow

_METHODS: Final = ("set_timesteps", "step")
_CALLS: Final = itertools.count(1)


class _Watched:
    """A method of one scheduler that tells its watchers after every call that succeeds.

    It does not keep the scheduler alive: a server makes one for every request.

    Args:
        owner: the scheduler; copies of it are not watched.
        name: of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)
        self.watchers: list[Callable[[], None]] = []
        # Threads that called set_timesteps and whose runs have not ended, as all clocks know them. One
        # scheduler may serve several at once if it keeps no count of its own (DDIM); and a run that one
        # thread began may go on in others.
        self.begun: set[int] = set()
        # Thread → the clock that its last call was counted by: the step after that is of the same run.
        self.calling: dict[int, SchedulerClock] = {}
        functools.update_wrapper(self, method)
        # retrieve_timesteps() inspects the signature to see whether custom sigmas are accepted
        self.__dict__.pop("__wrapped__")
        self.__signature__ = inspect.signature(method)
        self._bound: Callable[[], Any] = lambda: method
        if isinstance(method, types.MethodType) and method.__self__ is owner:
            self._bound = weakref.WeakMethod(method)
            del method
        self.restore = shadow(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._bound()(*args, **kwargs)
        for watcher in tuple(self.watchers):
            watcher()
        return result


class SchedulerClock:
    """Counts the steps of a scheduler instance, such as ``pipe.scheduler``, in one thread's run.

    Args:
        scheduler: held weakly; :meth:`follow` puts another in its place.
        on_run: called when ``set_timesteps`` begins a run.

    Raises:
        TypeError: it cannot be watched.
    """

    def __init__(self, scheduler: Any, on_run: Callable[[], None] = lambda: None) -> None:
        self.run = 0
        self.thread = threading.get_ident()  # that began the run
        self.worker = self.thread  # that made its last call
        self.used = 0  # when that was: larger is later, over all clocks
        self._on_run = on_run
        self._first = 0  # the run's first timestep among the scheduler's, where that does not say
        self.step = 0
        self.rules: tuple[Rule, ...] = ()  # by which the run's timesteps may come out of the scheduler's
        self._begun: set[int] = set()  # the scheduler's, see there
        self._calling: dict[int, SchedulerClock] = {}  # the same
        self._ended = False  # whether the thread's run has had its last step
        self._scheduler: Callable[[], Any] = lambda: None
        self._watched: list[tuple[_Watched, Callable[[], None]]] = []
        self._attach(scheduler)

    @property
    def scheduler(self) -> Any:
        """The scheduler; None once nobody else holds it."""
        return self._scheduler()

    def follow(self, scheduler: Any) -> None:
        """The calling thread has begun a run with this scheduler, which is counted from here on."""
        self._attach(scheduler)
        self.restart()

    def _attach(self, scheduler: Any) -> None:
        check_scheduler(scheduler)
        if self._ended:
            self._begun.discard(self.thread)
        self.thread = self.worker = threading.get_ident()
        self.busy = False  # whether a run goes on: from its first call to its last step
        self._ended = False
        if scheduler is self.scheduler:
            return
        self.detach()
        self._scheduler = weakref.ref(scheduler)
        for name, watcher in zip(_METHODS, (self._on_set_timesteps, self._on_step), strict=True):
            watched = scheduler.__dict__.get(name)
            if not isinstance(watched, _Watched):
                watched = _Watched(scheduler, name)
            watched.watchers.append(watcher)
            self._watched.append((watched, watcher))
        self._begun, self._calling = self._watched[0][0].begun, self._watched[0][0].calling

    @property
    def begun(self) -> frozenset[int]:
        """Threads that began a run with the scheduler which has not ended, as all of its clocks know them."""
        return frozenset(self._begun)

    def begins(self, thread: int) -> bool:
        """Whether a thread has begun the run, and it has had no call yet."""
        return thread == self.thread and not self.busy

    def fits(self, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether a call's timestep is of the step that the run is at; None if that is not to be seen.

        Reads the device.
        """
        index = index_of(self.timesteps, kwargs) if self.busy else None
        return None if index is None else index == self._first + self.step

    def counts(self, thread: int) -> bool:
        """Whether what a thread does is of this run: it began it, or none of its own."""
        return thread == self.thread or thread not in self._begun

    def counts_alone(self, scheduler: Any) -> bool:
        """Whether a scheduler's calls can only be of its run, if no other clock counts them.

        So it is as long as no other thread has begun a run with the scheduler.
        """
        return self._scheduler() is scheduler and self._begun <= {self.thread}

    def _on_set_timesteps(self) -> None:
        thread, begun = threading.get_ident(), self._begun
        self._calling.pop(thread, None)
        if hasattr(self.scheduler, "step_index"):
            # it counts its steps itself, so this ends the run it was in, whichever thread that was of
            begun.clear()
            self.busy = False
        elif self._ended:
            begun.discard(self.thread)
        if not self.busy and self.thread not in begun:
            self.thread = thread
        begun.add(thread)
        if thread == self.thread:
            self._ended = False
        if thread == self.thread or not self.busy:
            self.restart()
            self._on_run()

    def _on_step(self) -> None:
        thread = threading.get_ident()
        caller = self._calling.get(thread)
        if caller is self or (caller is None and self.counts(thread)):
            self.step += 1
            if self.busy and self._finished:
                self.busy, self._ended = False, True
                self._hang_up()

    @property
    def timesteps(self) -> Any:
        """The scheduler's timesteps, those before its ``begin_index`` included; None if it has none."""
        return getattr(self.scheduler, "timesteps", None)

    @property
    def num_steps(self) -> int | None:
        """Steps of the run: the scheduler's timesteps, less those before the run's first one.

        Image-to-image pipelines leave out steps. They set its ``begin_index``, where it has one; else the
        timestep of the run's first call tells.
        """
        timesteps = self.timesteps
        if timesteps is None or len(timesteps) == 0:
            return None
        return len(timesteps) - (getattr(self.scheduler, "begin_index", None) or self._first)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The scheduler's noise levels in the run, one a step, where it has them; reads the device."""
        return noise_levels(self.scheduler, self.num_steps)

    @property
    def idle(self) -> bool:
        """Whether no run goes on that anybody could go on with."""
        return not self.busy or self.scheduler is None

    @property
    def _finished(self) -> bool:
        num_steps = self.num_steps
        return num_steps is not None and self.step >= num_steps

    def tick(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Called before every call of a denoiser."""
        if self._finished:
            # past the last step without set_timesteps: another picture, not one more step of the last
            self.restart()
        if not self.busy:
            self.busy, self._ended = True, False
            begin_index = getattr(self.scheduler, "begin_index", None)
            # before anything of the run is on its way: the only time that its clock reads the device
            start = run_start(self.timesteps, kwargs, self.step, begin_index)
            self.rules = start.rules
            if not begin_index:
                self._first = max(0, start.index - self.step)
        self.worker, self.used = threading.get_ident(), next(_CALLS)
        self._calling[self.worker] = self

    def _hang_up(self) -> None:
        for thread, clock in tuple(self._calling.items()):
            if clock is self:
                del self._calling[thread]

    def abort(self) -> None:
        """A call raised: nothing to do, the next run begins with ``set_timesteps``."""

    def restart(self) -> None:
        """Start a new run at the next call."""
        self.run += 1
        self.step = self._first = 0
        self.busy = False

    def detach(self) -> None:
        """Leave the scheduler as it was."""
        self._hang_up()
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
    sigmas: tuple[float, ...] | None = None
    rules: tuple[Rule, ...] = ()

    def __init__(self) -> None:
        self.run = -1
        self.take()

    def take(self) -> None:
        """Count for the calling thread from here on."""
        self.thread = threading.current_thread()
        self.restart()

    def restart(self) -> None:
        """Start a new run at the next call."""
        self.run += 1
        self.step = 0
        self._last: float | None = None
        self._direction = 0.0

    def counts_alone(self, scheduler: Any) -> bool:
        """It counts no scheduler's calls."""
        return False

    def tick(self, module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Called before every call of the transformer, with its arguments by name.

        Raises:
            ValueError: it was called without a timestep.
        """
        timestep = timestep_of(kwargs)
        if timestep is None:
            raise ValueError(
                f"hicache: expected {type(module).__name__} to be called with `timestep`, got "
                f"{', '.join(sorted(kwargs)) or 'nothing'}; pass apply(..., scheduler=...) to count steps "
                f"instead"
            )
        value = float(timestep)
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
