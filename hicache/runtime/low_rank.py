"""Records a family's features as a few weighed sums of them: between modules and the stack in memory.

What it keeps is in :mod:`hicache.runtime.gate_rank`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hicache import compat
from hicache.engine import Sum
from hicache.runtime.call_form import CallForm
from hicache.runtime.clock import StepClock
from hicache.runtime.context import BegunCall, Context
from hicache.runtime.gate_constants import lora_scale
from hicache.runtime.gate_prefetch import come_out_alike, foretold
from hicache.runtime.gate_rank import GateBasis, SumMemory, forecast_misses, why_not
from hicache.runtime.module_recorder import ModuleRecorder, as_blocks_do
from hicache.runtime.recorders import Recorder
from hicache.runtime.residuals import write_total
from hicache.step_plan import FullStep, SkippedStep


class LowRankRecorder(Recorder):
    """A feature a direction of the gates, and one of the rest.

    Args:
        modules: records the family's outputs.
        tolerance: what gates may be off by, relative.
    """

    name = "low-rank"

    def __init__(self, modules: ModuleRecorder, tolerance: float) -> None:
        self.modules = modules
        self.tolerance = tolerance
        self._foretold = True  # whether gates of other steps come out as those of the step itself
        # contexts of one form share it: calls take turns
        self._memory: weakref.WeakValueDictionary[Any, SumMemory] = weakref.WeakValueDictionary()
        self._slots: tuple[Tensor, ...] = ()
        self._sums: Tensor | None = None
        self._gates: Tensor | None = None  # of the features kept, at this step
        self._model_kwargs: Mapping[str, Any] = {}  # of a call learned from
        self._embedded: Tensor | None = None  # of a skipped step that can be had

    def prepare(self, begun: BegunCall, clock: StepClock, learning: bool) -> str | None:
        """A full step begins: see to it that its context has a basis that holds.

        Args:
            begun: the call.
            clock: knows how many steps there are.
            learning: the call is learned from, and has come to its first block.

        Returns:
            Why there is none.
        """
        context = begun.context
        state = context.low_rank
        if state.basis is not None:
            state.row = self._row(begun)
            if state.row is not None:
                return None
            state.missed += not context.is_full(begun.step)
            if state.missed > 1:
                return "what its gates depend on changes from step to step, so that none can be skipped"
            state.basis = None
            context.distrust()  # what is recorded is of other directions
        form = context.form
        assert form is not None
        reason = why_not(self.modules.adapter, form.num_outputs)
        if reason is None and self.modules.late is not None:
            reason = "its weights are there in their own blocks only, and low rank needs gates ahead of them"
        if reason is not None:
            return reason
        scale = compat.lora_scaled(self.modules.adapter.module, lora_scale(begun.kwargs))
        # in the forward, diffusers has given the call's scale to its LoRA layers already
        with contextlib.nullcontext() if learning else scale:
            rows = self._rows(begun, clock, form, learning)
        if isinstance(rows, str):
            return rows
        engine, num_steps = context.engine, begun.local_step + len(rows)
        misses, skipped = forecast_misses(engine, begun.local_step, num_steps)
        state.basis = GateBasis.of(rows, begun.step, misses, skipped, self.tolerance)
        state.row = rows[0].clone()  # a view would hold those of all steps
        return None if state.basis is not None else "its gates are not finite"

    def _rows(self, begun: BegunCall, clock: StepClock, form: CallForm, learning: bool) -> Tensor | str:
        """The gates of this and all coming steps, ``[steps, num_features, batch, channels]``; or why not."""
        adapter, like, prefetch = self.modules.adapter, form.like(), begun.context.prefetch
        told = foretold(adapter, form.block_kwargs, begun.model_kwargs, like)
        if told is None or clock.num_steps is None:
            return "gates of low rank need a scheduler's steps, and a timestep that all tokens share"
        told = as_blocks_do(told.clone(), like)
        if learning:
            own = as_blocks_do(adapter.gates(form.block_kwargs, like), like)
            self._foretold = come_out_alike(told, own)
            told = own.clone()
        if not self._foretold:
            return "its gates are not those its family makes of the timestep"
        steps = range(begun.step + 1, clock.num_steps)
        given = form.block_kwargs, begun.model_kwargs, like
        prefetch.fetch(adapter, steps, *given, embedding=form.embeds_ahead, last=True)
        prefetch.own()
        if steps and prefetch.rows is None:
            return "gates of low rank need a scheduler whose timesteps the model is called with"
        return told[None] if prefetch.rows is None else torch.cat([told[None], prefetch.rows])

    def _row(self, begun: BegunCall) -> Tensor | None:
        """The gates of a step, where those told at the first step hold."""
        return begun.context.prefetch.ahead(begun.step, begun.model_kwargs, read=True).gates

    def planned_nbytes(self, contexts: Iterable[Context]) -> int:
        """Bytes these contexts want, with the gates of the run and what features are added up in."""
        histories, memory = 0, {}
        for context in contexts:
            histories += context.gates_nbytes  # they are there before the history is
            form, basis = context.form, context.low_rank.basis
            if form is not None and basis is not None:
                rows = basis.rank + 1
                histories += context.engine.planned_nbytes([form.shape] * rows, form.dtype)
                key = rows, form.num_outputs, form.shape, form.dtype
                memory[key] = SumMemory.planned_nbytes(*key)
        return histories + sum(memory.values())

    def plan_full(self, begun: BegunCall) -> FullStep:
        context = begun.context
        form, state = context.form, context.low_rank
        assert form is not None
        basis, row = state.basis, state.row
        assert basis is not None
        assert row is not None
        outputs = self.modules.watch(form.view)
        key = basis.rank + 1, form.num_outputs, form.shape, form.dtype, form.device
        memory = self._memory.get(key)
        if memory is None:
            state.memory = None  # of another form: it goes before its successor comes
            memory = self._memory[key] = SumMemory(*key)
        state.memory = memory
        basis.write_weights(begun.step, row, memory.weights)
        memory.sums.zero_()
        shapes = [form.shape] * (basis.rank + 1)
        self._slots = tuple(context.engine.open(shapes, form.dtype, form.device))
        self._sums, self._gates = memory.sums, basis.gates[begun.step - basis.first]
        outputs.bind_sums(memory.sums, memory.weights, form.view)
        return FullStep((*self._slots, *memory.sums), view=form.view, weights=memory.weights)

    def prefetch(self, begun: BegunCall, clock: StepClock) -> str | None:
        # after the forward, when diffusers has taken the call's scale from its LoRA layers again
        begun.context.prefetch.settle(self.modules.adapter)
        return None

    def can_skip(self, begun: BegunCall) -> bool:
        if begun.context.low_rank.basis is None:
            return False
        gates, self._embedded = begun.context.prefetch.ahead(begun.step, begun.model_kwargs, read=True)
        return gates is not None

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        basis, form = begun.context.low_rank.basis, begun.context.form
        assert basis is not None
        assert form is not None
        begun.context.low_rank.missed = 0
        gates = basis.gates[begun.step - basis.first]
        between = () if form.ones else tuple(self.modules.adapter.between(begun.model_kwargs))
        return SkippedStep(total, gates, True, between, view=form.view, embedded=self._embedded)

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        self._model_kwargs = model_kwargs
        self.modules.learn(hidden, block_kwargs, model_kwargs)

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """As by module: at a full step the sum over the features kept is the sum over all of them."""
        self.modules.take_missing(form)
        self.finish(form, self._model_kwargs)
        assert self._gates is not None
        between = () if form.ones else self.modules.between
        self.modules.check_sum(hidden, self._slots, self._gates, between)

    def finish(self, form: CallForm, model_kwargs: Mapping[str, Any]) -> None:
        assert self._sums is not None
        *directions, rest = self._sums
        if form.ones:  # what a ControlNet adds has a gate of one, as the rest has
            added = torch.empty_like(rest)
            write_total(self.modules.adapter.between(model_kwargs), added, form.view)
            rest = rest + added  # a call that is learned from finishes twice
        for slot, total in zip(self._slots, (*directions, rest), strict=True):
            slot.copy_(total)

    def end(self) -> None:
        self._slots, self._sums, self._gates, self._model_kwargs = (), None, None, {}
        self._embedded = None
