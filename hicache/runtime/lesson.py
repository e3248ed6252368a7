"""What is learned from the first full step of a form of call: shapes, features, and their sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hicache.runtime.budget import RecorderChoice
from hicache.runtime.call_form import CallForm
from hicache.runtime.clock import StepClock
from hicache.runtime.context import BegunCall
from hicache.runtime.finite import not_finite
from hicache.runtime.gate_prefetch import embeds_ahead
from hicache.runtime.sum_check import NotFinite, Unfit
from hicache.runtime.token_layout import layout_check, token_layout
from hicache.stats import Stopwatch
from hicache.step_plan import FullStep, RunningCall


class FirstCall:
    """Checks around a full step that is the first of its form; a :class:`~hicache.step_plan.Lesson`.

    Args:
        begun: the call; its context learns its form.
        choice: of the recorder.
        call: the running call.
        clock: counts the steps.
        watch: counts the time.
    """

    def __init__(
        self,
        begun: BegunCall,
        choice: RecorderChoice,
        call: RunningCall,
        clock: StepClock,
        watch: Stopwatch,
    ) -> None:
        self._begun = begun
        self._call = call
        self._choice = choice
        self._clock = clock
        self._watch = watch
        self.unfit: str | None = None

    def first_block(self, hidden: Tensor, block_kwargs: Mapping[str, Any]) -> FullStep:
        """The form of the call is known: decide what to record, and where."""
        context, choice = self._begun.context, self._choice
        with self._watch.measure(hidden.device), torch.no_grad():
            model_kwargs = self._begun.model_kwargs
            form = CallForm.of(hidden, token_layout(choice.adapter, model_kwargs, hidden.shape))
            # nothing that holds on to the hidden states themselves
            form.block_kwargs = {n: v for n, v in block_kwargs.items() if not n.endswith("hidden_states")}
            if choice.modules is not None:
                adapter = choice.modules.adapter
                form.ones = int(bool(context.scale))
                form.num_features = adapter.num_features(block_kwargs) + form.ones
                form.refusal = form.layout.refusal or adapter.refusal(block_kwargs, model_kwargs)
            if choice.adapter is not None and choice.adapter.embedder is not None:
                known = form.block_kwargs, model_kwargs, form.like()
                form.embeds_ahead = embeds_ahead(choice.adapter, self._call.embedded, *known)
            context.form = form
            context.check = layout_check(choice.adapter, form.layout, model_kwargs, hidden.shape)
            choice.decide(self._begun, self._clock, learning=True)
            plan = choice.recorder.plan_full(self._begun)
            choice.recorder.learn(hidden, block_kwargs, model_kwargs)
        return plan

    def head(self, plan: FullStep, hidden: Tensor) -> FullStep | None:
        """Verify what was recorded; where it is wrong, record the stack instead, as if from the start."""
        form = self._begun.context.form
        assert form is not None
        with self._watch.measure(hidden.device), torch.no_grad():
            modules = self._choice.modules
            base = None if modules is None else modules.base
            try:
                self._choice.recorder.verify(hidden, form)
            except NotFinite:
                self.unfit = not_finite(self._begun.context.label, self._begun.step)
                self._choice.warn(self.unfit)
                return None
            except Unfit as error:
                self._choice.warn(f"{error}; its stack is cached instead")
                self._choice.give_up_modules(str(error))
                plan = self._choice.recorder.plan_full(self._begun)
                if base is None:
                    self.unfit = str(error)
                    return None
                assert plan.base is not None
                plan.base.copy_(base)
        if plan.base is not None and hidden.shape != form.entered:
            self.unfit = (
                f"gives its head a hidden state {tuple(hidden.shape)} that is not of the shape of its first "
                f"block's, {tuple(form.entered)}"
            )
            self._choice.warn(f"{self.unfit}: this call runs uncached")
            return None
        return plan
