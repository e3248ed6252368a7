"""What all denoisers of a pipeline share in a run: the step clock, the settings, the stopwatch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from hicache.config import HiCacheConfig
from hicache.run import Run
from hicache.runtime.clock import StepClock
from hicache.runtime.input_watch import InputWatch
from hicache.schedule import bound, with_speedup
from hicache.stats import Stopwatch


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
