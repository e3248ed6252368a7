"""What is a feature: the residual of the whole stack, every module's output before its gate, or the output.

All make a skipped step one sum over a history (docs/algorithm.md, "A skipped step is one sum"). They differ
in what a full step records and in the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.engine import Sum
from hicache.runtime.call_form import CallForm
from hicache.runtime.clock import StepClock
from hicache.runtime.context import BegunCall
from hicache.runtime.gate_constants import lora_scale
from hicache.step_plan import FullStep, SkippedStep
from hicache.token_view import TokenView


class Recorder:
    """Makes the plans of calls, and takes in what they recorded; subclasses say what is a feature."""

    #: What the user calls it.
    name: str

    def start_run(self, absent: bool) -> None:
        """A run starts.

        Args:
            absent: weights of the model's blocks are at hand in their own block only.
        """

    def plan_full(self, begun: BegunCall) -> FullStep:
        """A full step begins, of a call whose form is known: where to record."""
        raise NotImplementedError

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        """A skipped step begins: the sum to make."""
        raise NotImplementedError

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        """A call that is learned from has come to its first block: keep what :meth:`verify` needs."""

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """The same call: ``hidden`` leaves the last block.

        Raises:
            Unfit: what was recorded does not make it.
        """

    def finish(self, form: CallForm, model_kwargs: Mapping[str, Any]) -> None:
        """A full step has ended: what it recorded is to be in its slots."""

    def foresee(self, begun: BegunCall, clock: StepClock) -> None:
        """A full step enters its first block, in a model whose weights are at hand in its blocks only."""

    def prefetch(self, begun: BegunCall, clock: StepClock) -> str | None:
        """A full step has been taken in: compute what the skipped steps up to the next one need of theirs.

        Returns:
            Why the steps to come cannot be skipped; None where they can.
        """
        return None

    def can_skip(self, begun: BegunCall) -> bool:
        """Whether all that this step needs to be skipped is at hand."""
        return True

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""


class StackRecorder(Recorder):
    """One feature with a gate of one: what all blocks together add to the hidden state.

    Args:
        adapter: knows how the model embeds timesteps; None where nobody does.
    """

    name = "stack"

    def __init__(self, adapter: ModuleAdapter | None = None) -> None:
        self._adapter = adapter
        self._absent = False

    def start_run(self, absent: bool) -> None:
        self._absent = absent

    def plan_full(self, begun: BegunCall) -> FullStep:
        form = begun.context.form
        assert form is not None
        [slot] = begun.context.engine.open([form.shape], form.dtype, form.device)
        # A copy of what enters: blocks may work in place. The inbox has room for it unless it would round.
        exact = torch.promote_types(slot.dtype, form.dtype) == slot.dtype
        base = slot if exact else torch.empty(form.shape, dtype=form.dtype, device=form.device)
        return FullStep((slot,), base, _ungrouped(form))

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        assert begun.context.form is not None
        view = _ungrouped(begun.context.form)
        if begun.replayed:  # a graph embeds a timestep in less of the host's time than a look takes
            return SkippedStep(total, view=view)
        ahead = begun.context.prefetch.ahead(begun.step, begun.model_kwargs)
        return SkippedStep(total, view=view, embedded=ahead.embedded)

    def foresee(self, begun: BegunCall, clock: StepClock) -> None:
        if self._adapter is not None:
            fetch(self._adapter, begun, clock, gates=False)

    def prefetch(self, begun: BegunCall, clock: StepClock) -> str | None:
        if self._adapter is not None and not begun.replayed:
            if not self._absent:
                fetch_afterwards(self._adapter, begun, clock, gates=False)
            begun.context.prefetch.settle(self._adapter)
        return None


def fetch(adapter: ModuleAdapter, begun: BegunCall, clock: StepClock, gates: bool) -> None:
    """Compute, at a full step, what the skipped steps up to the next one need of their timesteps.

    Args:
        adapter: the family's.
        begun: the call of the full step.
        clock: counts the steps.
        gates: whether they need gates, and not only what the model's embedder gives.
    """
    context, form = begun.context, begun.context.form
    if form is None or not (gates or form.embeds_ahead):
        return
    first, num_steps = begun.step + 1, clock.num_steps
    steps = range(first, first if num_steps is None else context.next_full(begun.step, num_steps))
    given = form.block_kwargs, begun.model_kwargs, form.like()
    context.prefetch.fetch(adapter, steps, *given, gates, form.embeds_ahead, last=steps.stop == num_steps)


def fetch_afterwards(adapter: ModuleAdapter, begun: BegunCall, clock: StepClock, gates: bool) -> None:
    """The same after the forward, when diffusers has taken the call's scale from its LoRA layers again."""
    with compat.lora_scaled(adapter.module, lora_scale(begun.kwargs)):
        fetch(adapter, begun, clock, gates)


def _ungrouped(form: CallForm) -> TokenView | None:
    return None if form.view is None else form.view.ungrouped
