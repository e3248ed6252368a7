"""What all denoisers of a pipeline share in a run: the step clock, the settings, the stopwatch.

A transformer may be shared by pipelines with schedulers of their own, in several threads: each run that goes
on has a session of its own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from hicache.config import HiCacheConfig
from hicache.handle import Steps
from hicache.hooks.caller import runs_in_diffusers
from hicache.hooks.step_clock import SchedulerClock, TimestepClock
from hicache.hooks.timesteps import Rule, timestep_of
from hicache.pipeline import check_scheduler
from hicache.run import Run
from hicache.runtime.input_watch import InputWatch
from hicache.runtime.reading import reading
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


class Session:
    """What all denoisers of a pipeline share in a run, and in the runs after it.

    Args:
        clock: counts runs and steps.
        config: the settings; with ``speedup``, all but the number of full steps.
        speedup: bound to reach; None takes the config's.
        backend: of :mod:`hicache_kernels`.
        pipeline: says what else a fitted basis or schedule is to match; None for nothing.
        granularity: what is cached, of :data:`hicache.pipeline.GRANULARITIES`.
        offers: settings to take in place of ``config``: in each run the first that hold for it. What they
            were fitted to is cached in those runs, whatever ``granularity`` says.
        decided: what schedules keep of runs, for those of all sessions.
    """

    def __init__(
        self,
        clock: StepClock,
        config: HiCacheConfig,
        speedup: float | None,
        backend: str,
        pipeline: Callable[[Run], Run] | None = None,
        granularity: str = "auto",
        offers: Sequence[HiCacheConfig] = (),
        decided: MutableMapping[Any, tuple[int, ...]] | None = None,
    ) -> None:
        self.clock = clock
        self.config = config  # of the current run
        self.sigmas: tuple[float, ...] | None = None  # of the current run, where the config reads them
        self.speedup = speedup
        self.backend = backend
        self.watch = Stopwatch()
        self.places: set[int] = set()  # steps of the current run that were full, of any denoiser
        self.latents: InputWatch | None = None  # of the current run, where its schedule decides by them
        self._asked = config
        self._offers = offers
        self._granularity = granularity
        self.granularity = granularity  # of the current run
        self._pipeline = pipeline
        self._decided = {} if decided is None else decided
        self._run = -1
        self._warned: set[str] = set()

    def start_run(self) -> None:
        """Called by every denoiser at its first call in a run.

        Raises:
            ValueError: a speed-up is wanted and the number of steps is not known.
        """
        run = self.clock.run
        if run == self._run:
            return
        self._run = run
        self.watch.reset()
        self._settle()
        self.places = set()
        online = self.config.places_by.online
        self.latents = None if online is None else InputWatch(online)

    @property
    def whole(self) -> bool:
        """Whether what denoisers return is cached in the current run."""
        return self.granularity == "output"

    def _settle(self) -> None:
        """Take the first settings offered that hold for the run that starts, else those asked for."""
        num_steps = self.clock.num_steps
        if self.speedup is not None and num_steps is None:
            raise ValueError(
                "hicache: speedup= needs a scheduler that has its `timesteps` after set_timesteps()"
            )
        for offer in self._offers:
            config, sigmas = self._for_run(offer, None)
            if not config.fallbacks:
                self.granularity = offer.fitted_by or self._granularity
                break
        else:
            config, sigmas = self._for_run(self._asked, self._granularity)
            self.granularity = self._granularity
            for reason in config.fallbacks:
                self._warn(reason)
        self.config, self.sigmas = config, sigmas
        if self.speedup is not None and num_steps is not None:
            reached = bound(config, num_steps)
            if round(reached, 2) < round(self.speedup, 2):
                self._warn(
                    f"speedup={self.speedup} is out of reach in {num_steps} steps with warmup="
                    f"{config.warmup}: this run's bound is {reached:.2f}"
                )

    def _for_run(
        self, asked: HiCacheConfig, granularity: str | None
    ) -> tuple[HiCacheConfig, tuple[float, ...] | None]:
        """Settings as they are in this run, and its noise levels.

        With a speed-up they have as many full steps as that asks for.

        Args:
            asked: the settings.
            granularity: what is cached with them; None: what they were fitted to.
        """
        run = Run(self.clock.num_steps, decided=self._decided)
        if asked.reads_sigmas:
            run = replace(run, sigmas=self.clock.sigmas)
            if self._pipeline is not None:
                run = self._pipeline(run)
            run = replace(run, granularity=None if granularity == "auto" else granularity)
        if self.speedup is not None and run.num_steps is not None:
            asked = with_speedup(asked, self.speedup, run.num_steps, run)
        return asked.for_run(run), run.sigmas

    def begin_full(self, step: int) -> None:
        """A step of the run is full."""
        self.places.add(step)
        if self.latents is not None:
            self.latents.note(step)

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"hicache: {what}", RuntimeWarning, stacklevel=7)


class Sessions:
    """The sessions of a cached pipeline: as many as runs went on at a time.

    Args:
        source: gives the scheduler of the pipeline; None for a bare transformer without one.
        callers: whether a call that a pipeline makes is of that one's scheduler, whatever ``source`` gives.
        make: makes a session that counts by a clock.
        on_run: called when ``set_timesteps`` of the scheduler of ``source`` begins a run.
    """

    def __init__(
        self,
        source: Callable[[], Any] | None,
        callers: bool,
        make: Callable[[StepClock], Session],
        on_run: Callable[[], None],
    ) -> None:
        self._source = source
        self._callers = callers
        self._make = make
        self._lock = threading.Lock()
        # watched from here on: a loop of one's own may call set_timesteps before the transformer
        self.latest = make(TimestepClock() if source is None else SchedulerClock(source(), on_run=on_run))
        self._sessions = [self.latest]

    def of_call(self, scheduler: Any, model_kwargs: Mapping[str, Any]) -> Session:
        """The session of the run that calls a transformer now, from this thread.

        Args:
            scheduler: of the pipeline that calls; None where none does. A bare transformer's steps are
                counted by its timesteps all the same, unless the pipeline is one of diffusers'.
            model_kwargs: the call's arguments by name; its timestep is looked at where the thread does not
                tell the run.

        Raises:
            TypeError: the scheduler of ``source`` cannot be watched.
        """
        if self._source is not None and (scheduler is None or not self._callers):
            scheduler = self._source()
            check_scheduler(scheduler)
        elif self._source is None and scheduler is not None and not runs_in_diffusers(scheduler):
            scheduler = None
        with self._lock:
            self.latest = (
                self._by_thread() if scheduler is None else self._by_scheduler(scheduler, model_kwargs)
            )
            return self.latest

    def _by_thread(self) -> Session:
        thread = threading.current_thread()
        clocks = [(s, s.clock) for s in self._sessions if isinstance(s.clock, TimestepClock)]
        for session, clock in clocks:
            if clock.thread is thread:
                return session
        for session, clock in clocks:
            if not clock.thread.is_alive():
                clock.take()  # its memory serves this thread
                return session
        return self._add(TimestepClock())

    def _by_scheduler(self, scheduler: Any, model_kwargs: Mapping[str, Any]) -> Session:
        if len(self._sessions) == 1 and self.latest.clock.counts_alone(scheduler):
            return self.latest
        clocks = [(s, s.clock) for s in self._sessions if isinstance(s.clock, SchedulerClock)]
        held = {clock: session for session, clock in clocks if clock.scheduler is scheduler}
        # runs that were begun, and have had no call
        waiting = {thread for clock in held for thread in clock.begun} - {clock.thread for clock in held}
        clock = _clock_of_call(list(held), waiting, model_kwargs)
        if clock is not None:
            return held[clock]
        session = self._of_new_run(scheduler, clocks)
        assert isinstance(session.clock, SchedulerClock)
        if waiting and session.clock.thread not in waiting:
            session.clock.thread = waiting.pop()  # that run has gone on in this thread
        return session

    def _of_new_run(self, scheduler: Any, clocks: list[tuple[Session, SchedulerClock]]) -> Session:
        own = None if self._source is None else self._source()  # stays watched: other runs may begin with it
        for session, clock in clocks:
            if clock.idle and (clock.scheduler is not own or own is scheduler):
                clock.follow(scheduler)  # its memory serves this run
                return session
        return self._add(SchedulerClock(scheduler))

    def _add(self, clock: StepClock) -> Session:
        session = self._make(clock)
        self._sessions.append(session)
        return session

    def restart(self) -> None:
        """Start new runs at the next calls."""
        for session in self._sessions:
            session.clock.restart()

    def detach(self) -> None:
        """Leave all schedulers as they were."""
        for session in self._sessions:
            session.clock.detach()


def _clock_of_call(
    clocks: list[SchedulerClock], waiting: Collection[int], model_kwargs: Mapping[str, Any]
) -> SchedulerClock | None:
    """Which of a scheduler's clocks counts a call that this thread makes now; None: a run begins with it.

    A run may go from thread to thread, and one that was called off is never heard of again. So where a
    scheduler has had several, a call is of the run that is at its timestep: of several of those the one that
    this thread has worked on last, or else the one that was worked on last.

    Args:
        clocks: the scheduler's.
        waiting: threads that began runs which have had no call.
        model_kwargs: the call's arguments by name.
    """
    thread = threading.get_ident()
    if thread in waiting:
        return None
    ours = sorted(clocks, key=lambda clock: clock.thread != thread)
    counting = [clock for clock in ours if clock.counts(thread)]
    if len(clocks) + len(waiting) > 1 and not (counting and counting[0].begins(thread)):
        fits = {clock: clock.fits(model_kwargs) for clock in clocks}
        fitting = [clock for clock in clocks if fits[clock]]
        if fitting:
            return max(fitting, key=lambda clock: (clock.worker == thread, clock.used))
        if waiting and False in fits.values():
            return None
    return counting[0] if counting else None


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
