"""What skipped steps may do beside their sums: a companion of HiCache, which this knows nothing else of.

A companion's settings are any object with ``correctors``, the ``"module:class"`` of a subclass of
:class:`Correctors`, or None where there is nothing to do: so nothing of it is imported before somebody asks
for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hicache.adapters.base import ModuleAdapter
from hicache.runtime.call_form import CallForm
from hicache.step_plan import Correction, RunningCall


class Corrector:
    """Makes the corrections of one context's skipped steps."""

    #: Whether corrections write to the history: no update of the differences may wait then.
    edits = False
    #: What full steps write to for it, in a fixed place.
    memory: tuple[Tensor, ...] = ()

    def restart(self) -> None:
        """A run starts, or the context begins anew in one. Memory may be kept, and nothing else."""

    def commit(self) -> None:
        """A full step is over, and :attr:`memory` holds what it wrote."""

    def correct(self, step: int, form: CallForm) -> Correction:
        """The correction of a skipped step, counted from the context's first.

        Raises:
            RuntimeError: there is nothing to make it of.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """A skipped step is over, and its correction made."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError


class Correctors:
    """Makes the correctors of one transformer's contexts.

    Args:
        settings: the companion's.
        adapter: knows the transformer.
        call: its running call.

    Raises:
        ValueError: the companion does not know the transformer.
    """

    def __init__(self, settings: Any, adapter: ModuleAdapter, call: RunningCall) -> None:
        self.adapter = adapter
        self.call = call

    def watch(self, corrector: Corrector | None, form: CallForm) -> Corrector:
        """A full step begins: have what a context's corrector needs of it written to its memory.

        Args:
            corrector: of the context; None: it has none yet.
            form: of the context's calls.

        Returns:
            The context's corrector, the same one or another.
        """
        raise NotImplementedError

    def end(self) -> None:
        """A call has ended, or never came to its end: nothing more is written."""

    def forget(self) -> None:
        """The model may have changed, or is to be left as it was: take off what watches it."""

    def describe(self) -> str:
        """What it does, for the user."""
        raise NotImplementedError

    def refusal(self, form: CallForm) -> str | None:
        """Why skipped steps of calls of this form cannot be corrected; None where they can."""
        return None

    def check(self, form: CallForm, model_kwargs: Mapping[str, Any], compiled: bool, absent: bool) -> None:
        """At every full step: whether the skipped steps after it can be corrected.

        Args:
            form: of the call.
            model_kwargs: its arguments by name.
            compiled: whether it is compiled as a whole.
            absent: whether weights of blocks are at hand in their own blocks only.

        Raises:
            RuntimeError: they cannot.
        """
        reason = self.refusal(form)
        if compiled:
            reason = "it is compiled as a whole (compile_repeated_blocks() would do)"
        elif absent:
            reason = (
                "its weights are at hand in their own blocks only (offloaded or sharded), and every skipped "
                "step would have to bring them there"
            )
        elif form.ones or any(True for _ in self.adapter.between(model_kwargs)):
            reason = "a ControlNet adds to its hidden state between blocks"
        if reason is not None:
            name = type(self.adapter.module).__name__
            raise RuntimeError(f"hicache: the skipped steps of {name} cannot be corrected: {reason}")


def correctors_of(settings: Any, option: str, adapter: ModuleAdapter, call: RunningCall) -> Correctors | None:
    """What makes a companion's correctors for one transformer.

    Args:
        settings: the companion's.
        option: under which name the user gave them.
        adapter: knows the transformer.
        call: its running call.

    Returns:
        None: by these settings there is nothing to correct.

    Raises:
        TypeError: they are no companion's.
        ValueError: the companion does not know the transformer.
    """
    path = getattr(settings, "correctors", settings)
    if path is None:
        return None
    if not isinstance(path, str) or path is settings:
        raise TypeError(f"hicache: expected {option} to be settings of a companion or None, got {settings!r}")
    module, _, name = path.partition(":")
    made: type[Correctors] = getattr(importlib.import_module(module), name)
    return made(settings, adapter, call)


def by_module(granularity: str, option: str) -> str:
    """The granularity of a pipeline whose skipped steps are corrected.

    Raises:
        ValueError: another one is asked for.
    """
    if granularity not in ("auto", "module"):
        raise ValueError(
            f"hicache: {option}: expected granularity='module' or 'auto', got {granularity!r}: forecasts of "
            "single modules are corrected, and nothing else holds those"
        )
    return "module"
