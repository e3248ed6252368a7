"""A context: one call of a denoiser in every step, with a history of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hicache.companion import FullCall
from hicache.engine import Engine
from hicache.runtime.call_form import CallForm
from hicache.runtime.conditions import Conditions
from hicache.runtime.corrector import Corrector
from hicache.runtime.finite import FiniteCheck
from hicache.runtime.gate_prefetch import GatePrefetch
from hicache.runtime.gate_rank import RunGates
from hicache.runtime.known_call import KnownCall
from hicache.runtime.session import Session
from hicache.runtime.signature import signature
from hicache.runtime.step_counter import StepCounter
from hicache.runtime.token_layout import LayoutCheck
from hicache.trees import tensors_of

MAX_CONTEXTS: Final = 16  # of one denoiser in a run: more usually means that steps are not what they seem


class Context:
    """One call of a denoiser in every step: its own history, its own count of steps.

    Args:
        engine: its own.
        ordinal: of its first call in the step.
        arguments: what must be equal for its history to fit.
    """

    def __init__(self, engine: Engine, ordinal: int, arguments: tuple[Any, ...]) -> None:
        self.ordinal = ordinal
        self.arguments = arguments
        self.engine = engine
        self.prefetch = GatePrefetch()
        self.low_rank = RunGates()
        self.finite = FiniteCheck()
        self.check: LayoutCheck | None = None
        self.corrector: Corrector | None = None  # of what its skipped steps do beside their sums
        self.form: CallForm | None = None  # learned from its first call
        self.recalled: list[Any] = []  # what only blocks read, of the call learned from
        self.returned: Any = None  # the form of what it returned at its last full step, by output

    def restart(self, label: str, first_step: int, conditions: Conditions, session: Session) -> None:
        """A run of a session starts, in which this context's first call is made at ``first_step``."""
        self.label = label
        self.conditions = conditions
        self.last_step = first_step  # it had a call in
        self._begin(first_step, session)
        self.full_steps = 0
        self.skipped_steps = 0
        self.prefetch.restart()
        self.low_rank.restart()
        self.finite = FiniteCheck()
        self.check = None
        self.scale: tuple[float, ...] | None = None  # of the residuals it is given, see scale_of()

    def _begin(self, step: int, session: Session) -> None:
        # the schedule counts from here: a second denoiser warms up when it starts
        self.first_step = step
        self.trusted_steps = 0  # full steps since nothing of what was before is used
        num_steps, sigmas = session.clock.num_steps, session.sigmas
        self.engine.reset(
            session.config,
            None if num_steps is None else num_steps - step,
            None if sigmas is None else sigmas[step:],
            self.label,
        )
        if self.corrector is not None:
            self.corrector.restart()

    def follow(self, scale: tuple[float, ...] | None, step: int, session: Session) -> None:
        """A ControlNet counts as much from here on: where that is another number, all starts anew.

        Nothing is forecast across the jump that it makes in every feature, which is no function of time.

        Args:
            scale: of its residuals; None where nobody knows whose they are.
            step: of the run.
            session: of the run.
        """
        if scale != self.scale and self.scale is not None:
            self._begin(step, session)
            self.prefetch.forget()
        self.scale = scale

    def is_full(self, step: int) -> bool:
        """Whether the transformer runs at this step of the run."""
        return self.engine.is_full(step - self.first_step)

    def next_full(self, step: int, num_steps: int) -> int:
        """The next full step of the run after a full step, or the end of the run."""
        local = step - self.first_step
        coming = range(step + 1, num_steps)
        return next((s for s in coming if self.engine.is_full(s - self.first_step, local)), num_steps)

    def distrust(self) -> None:
        """What is recorded is not to be forecast from: the next step is full."""
        self.trusted_steps = 0
        self.engine.distrust()
        self.prefetch.forget()

    def count_full(self) -> None:
        """A full step has come to its end."""
        self.full_steps += 1
        self.trusted_steps += 1

    def unlearn(self) -> None:
        """What was learned of its form does not hold; what is recorded may."""
        self.form = None
        self.check = None

    def release(self) -> None:
        """Free its memory, and forget what was learned."""
        self.engine.release()
        self.corrector = None
        self.prefetch.forget()
        self.low_rank.release()
        self.recalled.clear()
        self.returned = None
        self.conditions.release()
        self.unlearn()

    @property
    def gates_nbytes(self) -> int:
        """Bytes of gates it holds: of steps to come, and with gates of low rank of the whole run."""
        rows, basis = self.prefetch.rows, self.low_rank.basis
        return (0 if rows is None else rows.nbytes) + (0 if basis is None else basis.nbytes)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what else it keeps for a run: coefficients, embeddings, copies of the prompt."""
        ahead = self.prefetch.embedded_nbytes
        kept = sum(tensor.nbytes for tensor in tensors_of(self.recalled)) + self.conditions.nbytes
        kept += 0 if self.corrector is None else self.corrector.nbytes
        return kept + ahead + self.engine.numbers.nbytes

    @property
    def planned_nbytes(self) -> int:
        """Bytes of history it wants, by module."""
        form = self.form
        if form is None:
            return 0
        return self.engine.planned_nbytes([form.shape] * form.num_features, form.dtype)


@dataclass(frozen=True)
class BegunCall:
    """A call of a denoiser that has begun."""

    context: Context
    step: int  # of the run
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    model_kwargs: Mapping[str, Any]  # both by name
    compiled: bool  # as a whole
    replayed: bool = False  # by a CUDA graph, where one can be had
    checked: bool = True  # whether nothing but the blocks may change the hidden state

    @property
    def local_step(self) -> int:
        """The step counted from the context's first, as the schedule counts."""
        return self.step - self.context.first_step

    def as_full(self, warmup: int) -> FullCall:
        """What companions are told of it at a full step, in a run that begins with so many."""
        return FullCall(self.context, self.context.trusted_steps, warmup, self.model_kwargs)


