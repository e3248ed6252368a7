"""Which pipeline a transformer is called by, and what for.

A server makes a pipeline for every request, ``from_pipe(shared, scheduler=...)``. Of those made after
``apply()`` nothing is known but what stands on the stack when they call the transformer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

from torch import nn

from hicache import compat
from hicache.pipeline import check_scheduler

_PIPELINES: Final = ("DiffusionPipeline", "ModularPipeline")  # by name: diffusers imports them slowly


class Caller(NamedTuple):
    """Who calls a transformer."""

    scheduler: Any = None  # of the pipeline; None where it is none
    name: str | None = None  # what a guider calls the prediction


class _Found(NamedTuple):
    """A pipeline that was found, held weakly."""

    pipe: Callable[[], Any]
    scheduler: Callable[[], Any]
    places: list[tuple[str, Callable[[], Any]]]  # its attributes that are the modules looked for


class CallerFinder:
    """Finds the pipeline that is calling a transformer, or another of its modules, if one is.

    It is what runs in a ``__call__``, or is given to one first (modular pipelines' blocks), and has the
    modules and a scheduler that can be watched among its attributes.

    Args:
        *modules: which it has to have.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._last: _Found | None = None

    def find(self) -> Caller:
        """Who is calling now."""
        name, last = None, self._last
        known = None if last is None else last.pipe()
        for arguments, variables in compat.running_calls():
            name = name or compat.guider_prediction(variables)
            for argument in arguments:
                scheduler = None
                if last is not None and argument is known and known is not None:
                    scheduler = self._unchanged(known, last)
                scheduler = scheduler or self._look_at(argument)
                if scheduler is not None:
                    return Caller(scheduler, name)
        return Caller()

    def _unchanged(self, pipe: Any, last: _Found) -> Any:
        """The scheduler of the pipeline found last, if nothing of that has changed."""
        attributes = pipe.__dict__
        scheduler = attributes.get("scheduler")
        if scheduler is not last.scheduler():
            return None
        for key, part in last.places:
            if attributes.get(key) is not part():
                return None
        return scheduler

    def _look_at(self, argument: Any) -> Any:
        """The scheduler of a pipeline; None where it is none, or another's."""
        attributes: Any = getattr(argument, "__dict__", None)
        scheduler = attributes.get("scheduler") if isinstance(attributes, dict) else None
        if scheduler is None:
            return None
        places = [_place(attributes, module) for module in self._modules]
        if None in places or not _can_be_watched(scheduler):
            return None
        found: list[tuple[str, Callable[[], Any]]] = [
            (key, weakref.ref(attributes[key])) for key in places if key is not None
        ]
        with suppress(TypeError):  # what cannot be held weakly is looked at every time
            self._last = _Found(weakref.ref(argument), weakref.ref(scheduler), found)
        return scheduler


def runs_in_diffusers(scheduler: Any) -> bool:
    """Whether a pipeline of diffusers that has this scheduler is running, a modular one or not.

    Those do step it. Of other classes that is not known.
    """
    return any(
        getattr(argument, "scheduler", None) is scheduler
        for arguments, _ in compat.running_calls()
        for argument in arguments
        if any(
            base.__name__ in _PIPELINES and base.__module__.startswith("diffusers.")
            for base in type(argument).__mro__
        )
    )


def _can_be_watched(scheduler: Any) -> bool:
    try:
        check_scheduler(scheduler)
    except TypeError:
        return False
    return True


def _place(attributes: Mapping[str, Any], module: nn.Module) -> str | None:
    """The attribute that is a module, or what ``torch.compile`` made of it."""
    for key, value in attributes.items():
        if isinstance(value, nn.Module) and compat.original_module(value) is module:
            return key
    return None


class CallName:
    """What a pipeline calls its calls: ``with transformer.cache_context("cond")``, of diffusers.

    Args:
        module: the transformer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._threads = threading.local()

    @property
    def current(self) -> str | None:
        """The name this thread's call has; None outside of any context."""
        return getattr(self._threads, "name", None)

    def install(self) -> Callable[[], None]:
        """Listen to the names; returns what undoes it."""
        attributes = self._module.__dict__
        enter = getattr(self._module, "cache_context", None)
        if enter is None or "cache_context" in attributes:
            return lambda: None

        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self._threads.name = self.current, name
            try:
                with enter(name, *args, **kwargs):
                    yield
            finally:
                self._threads.name = before

        attributes["cache_context"] = named
        return lambda: attributes.pop("cache_context", None)
