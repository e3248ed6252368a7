"""How the features of a full step get into a history: taps on the modules that compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hicache.models.call import TAP, Call, Mode
from hicache.models.features import Feature


class _Part:
    """One term that a module's output is recorded for."""

    def __init__(self, feature: Feature, term: int, factor: Callable[[], Tensor] | None, sole: bool) -> None:
        self.feature = feature
        self.term = term
        self.factor = factor
        self.sole = sole  # it alone makes up the term: copied into the slot, not summed
        self.slot: Tensor | None = None  # None: the call has no such term
        self.seen = False  # whether the call learned from had it


class _Tap:
    """A forward hook: records the features of one module."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.parts: list[_Part] = []
        self.shape: torch.Size | None = None  # of the hidden state, in the call learned from
        self.problem: str | None = None  # why what the module gave in the call learned from is no feature

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self.call.mode
        if mode == Mode.FULL:
            for part in self.parts:
                if part.slot is not None:
                    self._write(part, part.slot, output)
        elif mode == Mode.LEARN and self.problem is None:
            try:
                for part in self.parts:
                    if part.slot is not None:
                        part.seen = self._write(part, part.slot, output) or part.seen
                    elif self.shape is not None and part.feature.read(output, self.shape) is not None:
                        self.problem = f"{type(module).__name__} gives part of a term this call does not have"
            except ValueError as error:
                self.problem = str(error)

    def _write(self, part: _Part, slot: Tensor, output: Any) -> bool:
        value = part.feature.read(output, slot.shape)
        if value is None:
            return False
        value = value.detach()
        if part.sole:
            slot.copy_(value)
            return True
        wide = torch.promote_types(value.dtype, torch.float32)
        if part.factor is not None:
            value = value * part.factor().to(value.device, wide)
        sums = self.call.sums
        if part.term in sums:
            sums[part.term] += value
        else:
            sums[part.term] = value.to(wide, copy=part.factor is None)
        return True


class Taps:
    """The taps of a whole model.

    A term that one feature makes up is copied into its slot. One that several add up to is summed in fp32
    (float64 for float64) beside it, and rounded once.

    Args:
        call: the model's current call.
        features: all features of the model.
    """

    def __init__(self, call: Call, features: Sequence[Feature]) -> None:
        self._call = call
        self.modules = [feature.module for feature in features]
        counts = Counter(term for feature in features for term, _ in feature.terms)
        taps: dict[nn.Module, _Tap] = {}
        self._parts: list[_Part] = []
        for feature in features:
            tap = taps.setdefault(feature.module, _Tap(call))
            for term, factor in feature.terms:
                part = _Part(feature, term, factor, sole=counts[term] == 1 and factor is None)
                tap.parts.append(part)
                self._parts.append(part)
        self._taps = taps
        self._opened = False
        for module, tap in taps.items():
            module._forward_hooks[TAP] = tap

    def remove(self) -> None:
        """Take the taps off."""
        for module in self._taps:
            module._forward_hooks.pop(TAP, None)

    def open(self, slots: Sequence[Tensor]) -> None:
        """The features of the call that begins go into these slots, one a term."""
        for part in self._parts:
            part.slot = slots[part.term] if part.term < len(slots) else None
        for tap in self._taps.values():
            tap.shape = slots[0].shape
        self._opened = True

    def unseen(self, terms: int) -> tuple[int, ...]:
        """Terms that the call learned from had no feature for: skip-layer guidance leaves blocks out.

        Raises:
            ValueError: a module gave something that is no feature.
        """
        problems = [tap.problem for tap in self._taps.values() if tap.problem is not None]
        seen = {part.term for part in self._parts if part.seen}
        for tap in self._taps.values():
            tap.problem = None
        for part in self._parts:
            part.seen = False
        if problems:
            raise ValueError(problems[0])
        return tuple(term for term in range(terms) if term not in seen)

    def close(self, slots: Sequence[Tensor], unseen: Sequence[int]) -> None:
        """The call has ended: round the sums into their slots."""
        for term, total in self._call.sums.items():
            slots[term].copy_(total)
        for term in unseen:
            slots[term].zero_()

    def rest(self) -> None:
        """Record nothing until the next :meth:`open`."""
        if not self._opened:
            return
        self._opened = False
        for part in self._parts:
            part.slot = None
        for tap in self._taps.values():
            tap.shape = tap.problem = None
