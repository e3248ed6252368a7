"""Which recorder a denoiser's calls get: modules where they are known, fit the memory and prove right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hicache.adapters.base import ModuleAdapter
from hicache.runtime.context import Context, Contexts
from hicache.runtime.recorders import ModuleRecorder, Recorder, StackRecorder
from hicache.runtime.token_layout import layout_check, token_layout


@dataclass(frozen=True)
class Policy:
    """What a user wants cached: ``"module"``, ``"stack"``, or ``"auto"``: module if it fits the budget."""

    granularity: str
    memory_budget: int  # bytes


class RecorderChoice:
    """The recorder of a denoiser's calls, and why it is that one.

    Args:
        model: name of the transformer's class, for messages.
        policy: what the user wants.
        modules: records by module; None where nobody knows the modules.
        contexts: whose histories the budget is for.
        warn: tells the user, once.
        adapter: says which tokens are drawn, whatever is cached of them; None where nobody knows the model.
    """

    def __init__(
        self,
        model: str,
        policy: Policy,
        modules: ModuleRecorder | None,
        contexts: Contexts,
        warn: Callable[[str], None],
        adapter: ModuleAdapter | None = None,
    ) -> None:
        self._model = model
        self.adapter = adapter
        self._policy = policy
        self._contexts = contexts
        self.warn = warn
        self.stack = StackRecorder()
        self.modules = None if policy.granularity == "stack" else modules
        self._why_stack = (
            "asked for" if policy.granularity == "stack" else f"no adapter knows the modules of {model}"
        )
        self.recorder: Recorder = self.modules or self.stack

    def start_run(self) -> None:
        """A run starts: modules are tried anew."""
        if self.modules is not None:
            self.modules.start_run()
        self.recorder = self.modules or self.stack

    @property
    def by_module(self) -> bool:
        """Whether modules are recorded at the moment."""
        return self.recorder is self.modules

    def look_again(self, context: Context, model_kwargs: Mapping[str, Any]) -> None:
        """A context's first call in a run: its tokens may not be laid out as in an earlier run.

        May read the device.
        """
        form = context.form
        if form is None:
            return
        if token_layout(self.adapter, model_kwargs, form.entered) == form.layout:
            context.check = layout_check(self.adapter, form.layout, model_kwargs, form.entered)
        else:
            context.unlearn()

    def decide(self, context: Context) -> None:
        """At every full step: whether this run's contexts can be cached by module.

        Raises:
            RuntimeError: they cannot, and the user asked for modules.
        """
        form = context.form
        assert form is not None
        if self.recorder is self.stack:
            return
        refusal = None if form.refusal is None else f"{self._model}: {form.refusal}"
        if refusal is None and self._policy.granularity == "auto":
            refusal = self._over_budget(context, form.device)
        if refusal is not None:
            self.fall_back(refusal)

    def fall_back(self, reason: str) -> None:
        """Cache the stack for the rest of the run, in every context.

        Raises:
            RuntimeError: the user asked for modules.
        """
        if self._policy.granularity == "module":
            raise RuntimeError(
                f"hicache: granularity='module' cannot be had: {reason}; use granularity='stack' or 'auto'"
            )
        self.recorder, self._why_stack = self.stack, reason
        if self.modules is not None:
            self.modules.end()
        for context in self._contexts.current:
            context.engine.release()

    def give_up_modules(self, reason: str) -> None:
        """The sum over the modules is wrong: cache the stack from here on, in every run.

        Raises:
            RuntimeError: the user asked for modules.
        """
        self.fall_back(f"{self._model} {reason}")
        assert self.modules is not None
        self.modules.forget()
        self.modules = None

    def describe(self) -> str:
        """What is cached of the current run's calls, and why."""
        if self.recorder is self.stack:
            return f"stack: {self._why_stack}"
        planned = self._contexts.planned_nbytes
        if self._policy.granularity == "module":
            return f"module: asked for; {planned:,} bytes"
        return f"module: {planned:,} bytes fit memory_budget={self._policy.memory_budget:,}"

    def _over_budget(self, context: Context, device: torch.device) -> str | None:
        """Why the histories of this run's contexts must not be held; None when they may."""
        planned, budget = self._contexts.planned_nbytes, self._policy.memory_budget
        # Where the second context is too much, the first has been recorded in vain; in every such run anew,
        # as nothing of an earlier run may change the picture.
        if planned > budget:
            return f"its modules' history, {planned:,} bytes or more, is over memory_budget={budget:,}"
        wanted = context.planned_nbytes - context.engine.nbytes
        free = _free_bytes(device) if wanted > 0 else None
        if free is not None and wanted > free:
            why = f"its modules' history wants {wanted:,} bytes and {free:,} are free on {device}"
            self.warn(f"is cached as a stack: {why}")
            return why
        return None


def _free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU; None for other devices, which do not tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
