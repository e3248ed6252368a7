"""Which pipeline a transformer is called by, and what for.

A server makes a pipeline for every request, ``from_pipe(shared, scheduler=...)``. Of those made after
``apply()`` nothing is known but what stands on the stack when they call the transformer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from hicache import compat
from hicache.pipeline import check_scheduler

_PIPELINES: Final = ("DiffusionPipeline", "ModularPipeline")  # by name: diffusers imports them slowly


@dataclass(frozen=True)
class Caller:
    """Who calls a transformer."""

    scheduler: Any = None  # of the pipeline; None where it is none
    name: str | None = None  # what a guider calls the prediction


def find_caller(*modules: nn.Module) -> Caller:
    """The pipeline that is calling a transformer, or another of its modules, now, if one is.

    It is what runs in a ``__call__``, or is given to one first (modular pipelines' blocks), and has the
    modules and a scheduler that can be watched among its attributes.
    """
    name = None
    for arguments, variables in compat.running_calls():
        name = name or compat.guider_prediction(variables)
        for argument in arguments:
            attributes = getattr(argument, "__dict__", None)
            if not isinstance(attributes, Mapping) or not _can_be_watched(attributes.get("scheduler")):
                continue
            if all(any(_is(value, module) for value in attributes.values()) for module in modules):
                return Caller(attributes["scheduler"], name)
    return Caller()


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


def _is(value: Any, module: nn.Module) -> bool:
    return isinstance(value, nn.Module) and compat.original_module(value) is module


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
