"""What is a feature: the residual of the whole stack, or every module's output before its gate.

Both make a skipped step one sum over a history (docs/algorithm.md, "A skipped step is one sum"). They differ
in what a full step records and in the gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.adapters.base import ModuleAdapter
from hicache.engine import Engine, Sum
from hicache.hooks.module_outputs import ModuleOutputs
from hicache.runtime.context import BegunCall, CallForm
from hicache.runtime.gate_prefetch import can_prefetch
from hicache.runtime.session import StepClock
from hicache.step_plan import FullStep, RunningCall, SkippedStep


class Unfit(Exception):
    """What a full step recorded cannot stand for the blocks; the message says why."""


class Recorder:
    """Makes the plans of calls, and takes in what they recorded; subclasses say what is a feature."""

    #: What the user calls it.
    name: str

    def plan_full(self, engine: Engine, form: CallForm) -> FullStep:
        """A full step begins: where to record."""
        raise NotImplementedError

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        """A skipped step begins: the sum to make."""
        return SkippedStep(total)

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        """A call that is learned from has come to its first block: keep what :meth:`verify` needs."""

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """The same call: ``hidden`` leaves the last block.

        Raises:
            Unfit: what was recorded does not make it.
        """

    def finish(self, form: CallForm) -> None:
        """A full step has ended: what it recorded is to be in its slots."""

    def prefetch(self, begun: BegunCall, clock: StepClock) -> None:
        """A full step has been taken in: compute the gates of the skipped steps up to the next one."""

    def end(self) -> None:
        """A call has ended, or never came to its end: let go of its tensors."""


class StackRecorder(Recorder):
    """One feature with a gate of one: what all blocks together add to the hidden state."""

    name = "stack"

    def plan_full(self, engine: Engine, form: CallForm) -> FullStep:
        [slot] = engine.open([form.shape], form.dtype, form.device)
        # A copy of what enters: blocks may work in place. The inbox has room for it unless it would round.
        exact = torch.promote_types(slot.dtype, form.dtype) == slot.dtype
        base = slot if exact else torch.empty(form.shape, dtype=form.dtype, device=form.device)
        return FullStep((slot,), base)


class ModuleRecorder(Recorder):
    """The paper's: a family's features, each with the gate of the current timestep.

    Args:
        adapter: the family's.
        call: the transformer's running call.
    """

    name = "module"

    def __init__(self, adapter: ModuleAdapter, call: RunningCall) -> None:
        self.adapter = adapter
        self._call = call
        self._outputs: ModuleOutputs | None = None
        self._slots: tuple[Tensor, ...] = ()
        # Of a call learned from: what to check the sum against.
        self.base: Tensor | None = None
        self._block_kwargs: Mapping[str, Any] = {}
        self._between: Sequence[Tensor] = ()
        self._model_kwargs: Mapping[str, Any] = {}
        self._verified: set[int] = set()
        self._can_prefetch = True  # whether gates of coming steps come out as those of the step itself

    def plan_full(self, engine: Engine, form: CallForm) -> FullStep:
        outputs = self._watch()
        self._slots = tuple(engine.open([form.shape] * form.num_features, form.dtype, form.device))
        outputs.bind(self._slots)
        return FullStep(self._slots)

    def _watch(self) -> ModuleOutputs:
        """Record the outputs of the family's modules; LoRA may have put others in their places since."""
        wanted = list(self.adapter.outputs())
        modules: list[nn.Module] = [output.module for output in wanted]
        if self._outputs is not None:
            held = self._outputs.modules
            if len(held) == len(modules) and all(a is b for a, b in zip(held, modules, strict=True)):
                return self._outputs
            self._outputs.remove()
        self._outputs = ModuleOutputs(self._call, wanted)
        return self._outputs

    def plan_skipped(self, begun: BegunCall, total: Sum) -> SkippedStep:
        gates = begun.context.prefetch.gates(self.adapter, begun.step, begun.model_kwargs)
        return SkippedStep(total, gates, True, tuple(self.adapter.between(begun.model_kwargs)))

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        """The gates of this step, ``[num_features, batch, channels]``."""
        gates = self.adapter.gates(block_kwargs, base)
        # One timestep may serve several pictures, and autocast may leave embeddings of higher precision than
        # hidden states: blocks broadcast and promote. Mostly this changes nothing.
        return gates.expand(-1, len(base), -1).to(base.device, base.dtype).contiguous()

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        between = list(self.adapter.between(model_kwargs))
        if len(self._slots) not in self._verified:
            self.base, self._block_kwargs, self._between = hidden.clone(), dict(block_kwargs), between
            self._model_kwargs = model_kwargs

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """Checks that base + Σ gate ⊙ feature is what the blocks made: once a form of call, with a host sync.

        Also takes in which features have no output.

        Raises:
            Unfit: it is not.
        """
        assert self._outputs is not None
        try:
            form.missing = self._outputs.missing(len(self._slots))
        except ValueError as error:
            raise Unfit(f"cannot be cached module by module: {error}") from error
        if self.base is None:
            return
        base = self.base
        self._outputs.finish(self._slots, form.missing)
        self._call.result.partial_sums.clear()
        accumulated = torch.promote_types(base.dtype, torch.float32)
        gates = self.gates(self._block_kwargs, base).clone()
        total = base.to(accumulated)
        for slot, gate in zip(self._slots, gates[:, :, None], strict=True):  # [batch, 1, channels] each
            total = total + slot.to(accumulated) * gate
        for residual in self._between:
            total = total + residual
        # a model of low precision rounds after every block, this sum once; a history of low precision rounds
        # features
        lowest = min((base.dtype, self._slots[0].dtype), key=lambda dtype: dtype.itemsize)
        allowed = 0.1 if lowest.itemsize < 4 else 1e-3
        off, moved = (total - hidden).norm().item(), (hidden.to(accumulated) - base).norm().item()
        rounding = 8 * torch.finfo(lowest).eps * total.norm().item()
        if not (math.isfinite(moved) and off <= allowed * moved + rounding):
            raise Unfit(
                f"does not add gate · feature of its modules alone (off by {off:.3g} of {moved:.3g}): is one "
                "of its blocks or attention processors not its own?"
            )
        self._verified.add(len(self._slots))
        self._can_prefetch = can_prefetch(
            self.adapter, self._block_kwargs, self._model_kwargs, form.like(), gates
        )

    def finish(self, form: CallForm) -> None:
        assert self._outputs is not None
        self._outputs.finish(self._slots, form.missing)

    def prefetch(self, begun: BegunCall, clock: StepClock) -> None:
        context, form = begun.context, begun.context.form
        if not self._can_prefetch or form is None:
            return
        last, num_steps = begun.step + 1, clock.num_steps
        while num_steps is not None and last < num_steps and not context.is_full(last):
            last += 1
        steps, like = range(begun.step + 1, last), form.like()
        context.prefetch.fetch(
            self.adapter, steps, clock.timesteps, form.block_kwargs, begun.model_kwargs, like
        )

    def end(self) -> None:
        if self._outputs is not None:
            self._outputs.unbind()
        self._slots, self._between, self._block_kwargs, self.base = (), (), {}, None
        self._model_kwargs = {}

    def forget(self) -> None:
        """Check its sum anew, and record after hooks that others put there."""
        self._verified.clear()
        if self._outputs is not None:
            self._outputs.remove()
        self._outputs = None
