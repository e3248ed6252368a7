"""What is cached of a call: the residual of the whole stack, or every module's output before its gate.

Both make a skipped step one sum over a history (docs/algorithm.md, "A skipped step is one sum"). They differ
in what a full step records and in the gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hicache.ahead import foreseeable
from hicache.engine import Engine
from hicache.models.call import Call
from hicache.models.features import ModuleAdapter
from hicache.models.recording import Taps


class Unfit(Exception):
    """What a full step recorded cannot stand for the blocks; the message says why."""


@dataclass
class Kind:
    """What calls of one context have in common, learned from the first."""

    shape: torch.Size  # of the hidden state that enters the first block
    dtype: torch.dtype
    device: torch.device
    terms: int = 0  # features, module by module; 0 where nobody knows the modules
    refusal: str | None = None  # why they cannot be cached module by module
    arguments: dict[str, Any] = field(default_factory=dict)  # of the first block, no hidden states
    unseen: tuple[int, ...] = ()  # terms without a feature

    def like(self) -> Tensor:
        """Something ``[batch, 1, channels]`` of the hidden state's dtype and device, without memory."""
        nothing = torch.empty((), dtype=self.dtype, device=self.device)
        return nothing.expand(self.shape[0], 1, self.shape[-1])


class Stack:
    """One feature with a gate of one: what all blocks together add to the hidden state."""

    name = "stack"

    def open(self, engine: Engine, kind: Kind, call: Call) -> None:
        """A full step begins: say where to record."""
        [slot] = engine.open([kind.shape], kind.dtype, kind.device)
        # A copy of what enters: blocks may work in place. The inbox has room for it unless it would round.
        exact = torch.promote_types(slot.dtype, kind.dtype) == slot.dtype
        call.targets, call.slot = [slot], slot
        call.base = slot if exact else torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)

    def close(self, kind: Kind, call: Call) -> None:
        """The step has ended: what it recorded is in the inbox."""


class Module:
    """The paper's: a family's features, each with the gate of the current timestep.

    Args:
        adapter: the family's.
        call: the model's current call.
    """

    name = "module"

    def __init__(self, adapter: ModuleAdapter, call: Call) -> None:
        self.adapter = adapter
        self._call = call
        self._taps: Taps | None = None
        self._slots: Sequence[Tensor] = ()
        # Of a call learned from: what to check the sum against.
        self._base: Tensor | None = None
        self._arguments: Mapping[str, Any] = {}
        self._between: Sequence[Tensor] = ()
        self._named: Mapping[str, Any] = {}
        self._verified: set[int] = set()
        self.foreseeable = True  # whether gates of coming steps can be computed before them

    def watch(self) -> None:
        """Record the outputs of the family's modules; LoRA may have put others in their places since."""
        features = list(self.adapter.features())
        modules: list[nn.Module] = [feature.module for feature in features]
        if self._taps is not None:
            held = self._taps.modules
            if len(held) == len(modules) and all(a is b for a, b in zip(held, modules, strict=True)):
                return
            self._taps.remove()
        self._taps = Taps(self._call, features)

    def forget(self) -> None:
        """The model may have changed: check its sum anew, and record after hooks that others put there."""
        self._verified.clear()
        if self._taps is not None:
            self._taps.remove()
        self._taps = None

    def unwatch(self) -> None:
        """Leave the modules as they were."""
        self.forget()
        self.end()

    def open(self, engine: Engine, kind: Kind, call: Call) -> None:
        """As :meth:`Stack.open`."""
        self.watch()
        assert self._taps is not None
        self._slots = engine.open([kind.shape] * kind.terms, kind.dtype, kind.device)
        self._taps.open(self._slots)
        call.targets = self._slots

    def prove(
        self,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        between: Sequence[Tensor],
        named: Mapping[str, Any],
    ) -> None:
        """A call that is learned from: keep what :meth:`verify` needs."""
        if len(self._slots) not in self._verified:
            self._base, self._arguments, self._between = hidden.clone(), dict(arguments), list(between)
            self._named = named

    @property
    def base(self) -> Tensor | None:
        """The hidden state that entered the first block, in a call that is to be verified."""
        return self._base

    def gates(self, arguments: Mapping[str, Any], base: Tensor) -> Tensor:
        """The gates of this step, ``[terms, batch, channels]``."""
        gates = self.adapter.gates(arguments, base)
        # One timestep may serve several pictures, and autocast may leave embeddings wider than hidden states:
        # blocks broadcast and promote. Mostly this changes nothing.
        return gates.expand(-1, len(base), -1).to(base.device, base.dtype).contiguous()

    def verify(self, hidden: Tensor, kind: Kind) -> None:
        """The same call: ``hidden`` leaves the last block. Takes in which terms have no feature.

        Checks that base + Σ gate ⊙ feature is what the blocks made: once a kind of call, with a host sync.

        Raises:
            Unfit: it is not.
        """
        assert self._taps is not None
        try:
            kind.unseen = self._taps.unseen(len(self._slots))
        except ValueError as error:
            raise Unfit(f"cannot be cached module by module: {error}") from error
        if self._base is None:
            return
        base = self._base
        self._taps.close(self._slots, kind.unseen)
        self._call.sums.clear()
        wide = torch.promote_types(base.dtype, torch.float32)
        gates = self.gates(self._arguments, base).clone()
        total = base.to(wide)
        for slot, gate in zip(self._slots, gates[:, :, None], strict=True):  # [batch, 1, channels] each
            total = total + slot.to(wide) * gate
        for residual in self._between:
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
        self.foreseeable = foreseeable(self.adapter, self._arguments, self._named, kind.like(), gates)

    def close(self, kind: Kind, call: Call) -> None:
        """As :meth:`Stack.close`."""
        assert self._taps is not None
        self._taps.close(self._slots, kind.unseen)

    def end(self) -> None:
        """The call has ended: let go of its tensors."""
        if self._taps is not None:
            self._taps.rest()
        self._slots, self._between, self._arguments, self._base = (), (), {}, None
        self._named = {}


Granularity = Stack | Module
