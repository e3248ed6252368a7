"""Gates of the skipped steps to come, computed together at the full step before them.

They depend on the timestep, the guidance and the pooled text only (docs/algorithm.md, "Gates are known in
advance"), and a pipeline makes its timesteps of its scheduler's in one of two ways. Which one, and where in
the scheduler's list the run begins, is read off the first full step. Whatever does not fit (a loop of one's
own, another prompt half-way) has its gates computed at each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from hicache import compat
from hicache.adapters.base import ModuleAdapter
from hicache.runtime.gate_weights import GateWeights

# what diffusers' pipelines give the scale of LoRA in
_LORA_ARGUMENTS: Final = ("joint_attention_kwargs", "attention_kwargs")


@dataclass(frozen=True)
class _Rule:
    """One way in which a run's timesteps may come out of its scheduler's."""

    timesteps: Tensor  # the model's, of the whole run
    origin: int  # index that step 0 has among them

    def fits(self, met: Sequence[tuple[int, Tensor]]) -> bool:
        """Whether a run that begins there has come through these (step, timestep); reads the device.

        Timesteps of low precision may be rounded to the same at neighbouring steps, so that the first fits
        several rules.
        """
        if not met:
            return True
        if self.origin + met[-1][0] >= len(self.timesteps):
            return False
        expected = torch.stack([self.timesteps[self.origin + step] for step, _ in met])
        return bool((expected == torch.stack([timestep for _, timestep in met])).all())


@dataclass(frozen=True)
class _Fetched:
    """Gates of some skipped steps."""

    first: int  # step of the first
    gates: Tensor  # [steps, num_features, batch, channels]
    timesteps: Tensor  # [steps], which they were computed for
    constants: list[Any]  # values of the other arguments they were computed for
    weights: GateWeights | None = None  # those they were computed with; None: they are not written yet


class GatePrefetch:
    """The gates of the skipped steps to come, of one context."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new run starts: its timesteps may be others."""
        self._rules: list[_Rule] = []  # those that fit the first full step
        self._met: list[tuple[int, Tensor]] = []  # later full steps and their timesteps
        self._searched = False
        self._wrong: Tensor | None = None  # whether a timestep was another than expected, left on the device
        self.forget()

    def forget(self) -> None:
        """What was computed no longer holds."""
        self._fetched: _Fetched | None = None

    def fetch(
        self,
        adapter: ModuleAdapter,
        steps: range,
        scheduler_timesteps: Any,
        block_kwargs: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        """Compute the gates of ``steps``, which follow the full step before the first of them.

        They count from :meth:`settle` on.

        Args:
            adapter: the family's.
            steps: ordinals of the coming skipped steps.
            scheduler_timesteps: the scheduler's, or None.
            block_kwargs: the first block's arguments at the full step.
            model_kwargs: the transformer's.
            like: anything ``[batch, ..., channels]`` of the hidden state's dtype and device.
        """
        self.forget()
        if not adapter.foretell or not self.timesteps_were_right():
            return
        timestep, step = model_kwargs.get("timestep"), steps.start - 1
        if not self._searched:
            self._rules = _find_rules(scheduler_timesteps, timestep, step)
            self._searched = True
        elif self._rules and isinstance(timestep, Tensor) and timestep.ndim <= 1:
            self._met.append((step, timestep.reshape(-1)[0].clone()))
        if not self._rules or not steps:
            return
        while self._rules and not self._rules[0].fits(self._met):
            del self._rules[0]
        if not self._rules:
            return
        rule = self._rules[0]
        coming = rule.timesteps[rule.origin + steps.start : rule.origin + steps.stop]
        batch, channels = len(like), like.shape[-1]
        if len(coming) != len(steps) or not _foretellable(adapter, model_kwargs, batch):
            return
        inputs = adapter.gate_inputs(
            block_kwargs, model_kwargs, coming.repeat_interleave(batch), len(steps), like
        )
        gates = adapter.gates(inputs, like[:1].expand(len(steps) * batch, *like.shape[1:]))
        gates = gates.view(-1, len(steps), batch, channels)
        self._fetched = _Fetched(
            steps.start, gates.transpose(0, 1), coming, _constants(adapter, model_kwargs, kept=True)
        )

    def settle(self, adapter: ModuleAdapter) -> None:
        """What :meth:`fetch` computed has been written, and is :meth:`own`, by the weights of now."""
        if self._fetched is not None and self._fetched.weights is None:
            self._fetched = replace(self._fetched, weights=GateWeights(adapter))

    def own(self, ones: int = 0) -> None:
        """Copy what :meth:`fetch` computed, and is written: the adapter uses its memory again.

        Args:
            ones: further features, whose gates are one.
        """
        if self._fetched is not None and self._fetched.weights is None:
            gates = self._fetched.gates
            copy = with_ones(gates, ones) if ones else gates.clone(memory_format=torch.contiguous_format)
            self._fetched = replace(self._fetched, gates=copy.contiguous())

    @property
    def knows_timesteps(self) -> bool:
        """Whether timesteps of coming steps are known."""
        return bool(self._rules)

    @property
    def fetched(self) -> bool:
        """Whether there are gates of coming steps."""
        return self._fetched is not None

    @property
    def rows(self) -> Tensor | None:
        """The gates of all coming steps there are, ``[steps, num_features, batch, channels]``."""
        return None if self._fetched is None else self._fetched.gates

    def gates(
        self, adapter: ModuleAdapter, step: int, model_kwargs: Mapping[str, Any], read: bool = False
    ) -> Tensor | None:
        """The gates of a skipped step, ``[num_features, batch, channels]``; None: they were not fetched.

        Args:
            adapter: the family's.
            step: of the run.
            model_kwargs: the transformer's.
            read: whether numbers may be read from the device, where arguments are made anew: FLUX's
                ControlNet pipelines make a tensor of their guidance in every step.
        """
        fetched = self._fetched
        timestep = model_kwargs.get("timestep")
        if fetched is None or fetched.weights is None or not 0 <= step - fetched.first < len(fetched.gates):
            return None
        constants = _constants(adapter, model_kwargs, kept=False)
        same = fetched.constants == constants or (read and all(map(_equal, fetched.constants, constants)))
        if not same or not fetched.weights.unchanged():
            self.forget()
            return None
        if not isinstance(timestep, Tensor) or timestep.ndim > 1:
            return None
        index = step - fetched.first
        # No host sync: a timestep other than expected comes to light at the next full step.
        off = (timestep != fetched.timesteps[index]).any()
        self._wrong = off if self._wrong is None else self._wrong.logical_or_(off)
        return fetched.gates[index]

    def timesteps_were_right(self) -> bool:
        """Whether all timesteps so far were as expected; reads the device."""
        if self._wrong is None:
            return True
        wrong, self._wrong = bool(self._wrong), None
        if wrong:
            warnings.warn(
                "hicache: the transformer was called with timesteps that are not the scheduler's: the gates "
                "of the last skipped steps were computed for others; from here on none are computed ahead",
                RuntimeWarning,
                stacklevel=2,
            )
            self._rules, self._searched = [], True
        return not wrong


def with_ones(gates: Tensor, ones: int) -> Tensor:
    """Gates ``[..., num_features, batch, channels]`` and those of ``ones`` further features: one."""
    return nn.functional.pad(gates, (0, 0, 0, 0, 0, ones), value=1.0) if ones else gates


def come_out_alike(told: Tensor, own: Tensor) -> bool:
    """Whether gates computed as those of coming steps are the step's own; reads the device."""
    allowed = max(1e-3, 4 * torch.finfo(own.dtype).eps)
    return bool((told - own).norm() <= allowed * own.norm())


def foretold(
    adapter: ModuleAdapter,
    block_kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    like: Tensor,
) -> Tensor | None:
    """The gates of this step, computed as those of coming steps are; None where that cannot be done.

    They are others than the step's own where a subclass of the model makes its embedding of more than the
    family's does.

    Args:
        adapter: the family's.
        block_kwargs: the first block's arguments.
        model_kwargs: the transformer's.
        like: ``[batch, ..., channels]`` of the hidden state's dtype and device.
    """
    batch = len(like)
    if not _foretellable(adapter, model_kwargs, batch):
        return None
    timesteps = model_kwargs["timestep"].reshape(-1).expand(batch)
    inputs = adapter.gate_inputs(block_kwargs, model_kwargs, timesteps, 1, like)
    return adapter.gates(inputs, like)


def lora_scale(model_kwargs: Mapping[str, Any]) -> float:
    """The scale a call gives to its LoRA layers."""
    given: Mapping[str, Any] = next(
        (model_kwargs[name] for name in _LORA_ARGUMENTS if model_kwargs.get(name)), {}
    )
    return float(given.get("scale", 1.0))


def _constants(adapter: ModuleAdapter, model_kwargs: Mapping[str, Any], kept: bool) -> list[Any]:
    """What gates depend on, but for the timestep and weights; with its numbers, if it is to be kept."""
    values = [_identity(model_kwargs.get(name), kept) for name in adapter.gate_arguments]
    return [lora_scale(model_kwargs), *values]


def _foretellable(adapter: ModuleAdapter, model_kwargs: Mapping[str, Any], batch: int) -> bool:
    """Whether gates depend on timesteps and on what else is there once a sample, but for one timestep."""
    timestep = model_kwargs.get("timestep")
    if not adapter.foretell or not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return False
    if timestep.numel() not in (1, batch):
        return False
    values = [model_kwargs.get(name) for name in adapter.gate_arguments]
    return all(len(value) == batch for value in values if isinstance(value, Tensor))


def _find_rules(scheduler_timesteps: Any, timestep: Any, step: int) -> list[_Rule]:
    """The ways in which the timestep of this step comes out of the scheduler's; reads the device."""
    if not isinstance(scheduler_timesteps, Tensor) or not isinstance(timestep, Tensor) or timestep.ndim > 1:
        return []
    given = timestep.reshape(-1)
    if not bool((given == given[0]).all()):
        return []
    cast = scheduler_timesteps.to(given.device).to(given.dtype)
    rules = [
        _Rule(timesteps, index - step)
        for timesteps in (cast, (cast / 1000).to(given.dtype))
        for index in (timesteps == given[0]).nonzero().flatten().tolist()
        if index >= step
    ]
    # as few left out before the first step as may be: a last timestep of 1 is also a first one of 1000 / 1000
    return sorted(rules, key=lambda rule: rule.origin)


def _identity(value: Any, kept: bool) -> Any:
    """The same for the same unchanged tensor. Held by the caller, so that no other takes its place."""
    return _Same(value, kept) if isinstance(value, Tensor) else value


def _equal(one: Any, later: Any) -> bool:
    """Whether two constants are the same, or tensors of the same numbers."""
    if isinstance(one, _Same) and isinstance(later, _Same):
        return one == later or one.equal(later)
    return bool(one == later)


class _Same:
    """A tensor, equal to itself while nobody writes to it."""

    def __init__(self, tensor: Tensor, kept: bool) -> None:
        self._tensor = tensor
        self._writes = compat.write_count(tensor)
        self._numbers = tensor.detach().clone() if kept else tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._tensor is self._tensor and other._writes == self._writes

    __hash__ = None  # type: ignore[assignment]

    def equal(self, later: _Same) -> bool:
        """Whether a later one has the numbers that this one began with; reads the device."""
        mine, given = self._numbers, later._tensor
        return mine.dtype == given.dtype and torch.equal(mine, given.to(mine.device))
