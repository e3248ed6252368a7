"""Plans of full and skipped steps: made before a call runs, and what came of them taken in after it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.hooks.block_interface import UNCACHED
from hicache.hooks.dynamo import CompilePause, OpenSizes
from hicache.hooks.hooked import HookedModule
from hicache.runtime.budget import RecorderChoice
from hicache.runtime.context import BegunCall
from hicache.runtime.finite import not_finite
from hicache.runtime.lesson import FirstCall
from hicache.runtime.module_recorder import ModuleRecorder
from hicache.runtime.session import Session
from hicache.step_plan import FullStep, SkippedStep
from hicache.trees import tensors_of


class CallPlanner:
    """Plans the calls of one denoiser, and takes in what came of them.

    Args:
        hooked: the transformer, watched.
        choice: of the recorder.
        session: what all denoisers of the pipeline share.
    """

    def __init__(self, hooked: HookedModule, choice: RecorderChoice, session: Session) -> None:
        self._hooked = hooked
        self._choice = choice
        self._session = session
        self._pause = CompilePause()
        self._sizes = OpenSizes()

    def wanted(self, model_kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of a call's arguments, besides their shapes, tells that it is of another form."""
        return ()

    def is_full(self, begun: BegunCall) -> bool:
        """Whether the blocks run in this call."""
        context, choice = begun.context, self._choice
        failed = context.finite.failed_step()
        if failed is not None:
            choice.warn(not_finite(context.label, failed))
            context.distrust()
        if context.check is not None and not context.check.holds(begun.model_kwargs, choice.by_module):
            context.unlearn()
            return True
        return context.is_full(begun.step) or not choice.recorder.can_skip(begun)

    def begin_full(self, begun: BegunCall) -> None:
        """Plan a full step; the first of its form is learned from."""
        call, choice, context = self._hooked.call, self._choice, begun.context
        self._hooked.refresh()
        call.checked, call.recalled = begun.checked, context.recalled
        if context.full_steps == 0:
            choice.look_again(context, begun.model_kwargs)
        if choice.absent:
            call.on_entry = lambda: choice.recorder.foresee(begun, self._session.clock)
        if context.form is None:
            call.lesson = FirstCall(begun, choice, call, self._session.clock, self._session.watch)
            self._pause.hold()
            if not begun.compiled:
                return
            # Too late to keep this call from being compiled: learn from one of our own.
            self._hooked.module.forward(*begun.args, **begun.kwargs)
            self.take_in(begun)
            context.engine.distrust()
            self.end()
            call.checked, call.recalled = begun.checked, context.recalled
            if context.form is None:
                return
        with self._session.watch.measure(context.form.device), torch.no_grad():
            choice.decide(begun, self._session.clock)
            call.plan = choice.recorder.plan_full(begun)

    def begin_skipped(self, begun: BegunCall) -> None:
        """Plan a skipped step; the first of a model is checked."""
        call, context = self._hooked.call, begun.context
        assert context.form is not None
        call.recalled = context.recalled
        watch = self._session.watch
        started = watch.start(context.form.device)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if context.corrector is not None and context.corrector.edits:
                context.engine.flush()
            # a graph serves many skipped steps, so that they must not differ but in numbers
            total = context.engine.prepare(
                begun.local_step, fixed=begun.replayed or begun.compiled, fused=not begun.compiled
            )
            call.plan = self._choice.recorder.plan_skipped(begun, total)
            if begun.compiled:
                self._sizes.hold()
                call.plan = call.plan.of_any_size()
                call.recalled = [compat.of_any_size(embedding) for embedding in context.recalled]
        watch.stop(started)
        if self._hooked.verified:
            return
        call.verifying = True
        self._pause.hold()
        if begun.compiled:
            self._hooked.module.forward(*begun.args, **begun.kwargs)
            call.recall_index, call.verifying = 0, False
            self._pause.let_go()

    def commit(self, begun: BegunCall, output: Any) -> None:
        """A call has come to its end: take in what it recorded, and compute ahead for the steps to come.

        Args:
            begun: the call.
            output: the transformer's, whatever it is wrapped in.
        """
        context, call = begun.context, self._hooked.call
        if call.skipping:
            context.engine.settle()
            if context.corrector is not None:
                context.corrector.settle()
            context.skipped_steps += 1
            if begun.step == context.prefetch.last:
                context.prefetch.end_run()
            return
        context.count_full()
        if call.plan is None and call.lesson is None:
            return  # compiled as a whole, and learned that nothing can be recorded
        self.take_in(begun)
        if context.form is None:
            return
        with self._session.watch.measure(context.form.device), torch.no_grad():
            context.engine.commit(begun.local_step)
            if context.corrector is not None:
                context.corrector.commit()
            context.finite.ask(begun.step, self._telling(output))
            reason = self._choice.recorder.prefetch(begun, self._session.clock)
            if reason is not None:
                self._choice.fall_back(reason)

    def _telling(self, output: Any) -> list[Tensor]:
        """Tensors that are not finite where a feature is not."""
        parts = list(output.values()) if isinstance(output, Mapping) else output
        found = tensors_of(parts)
        plan = self._hooked.call.plan
        slots = plan.slots if isinstance(plan, FullStep) else ()
        # its range is the only one that is less than that of the others
        narrow = [slot for slot in slots if slot.dtype == torch.float16]
        return [tensor for tensor in (*found, *narrow) if tensor.is_floating_point()]

    def take_in(self, begun: BegunCall) -> None:
        """Take in what a full step recorded, if it did.

        Raises:
            RuntimeError: it did not go through its blocks or its head as it should.
        """
        call, name, context = self._hooked.call, self._hooked.name, begun.context
        lesson = call.lesson
        if lesson is not None and not call.result.entered:
            raise RuntimeError(
                f"hicache: {name} runs without iterating over its blocks, so they cannot be skipped; "
                f"{UNCACHED}"
            )
        if not (call.result.entered and call.result.head_reached):
            raise RuntimeError(
                f"hicache: {name} ran without its blocks or its head being seen, so nothing could be "
                f"recorded; {UNCACHED}"
            )
        if lesson is not None and lesson.unfit is not None:
            context.unlearn()
            context.distrust()
            return
        assert context.form is not None
        with self._session.watch.measure(context.form.device), torch.no_grad():
            self._choice.recorder.finish(context.form, begun.model_kwargs)

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""
        self._choice.end()
        self._hooked.end()
        self._pause.let_go()
        self._sizes.let_go()


def forecast(
    plan: SkippedStep, modules: ModuleRecorder | None, base: Tensor, block_kwargs: Mapping[str, Any]
) -> Tensor:
    """The hidden state after the blocks, with gates prefetched or computed now.

    Args:
        plan: of this skipped step.
        modules: computes gates.
        base: ``[batch, tokens, channels]``, the hidden state that enters the first block.
        block_kwargs: the first block's arguments by name.
    """
    with torch.no_grad():
        gates, view = plan.gates, plan.view
        hidden = base if view is None else view.drawn(base)
        if gates is None and plan.gated:
            assert modules is not None
            gates = modules.gates(block_kwargs, hidden if view is None else view.grouped(hidden), plan.ones)
        for residual in plan.between:
            hidden = hidden + (residual if view is None else view.drawn(residual))
        grouped = hidden if view is None else view.grouped(hidden)
        if plan.correction is None:
            total = plan.sum(grouped, gates)
        else:
            assert gates is not None
            total = plan.correction(plan.sum, grouped, gates, block_kwargs)
        return total if view is None else view.filled(base, total)
