"""Which run's session a call belongs to.

A transformer may be shared by pipelines with schedulers of their own, in several threads: each run that goes
on has a session of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hicache.hooks.caller import runs_in_diffusers
from hicache.hooks.step_clock import SchedulerClock, TimestepClock
from hicache.pipeline import check_scheduler
from hicache.runtime.clock import StepClock
from hicache.runtime.session import Session


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
