"""What one denoiser has of a session: its contexts, its count of calls, its recorder, its planner."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from hicache.adapters.base import ModuleAdapter
from hicache.adapters.gates import held_nbytes, let_go
from hicache.companion import Companions
from hicache.hooks.hooked import HookedModule
from hicache.runtime.budget import Policy, RecorderChoice
from hicache.runtime.context import Context, Contexts
from hicache.runtime.memory_room import Graphs
from hicache.runtime.module_recorder import ModuleRecorder
from hicache.runtime.output_planner import OutputPlanner
from hicache.runtime.planner import CallPlanner
from hicache.runtime.session import Session
from hicache.runtime.step_counter import StepCounter


class Track:
    """The calls of one denoiser in one session: nothing of them reaches another one's.

    Args:
        name: the pipeline's for the denoiser.
        hooked: the denoiser, watched.
        policy: what to cache.
        modules: records by module, in all sessions; None where nobody knows the modules.
        warn: tells the user, once.
        adapter: knows the model; None where nobody does.
        graphs: of the denoiser, if it has some.
        session: what all denoisers of the pipeline share in these runs.
    """

    def __init__(
        self,
        name: str,
        hooked: HookedModule,
        policy: Policy,
        modules: ModuleRecorder | None,
        warn: Callable[[str], None],
        adapter: ModuleAdapter | None,
        graphs: Graphs | None,
        session: Session,
    ) -> None:
        self.session = session
        self.counter = StepCounter(session)
        self.contexts = Contexts(name, policy.max_contexts)
        self.learned_from = 0  # which of the model's versions
        self._hooked, self._policy = hooked, policy
        self._choose = functools.partial(
            RecorderChoice,
            hooked.name,
            modules=modules,
            contexts=self.contexts,
            warn=warn,
            adapter=adapter,
            graphs=graphs,
        )
        self._looked_for = session.granularity  # in the forms of calls
        self._by_granularity: dict[str, tuple[RecorderChoice, CallPlanner]] = {}
        self._settle()

    def start_run(self) -> None:
        """A run of its session has started: what is cached in it is known."""
        self._settle()
        if not self.session.whole and self._looked_for != self.session.granularity:
            self.contexts.forget_forms()  # another recorder looks for something else in them
            self._looked_for = self.session.granularity
        self.choice.start_run()

    def _settle(self) -> None:
        granularity = self.session.granularity
        if granularity not in self._by_granularity:
            policy = self._policy
            if granularity != policy.granularity:
                policy = replace(
                    policy, granularity=granularity, why="what comes with the model is fitted to it"
                )
            choice = self._choose(policy)
            planner = OutputPlanner if self.session.whole else CallPlanner
            self._by_granularity[granularity] = choice, planner(self._hooked, choice, self.session)
        self.choice, self.planner = self._by_granularity[granularity]

    def going_on(self) -> list[Context]:
        """The contexts of the run that goes on which had a call in the step before this one."""
        if self.session.clock.run != self.counter.run:
            return []
        last = self.session.clock.step - 1
        return [context for context in self.contexts.current if context.last_step == last]


class Tracks:
    """What one denoiser has of all sessions together.

    Args:
        make: what it has of a session, for one that it has nothing of yet.
        memory_budget: bytes for histories, gates and graphs.
        adapter: knows the model; None where nobody does.
        companions: take part in the denoiser's full steps.
    """

    def __init__(
        self,
        make: Callable[[Session], Track],
        memory_budget: int,
        adapter: ModuleAdapter | None,
        companions: Companions,
    ) -> None:
        self._make = make
        self._memory_budget = memory_budget
        self._adapter = adapter
        self._companions = companions
        self._tracks: dict[Session, Track] = {}

    def of(self, session: Session) -> Track:
        """What it has of a session."""
        track = self._tracks.get(session)
        if track is None:
            track = self._tracks[session] = self._make(session)
        return track

    def going_on(self, session: Session) -> list[Context]:
        """See :meth:`Track.going_on`; none of a session that it has nothing of."""
        track = self._tracks.get(session)
        return [] if track is None else track.going_on()

    def release(self) -> None:
        """Free all histories and gates."""
        for track in self._tracks.values():
            track.contexts.release()
        if self._adapter is not None:
            let_go(self._adapter)

    def left_by(self, track: Track) -> int:
        """Bytes of the budget that the run of a track leaves for graphs."""
        contexts = track.contexts
        held = contexts.current_nbytes + contexts.gates_nbytes + contexts.kept_nbytes
        return self._memory_budget - held - self._adapters_nbytes - self._companions.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of history held."""
        return sum(track.contexts.nbytes for track in tuple(self._tracks.values()))

    @property
    def gates_nbytes(self) -> int:
        """Bytes of gates held."""
        return self._adapters_nbytes + sum(t.contexts.gates_nbytes for t in tuple(self._tracks.values()))

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what else is kept for a run, by companions too."""
        kept = sum(track.contexts.kept_nbytes for track in tuple(self._tracks.values()))
        return kept + self._companions.nbytes

    @property
    def _adapters_nbytes(self) -> int:
        return 0 if self._adapter is None else held_nbytes(self._adapter)
