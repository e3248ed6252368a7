"""Gates of the skipped steps to come, computed together at the full step before them.

They depend on the timestep, the guidance and the pooled text only (docs/algorithm.md, "Gates are known in
advance"), and a pipeline makes its timesteps of its scheduler's in one of two ways. Which one, and where in
the scheduler's list the run begins, is read off the first full step. Whatever does not fit (a loop of one's
own, another prompt half-way) has its gates computed at each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hicache.models.features import ModuleAdapter


class Ahead:
    """The coming gates of one context."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new run starts: its timesteps may be others."""
        # the model's timesteps of the run, index of step 0: those that fit the first full step
        self._rules: list[tuple[Tensor, int]] = []
        self._met: list[tuple[int, Tensor]] = []  # later full steps and their timesteps
        self._searched = False
        self._wrong: Tensor | None = None  # whether a timestep was not the one foreseen, left on the device
        self.forget()

    def forget(self) -> None:
        """What was computed no longer holds."""
        self._first = 0
        self._gates: Tensor | None = None  # [steps, terms, batch, channels]
        self._foreseen: Tensor | None = None  # [steps]: the timesteps they are of
        self._constants: list[Any] = []

    def look(
        self,
        adapter: ModuleAdapter,
        steps: range,
        scheduler_timesteps: Any,
        call: Mapping[str, Any],
        named: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        """Compute the gates of ``steps``, which follow the full step before the first of them.

        Args:
            adapter: the family's.
            steps: ordinals of the coming skipped steps.
            scheduler_timesteps: the scheduler's, or None.
            call: the first block's arguments at the full step.
            named: the model's.
            like: anything ``[batch, ..., channels]`` of the hidden state's dtype and device.
        """
        self.forget()
        if not adapter.constants or not self._check():
            return
        timestep, step = named.get("timestep"), steps.start - 1
        if not self._searched:
            self._rules = _find_rules(scheduler_timesteps, timestep, step)
            self._searched = True
        elif self._rules and isinstance(timestep, Tensor) and timestep.ndim <= 1:
            self._met.append((step, timestep.reshape(-1)[0].clone()))
        if not self._rules or not steps:
            return
        while self._rules and not _fits(*self._rules[0], self._met):
            del self._rules[0]
        if not self._rules:
            return
        timesteps, origin = self._rules[0]
        coming = timesteps[origin + steps.start : origin + steps.stop]
        batch, channels = len(like), like.shape[-1]
        values = [named.get(name) for name in adapter.constants]
        if len(coming) != len(steps) or not _fit(adapter, named, batch):
            return
        made = adapter.coming(call, named, coming.repeat_interleave(batch), len(steps), like)
        gates = adapter.gates(made, like[:1].expand(len(steps) * batch, *like.shape[1:]))
        gates = gates.view(-1, len(steps), batch, channels)
        # a copy in any case: the adapter uses its memory again
        self._gates = gates.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self._foreseen = coming
        self._first = steps.start
        self._constants = [_identity(value) for value in values]

    def gates(self, adapter: ModuleAdapter, step: int, named: Mapping[str, Any]) -> Tensor | None:
        """The gates of a skipped step, ``[terms, batch, channels]``; None when they were not foreseen."""
        index = step - self._first
        timestep = named.get("timestep")
        if self._gates is None or self._foreseen is None or not 0 <= index < len(self._gates):
            return None
        if self._constants != [_identity(named.get(name)) for name in adapter.constants]:
            self.forget()
            return None
        if not isinstance(timestep, Tensor) or timestep.ndim > 1:
            return None
        # No host sync: a timestep not foreseen comes to light at the next full step.
        off = (timestep != self._foreseen[index]).any()
        self._wrong = off if self._wrong is None else self._wrong.logical_or_(off)
        return self._gates[index]

    def _check(self) -> bool:
        """Whether all timesteps so far were as foreseen; reads the device."""
        if self._wrong is None:
            return True
        wrong, self._wrong = bool(self._wrong), None
        if wrong:
            warnings.warn(
                "hicache: the transformer was called with timesteps that are not the scheduler's: the gates "
                "of the last skipped steps were computed for others; from here on each step computes its own",
                RuntimeWarning,
                stacklevel=2,
            )
            self._rules, self._searched = [], True
        return not wrong


def foreseeable(
    adapter: ModuleAdapter, call: Mapping[str, Any], named: Mapping[str, Any], like: Tensor, gates: Tensor
) -> bool:
    """Whether the gates of this step, computed as those of coming steps are, are its gates; reads the device.

    Not so where a subclass of the model makes its embedding of more than the family's does.

    Args:
        adapter: the family's.
        call: the first block's arguments.
        named: the model's.
        like: ``[batch, ..., channels]`` of the hidden state's dtype and device.
        gates: of this step, ``[terms, batch, channels]``; not the adapter's own memory.
    """
    timestep, batch = named.get("timestep"), len(like)
    if not adapter.constants or not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return False
    if not _fit(adapter, named, batch) or timestep.numel() not in (1, batch):
        return False
    made = adapter.coming(call, named, timestep.reshape(-1).expand(batch), 1, like)
    off = (adapter.gates(made, like) - gates).norm()
    return bool(off <= max(1e-3, 4 * torch.finfo(like.dtype).eps) * gates.norm())


def _fit(adapter: ModuleAdapter, named: Mapping[str, Any], batch: int) -> bool:
    """Whether what gates depend on, but for the timestep, is there once a sample."""
    values = [named.get(name) for name in adapter.constants]
    return all(len(value) == batch for value in values if isinstance(value, Tensor))


def _find_rules(scheduler_timesteps: Any, timestep: Any, step: int) -> list[tuple[Tensor, int]]:
    """The model's timesteps of the whole run, and the index that step 0 has among them; reads the device."""
    if not isinstance(scheduler_timesteps, Tensor) or not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return []
    given = timestep.reshape(-1)
    if not bool((given == given[0]).all()):
        return []
    cast = scheduler_timesteps.to(given.device).to(given.dtype)
    rules = [
        (timesteps, index - step)
        for timesteps in (cast, (cast / 1000).to(given.dtype))
        for index in (timesteps == given[0]).nonzero().flatten().tolist()
        if index >= step
    ]
    # as few left out before the first step as may be: a last timestep of 1 is also a first one of 1000 / 1000
    return sorted(rules, key=lambda rule: rule[1])


def _fits(timesteps: Tensor, origin: int, met: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether a run that begins there has come through these timesteps; reads the device.

    Narrow timesteps of neighbouring steps may be rounded to the same, so that the first fits several.
    """
    if not met:
        return True
    if origin + met[-1][0] >= len(timesteps):
        return False
    expected = torch.stack([timesteps[origin + step] for step, _ in met])
    return bool((expected == torch.stack([timestep for _, timestep in met])).all())


def _identity(value: Any) -> Any:
    """The same for the same unchanged tensor. Held by the caller, so that no other takes its place."""
    if not isinstance(value, Tensor):
        return value
    return _Same(value)


class _Same:
    """A tensor, equal to itself while nobody writes to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._tensor is self._tensor and other._version == self._version

    __hash__ = None  # type: ignore[assignment]
