"""What one denoiser has of one session: its contexts, its count of calls, its recorder, its planner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hicache.adapters.base import ModuleAdapter
from hicache.hooks.hooked import HookedModule
from hicache.runtime.budget import Policy, RecorderChoice
from hicache.runtime.context import Context, Contexts
from hicache.runtime.memory_room import Graphs
from hicache.runtime.module_recorder import ModuleRecorder
from hicache.runtime.output_planner import OutputPlanner
from hicache.runtime.planner import CallPlanner
from hicache.runtime.session import Session, StepCounter

# what looks at something else than blocks → what plans its calls
_PLANNERS: Final[dict[str, type[CallPlanner]]] = {"output": OutputPlanner}


class Track:
    """The calls of one denoiser in one session: nothing of them reaches another one's.

    Args:
        name: the pipeline's for the denoiser.
        hooked: the denoiser, watched.
        policy: what to cache.
        modules: records by module, in all sessions; None where nobody knows the modules.
        session: what all denoisers of the pipeline share in these runs.
        warn: tells the user, once.
        adapter: knows the model; None where nobody does.
        graphs: of the denoiser, if it has some.
    """

    def __init__(
        self,
        name: str,
        hooked: HookedModule,
        policy: Policy,
        modules: ModuleRecorder | None,
        session: Session,
        warn: Callable[[str], None],
        adapter: ModuleAdapter | None,
        graphs: Graphs | None,
    ) -> None:
        self.session = session
        self.counter = StepCounter(session)
        self.contexts = Contexts(name)
        self.choice = RecorderChoice(hooked.name, policy, modules, self.contexts, warn, adapter, graphs)
        planner = _PLANNERS.get(policy.granularity, CallPlanner)
        self.planner = planner(hooked, self.choice, session)
        self.learned_from = 0  # which of the model's versions

    def going_on(self) -> list[Context]:
        """The contexts of the run that goes on which had a call in the step before this one."""
        if self.session.clock.run != self.counter.run:
            return []
        last = self.session.clock.step - 1
        return [context for context in self.contexts.current if context.last_step == last]