class Contexts:
    """The contexts of one denoiser.

    They are told apart by the form of their arguments, by the names diffusers' pipelines give their calls, by
    what they are conditioned on, and by their order in the step where all of that is the same.

    Args:
        denoiser: its name, for labels.
        limit: how many there may be in a run.
    """

    def __init__(self, denoiser: str, limit: int = MAX_CONTEXTS) -> None:
        self._denoiser = denoiser
        self._limit = limit
        self.current: list[Context] = []
        self._idle: list[Context] = []  # of the last run: their memory is kept for one run
        # by their order in the step: contexts met, and calls of theirs that none but them had the like of
        # (and of those that have, the one before, which must have had its call)
        self._known: dict[int, tuple[KnownCall, Context, Context | None]] = {}

    def start_run(self) -> None:
        """A run starts: its contexts may be others."""
        self._idle = [context for context in self.current if context.full_steps]
        self.current = []
        self._known = {}

    def forget_forms(self) -> None:
        """The model may have changed: what was learned from earlier runs does not hold."""
        for context in self._idle:
            context.form = None

    def find(
        self, counter: StepCounter, name: Hashable, model_kwargs: Mapping[str, Any], session: Session
    ) -> Context | None:
        """The context of a call.

        Args:
            counter: which call of which step it is.
            name: what else tells it from others, as the pipeline's name for the call.
            model_kwargs: the transformer's arguments by name.
            session: of the run.

        Returns:
            None: there are too many.
        """
        known = self._known.get(counter.ordinal)
        if known is not None:
            call, met, before = known
            in_turn = before is None or before.last_step == counter.step
            if in_turn and met.last_step != counter.step and call.is_like(name, model_kwargs):
                met.last_step = counter.step
                return met
        arguments, conditions = (name, *signature(model_kwargs)), Conditions(model_kwargs)
        alike = [context for context in self.current if context.arguments == arguments]
        context = self._met(counter.step, alike, conditions)
        if context is None and len(self.current) < self._limit:
            context = self._take(counter, arguments, session)
            twins = sum(other.ordinal == context.ordinal for other in self.current)
            label = f"{self._denoiser}[{counter.ordinal}]" + (f" #{twins + 1}" if twins else "")
            twin = next((other.conditions for other in alike if other.conditions.are(conditions)), None)
            context.restart(label, counter.step, conditions.keep(twin), session)
            self.current.append(context)
            alike.append(context)
        if context is None:
            return None
        same = [other for other in alike if other.conditions.are(conditions)]
        if context in same and (len(same) == 1 or conditions.counted):
            place = same.index(context)
            before = same[place - 1] if place else None
            self._known[counter.ordinal] = KnownCall(name, model_kwargs), context, before
        return context

    def _met(self, step: int, alike: Sequence[Context], conditions: Conditions) -> Context | None:
        """The context of this run that a call is of, if it is of one of those with its arguments."""
        waiting = [context for context in alike if context.last_step != step]
        same = [context for context in waiting if context.conditions.are(conditions)]
        if same and (len(same) == 1 or conditions.counted):
            met: Context | None = same[0]
        else:
            # made anew, or through one buffer that may serve several calls in turn
            met = next((context for context in waiting if context.conditions.equal(conditions)), None)
        if met is not None:
            met.last_step = step
        return met

    def _take(self, counter: StepCounter, arguments: tuple[Any, ...], session: Session) -> Context:
        """A context for the rest of a run, with the memory of one of the last run if that was alike."""
        ordinal = counter.ordinal
        alike = [c for c in self._idle if (c.ordinal, c.arguments) == (ordinal, arguments)]
        if alike:
            self._idle.remove(alike[0])
        else:
            # other shapes than in the last run: that memory will not be wanted
            self._idle = [context for context in self._idle if context.ordinal != ordinal]
        return alike[0] if alike else Context(Engine(session.config, session.backend), ordinal, arguments)

    def release(self) -> None:
        """Free all memory."""
        self._idle.clear()
        for context in self.current:
            context.release()

    @property
    def nbytes(self) -> int:
        """Bytes of history held, and of what its features are added up in."""
        return _held([*self.current, *self._idle])

    @property
    def current_nbytes(self) -> int:
        """The same, of this run's contexts alone."""
        return _held(self.current)

    @property
    def gates_nbytes(self) -> int:
        """Bytes of gates that this run's contexts hold."""
        return sum(context.gates_nbytes for context in self.current)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what else they keep for the run."""
        return sum(context.kept_nbytes for context in self.current)

    @property
    def planned_nbytes(self) -> int:
        """Bytes of history the contexts of this run want, by module."""
        return sum(context.planned_nbytes for context in self.current)


def _held(contexts: Sequence[Context]) -> int:
    memories = {id(memory): memory for c in contexts if (memory := c.low_rank.memory) is not None}
    return sum(c.engine.nbytes for c in contexts) + sum(memory.nbytes for memory in memories.values())
