"""What is a feature: the residual of the whole stack, every module's output before its gate, or the output.

All make a skipped step one sum over a history (docs/algorithm.md, "A skipped step is one sum"). They differ
in what a full step records and in the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hicache.engine import Sum
from hicache.runtime.call_form import CallForm
from hicache.runtime.clock import StepClock
from hicache.runtime.context import BegunCall
from hicache.step_plan import FullStep, SkippedStep
from hicache.token_view import TokenView


class Recorder:
    """Makes the plans of calls, and takes in what they recorded; subclasses say what is a feature."""

    #: What the user calls it.
    name: str

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
        """A full step has been taken in: compute the gates of the skipped steps up to the next one.

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
    """One feature with a gate of one: what all blocks together add to the hidden state."""

    name = "stack"

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
        return SkippedStep(total, view=_ungrouped(begun.context.form))


def _ungrouped(form: CallForm) -> TokenView | None:
    return None if form.view is None else form.view.ungrouped
