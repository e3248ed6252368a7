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

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.adapters.gates import deferred
from hicache.engine import Engine, Sum
from hicache.hooks.module_outputs import ModuleOutputs
from hicache.runtime.context import BegunCall, CallForm
from hicache.runtime.gate_prefetch import foretold, lora_scale
from hicache.runtime.late_gates import LateGates
from hicache.runtime.session import StepClock
from hicache.step_plan import FullStep, RunningCall, SkippedStep


class Unfit(Exception):
    """What a full step recorded cannot stand for the blocks; the message says why."""


class NotFinite(Exception):
    """A full step made numbers that nothing can be told from."""


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
        # gates of this step, and the same as those of coming steps are computed; None: not computed yet
        self._gates: tuple[Tensor, Tensor | None] | None = None
        self.late: LateGates | None = None  # of a model whose weights are at hand in its blocks only

    def start_run(self) -> None:
        """A run starts: its weights may be offloaded now, or no longer."""
        offloaded = compat.is_offloaded_by_blocks(self.adapter.module)
        if offloaded != (self.late is not None):
            self.late = LateGates() if offloaded else None

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
        return SkippedStep(
            total, self._prefetched(begun), True, tuple(self.adapter.between(begun.model_kwargs))
        )

    def _prefetched(self, begun: BegunCall) -> Tensor | None:
        by_value = self.late is not None and self.late.needed
        return begun.context.prefetch.gates(self.adapter, begun.step, begun.model_kwargs, by_value)

    def can_skip(self, begun: BegunCall) -> bool:
        return self.late is None or not self.late.needed or self._prefetched(begun) is not None

    def gates(self, block_kwargs: Mapping[str, Any], base: Tensor) -> Tensor:
        """The gates of this step, ``[num_features, batch, channels]``."""
        return _as_blocks_do(self.adapter.gates(block_kwargs, base), base)

    def learn(self, hidden: Tensor, block_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> None:
        between = list(self.adapter.between(model_kwargs))
        if len(self._slots) not in self._verified:
            self.base, self._block_kwargs, self._between = hidden.clone(), dict(block_kwargs), between
            self._model_kwargs = model_kwargs
            if self.late is not None:
                with deferred(self.adapter) as later:
                    self._gates = self._both_gates(hidden)
                self.late.add(later)

    def _both_gates(self, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gates of a call that is learned from, and the same computed as those of coming steps are."""
        own = self.adapter.gates(self._block_kwargs, base)
        if self.late is None:
            own = own.clone()  # the adapter uses its memory again
        like = base[:, :1]
        return own, foretold(self.adapter, self._block_kwargs, self._model_kwargs, like)

    def verify(self, hidden: Tensor, form: CallForm) -> None:
        """Checks that base + Σ gate ⊙ feature is what the blocks made: once a form of call, with a host sync.

        Also takes in which features have no output.

        Raises:
            Unfit: it is not.
            NotFinite: what the blocks made is NaN or infinite: it may still be.
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
        own, again = self._gates or self._both_gates(base)
        gates = _as_blocks_do(own, base)
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
        if not math.isfinite(moved):
            raise NotFinite
        if not off <= allowed * moved + rounding:
            raise Unfit(
                f"does not add gate · feature of its modules alone (off by {off:.3g} of {moved:.3g}): is one "
                "of its blocks or attention processors not its own?"
            )
        if again is None and self.adapter.gate_arguments:  # in this form: those of others are not known yet
            return
        self._verified.add(len(self._slots))
        allowed = max(1e-3, 4 * torch.finfo(base.dtype).eps)
        self._can_prefetch = again is not None and bool((again - gates).norm() <= allowed * gates.norm())

    def finish(self, form: CallForm) -> None:
        assert self._outputs is not None
        self._outputs.finish(self._slots, form.missing)

    def foresee(self, begun: BegunCall, clock: StepClock) -> None:
        if self.late is not None:
            with deferred(self.adapter) as later:
                self._fetch(begun, clock)
            self.late.add(later)

    def prefetch(self, begun: BegunCall, clock: StepClock) -> str | None:
        prefetch, late, form = begun.context.prefetch, self.late, begun.context.form
        if late is None:
            # after the forward, when diffusers has taken the call's scale from its LoRA layers again
            with compat.lora_scaled(self.adapter.module, lora_scale(begun.kwargs)):
                self._fetch(begun, clock)
        assert form is not None
        if late is not None and late.needed:
            done = late.complete or bool(form.missing)  # blocks that are left out write no gates
            coming = not begun.context.is_full(begun.step + 1) and begun.step + 1 != clock.num_steps
            if not (
                self._can_prefetch and prefetch.knows_timesteps and done and (prefetch.fetched or not coming)
            ):
                return (
                    "its weights are offloaded in groups of blocks, and gates of the steps to come cannot be "
                    "prefetched: they need a scheduler whose timesteps the model is called with"
                )
        prefetch.settle(self.adapter)
        return None

    def _fetch(self, begun: BegunCall, clock: StepClock) -> None:
        context, form = begun.context, begun.context.form
        if not self._can_prefetch or form is None:
            return
        first, num_steps = begun.step + 1, clock.num_steps
        steps = range(first, first if num_steps is None else context.next_full(begun.step, num_steps))
        like = form.like()
        context.prefetch.fetch(
            self.adapter, steps, clock.timesteps, form.block_kwargs, begun.model_kwargs, like
        )

    def end(self) -> None:
        if self._outputs is not None:
            self._outputs.unbind()
        self._slots, self._between, self._block_kwargs, self.base = (), (), {}, None
        self._model_kwargs, self._gates = {}, None
        if self.late is not None:
            self.late.drop()

    def forget(self) -> None:
        """Check its sum anew, and record after hooks that others put there."""
        self._verified.clear()
        if self._outputs is not None:
            self._outputs.remove()
        self._outputs = None


def _as_blocks_do(gates: Tensor, base: Tensor) -> Tensor:
    """Gates broadcast and cast to a hidden state, contiguous; mostly this changes nothing.

    One timestep may serve several pictures, and autocast may leave embeddings of higher precision.
    """
    return gates.expand(-1, len(base), -1).to(base.device, base.dtype).contiguous()
