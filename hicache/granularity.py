"""What is cached of a call: the residual of the whole stack, or every module's output before its gate.

Both make a skipped step one sum over a history (docs/algorithm.md, "A skipped step is one sum"). They differ
in what a full step records and in the gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hicache.ahead import Ahead
from hicache.engine import Engine
from hicache.models.features import Feature, ModuleAdapter, Recording


class Unfit(Exception):
    """What a full step recorded cannot stand for the blocks; the message says why."""


class Stack:
    """One feature with a gate of one: what all blocks together add to the hidden state."""

    name = "stack"

    def __init__(self) -> None:
        self._base: Tensor | None = None
        self._slot: Tensor | None = None

    def open(self, engine: Engine, hidden: Tensor, call: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        """A full step: ``hidden`` enters the first block."""
        [slot] = engine.open([hidden.shape], hidden.dtype, hidden.device)
        # A copy: blocks may work in place. The inbox has room for it unless it would round.
        exact = torch.promote_types(slot.dtype, hidden.dtype) == slot.dtype
        self._base = slot.copy_(hidden) if exact else hidden.detach().clone()
        self._slot = slot

    def close(self, hidden: Tensor) -> None:
        """The same step: ``hidden`` leaves the last block. The features are in the inbox now.

        Raises:
            Unfit: they cannot stand for the blocks.
        """
        base, slot = self._base, self._slot
        self.end()
        assert base is not None
        assert slot is not None
        if hidden.shape != base.shape:
            raise Unfit(
                f"gives its head a hidden state {tuple(hidden.shape)} that is not of the shape of its first "
                f"block's, {tuple(base.shape)}"
            )
        torch.sub(hidden.to(slot.device), base, out=slot)

    @property
    def opened(self) -> bool:
        """Whether a full step is being recorded."""
        return self._slot is not None

    def forecast(self, engine: Engine, step: int, base: Tensor) -> Tensor:
        """A skipped step: the hidden state that would leave the last block."""
        return engine.gated_sum(step, base)

    def end(self) -> None:
        """The call has ended: let go of its tensors."""
        self._base = self._slot = None


class Module:
    """The paper's: a family's features, each with the gate of the current timestep.

    Args:
        adapter: the family's.
    """

    name = "module"

    def __init__(self, adapter: ModuleAdapter) -> None:
        self.adapter = adapter
        self._features: list[Feature] = []
        self._recording: Recording | None = None
        # Of a run's first full step of every kind of call: what to check the sum against.
        self._base: Tensor | None = None
        self._call: dict[str, Any] = {}
        self._named: Mapping[str, Any] = {}
        self._slots: list[Tensor] = []
        self._verified: set[int] = set()
        self._spoiled: str | None = None  # why this step's features are not what they should be

    def restart(self) -> None:
        """A new run starts: processors and blocks may have been put in place since the last."""
        self._verified.clear()

    def open(self, engine: Engine, hidden: Tensor, call: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        """As :meth:`Stack.open`."""
        self.end()
        terms = self.adapter.terms(call)
        self._slots = engine.open([hidden.shape] * terms, hidden.dtype, hidden.device)
        self._features = list(self.adapter.features())
        self._recording = Recording(self._slots, self._features)
        # nothing that holds on to the hidden states themselves
        self._call = {name: value for name, value in call.items() if not name.endswith("hidden_states")}
        self._named = named
        if terms not in self._verified:
            self._base = hidden.clone()

    def add(self, index: int, output: Any) -> None:
        """The module of a feature has run."""
        if self._recording is None or self._spoiled:
            return
        try:
            self._recording.add(self._features[index], output)
        except ValueError as error:
            self._spoiled = str(error)

    def close(self, hidden: Tensor) -> None:
        """As :meth:`Stack.close`."""
        assert self._recording is not None
        if self._spoiled:
            raise Unfit(f"cannot be cached module by module: {self._spoiled}")
        self._recording.finish()
        self._recording = None
        if self._base is not None:
            self._verify(hidden, self._base)

    @property
    def base(self) -> Tensor | None:
        """The hidden state that entered the first block, at a full step that is to be verified."""
        return self._base

    def look_ahead(self, ahead: Ahead, steps: range, scheduler_timesteps: Any, hidden: Tensor) -> None:
        """After :meth:`close`: compute the gates of the skipped steps to come."""
        like = hidden.new_empty(()).expand(len(hidden), 1, hidden.shape[-1])
        like = like.to(self._slots[0].device)
        ahead.look(self.adapter, steps, scheduler_timesteps, self._call, self._named, like)

    @property
    def opened(self) -> bool:
        """Whether a full step is being recorded."""
        return self._recording is not None

    def forecast(
        self,
        engine: Engine,
        step: int,
        base: Tensor,
        call: Mapping[str, Any],
        named: Mapping[str, Any],
        foreseen: Tensor | None,
    ) -> Tensor:
        """As :meth:`Stack.forecast`, with the gates of this step where they were foreseen."""
        gates = self.adapter.gates(call, base) if foreseen is None else foreseen
        # One timestep may serve several pictures, and autocast may leave embeddings wider than hidden states:
        # blocks broadcast and promote. Mostly this changes nothing.
        gates = gates.expand(-1, len(base), -1).to(base.device, base.dtype).contiguous()
        for residual in self.adapter.between(named):
            base = base + residual
        return engine.gated_sum(step, base, gates)

    def end(self) -> None:
        """As :meth:`Stack.end`."""
        self._recording = self._base = None
        self._call, self._named, self._slots, self._spoiled = {}, {}, [], None

    def _verify(self, hidden: Tensor, base: Tensor) -> None:
        """That base + Σ gate ⊙ feature is what the blocks made: once a run and kind of call; a host sync."""
        wide = torch.promote_types(base.dtype, torch.float32)
        gates = self.adapter.gates(self._call, base)[:, :, None]  # [terms, batch, 1, channels]
        total = base.to(wide)
        for slot, gate in zip(self._slots, gates, strict=True):
            total = total + slot.to(wide) * gate
        for residual in self.adapter.between(self._named):
            total = total + residual
        # a narrow model rounds after every block, this sum once; a narrow history rounds features
        dtypes = base.dtype, self._slots[0].dtype
        narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
        allowed = 0.1 if narrow.itemsize < 4 else 1e-3
        off, moved = (total - hidden).norm().item(), (hidden.to(wide) - base).norm().item()
        rounding = 8 * torch.finfo(narrow).eps * total.norm().item()
        if not (math.isfinite(moved) and off <= allowed * moved + rounding):
            raise Unfit(
                f"does not add gate · feature of its modules alone (off by {off:.3g} of {moved:.3g}): is one "
                "of its blocks or attention processors not its own?"
            )
        self._verified.add(len(self._slots))


Granularity = Stack | Module
