"""A ControlNet that a pipeline calls before its transformer: it runs at full steps only.

It is called before anybody knows whether the step is full. Where all contexts of the transformer are about to
skip, its call waits, and tensors without memory stand for its residuals (``hooks/deferred.py``). A skipped
step never looks at them. If a context runs in full after all (one that begins in the middle of a run, a full
step that was not finite), they turn into the real ones there and then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hicache import compat
from hicache.arguments import argument_names
from hicache.checks import is_number
from hicache.handle import NotCopied
from hicache.hooks.caller import CallerFinder
from hicache.hooks.deferred import OutputForm
from hicache.hooks.watched_calls import watch_calls
from hicache.runtime.context import Context
from hicache.runtime.denoiser import Denoiser
from hicache.runtime.residuals import NO_RESIDUALS, Scale, mark
from hicache.runtime.session import Session
from hicache.runtime.sessions import Sessions
from hicache.runtime.signature import requires_grad, signature
from hicache.stats import ControlNetStats


class _Run:
    """A ControlNet in one run of a session."""

    def __init__(self, number: int, always: str | None) -> None:
        self.number = number  # of the run
        self.stats = ControlNetStats(always=always)
        self.forms: dict[Any, OutputForm] = {}  # of what was given to calls of a form


class ControlNet(NotCopied):
    """One watched ControlNet.

    Args:
        name: the pipeline's for it.
        module: the ControlNet, or several in one. It is only looked at until :meth:`install`.
        denoisers: the transformers of its pipeline.
        sessions: what all of them share.
    """

    def __init__(
        self, name: str, module: nn.Module, denoisers: Sequence[Denoiser], sessions: Sessions
    ) -> None:
        self.name = name
        self.module = module
        self._denoisers = denoisers
        self._sessions = sessions
        self._names = argument_names(module)
        self._runs: dict[Session, _Run] = {}
        self._undo: Callable[[], None] | None = None
        # what torch.compile makes of a module calls that in a way of its own
        self._always = None if compat.original_module(module) is module else "torch.compile() is around it"

    def install(self) -> None:
        """Watch its calls, unless they cannot be."""
        if self._always is None:
            self._undo = watch_calls(self.module, self._call)

    def remove(self) -> None:
        """Leave it as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def release(self) -> None:
        """Forget the forms of its residuals: the next call is made where it stands."""
        for run in tuple(self._runs.values()):
            run.forms.clear()

    def stats(self, session: Session) -> ControlNetStats:
        """What became of its calls in the session's run."""
        return self._run(session).stats

    def _run(self, session: Session) -> _Run:
        run = self._runs.get(session)
        if run is None or run.number != session.clock.run:
            run = self._runs[session] = _Run(session.clock.run, self._always)
        return run

    def _call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of it, by whomever: made now, or when somebody needs what it gives."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        scale = _scale(named.get("conditioning_scale", 1.0))
        session = self._session(named)
        training = torch.is_grad_enabled() and (self.module.training or requires_grad(named))
        if session is None or scale is None or training:
            return call(*args, **kwargs)
        run, form = self._run(session), _form(named)
        run.stats.calls += 1

        def made() -> Any:
            run.stats.runs += 1
            output = call(*args, **kwargs)
            mark(output, scale)
            return output

        coming = self._coming(session)
        if any(context.scale is None for context in coming):
            run.stats.always = "the transformer is not given its residuals as they are"
        if form in run.forms and coming and all(_skips(context, session, scale) for context in coming):
            output = run.forms[form].defer(made)
            mark(output, scale)
            return output
        output = made()
        with contextlib.suppress(TypeError):  # what is not known to have a form is made at every call
            run.forms[form] = OutputForm(output)
        return output

    def _session(self, named: Mapping[str, Any]) -> Session | None:
        """Of the pipeline that calls; None where none does that has one of the transformers too.

        Whoever else calls it, a loop of one's own or a pipeline that is not cached, gets what it gives now.
        """
        for denoiser in self._denoisers:
            caller = CallerFinder(self.module, denoiser.module).find()
            if caller.scheduler is not None:
                return self._sessions.of_call(caller.scheduler, named)
        return None

    def _coming(self, session: Session) -> list[Context]:
        """The contexts that were given residuals in the last step, and most likely are in this."""
        contexts = [context for denoiser in self._denoisers for context in denoiser.tracks.going_on(session)]
        return [context for context in contexts if context.scale != NO_RESIDUALS]


def _skips(context: Context, session: Session, scale: Scale) -> bool:
    """Whether a context is about to skip a step in which the ControlNet has this scale."""
    return context.scale == scale and not context.is_full(session.clock.step)


def _scale(given: Any) -> Scale | None:
    """Numbers of one ControlNet or several; None for anything else."""
    scales = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return scales if all(map(is_number, scales)) else None


def _form(named: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for what one call gave to be of the form of what another will give."""
    choices = [(name, value) for name, value in named.items() if isinstance(value, (bool, str))]
    return (*signature(named), *choices)
