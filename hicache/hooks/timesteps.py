"""How the timesteps that a transformer is called with come out of its scheduler's.

A pipeline gives its model the scheduler's timestep or a thousandth of it, in a dtype of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hicache.numbers import uploaded

_NAMES: Final = ("timestep", "timesteps", "t", "vision_timesteps")  # what transformers call it


def _given(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)


def timestep_of(kwargs: Mapping[str, Any]) -> Any:
    """The timestep among a transformer's arguments by name, a number or a tensor; None if there is none.

    Per-token timesteps (Wan 2.2 TI2V) hold zeros for the tokens that are given: the largest is the step's.
    """
    timestep = _given(kwargs)
    return timestep.max() if isinstance(timestep, Tensor) else timestep


@dataclass(frozen=True)
class Rule:
    """One way in which a run's timesteps may come out of its scheduler's."""

    scheduled: Tensor  # the scheduler's, all of them
    thousandth: bool  # whether the model is given a thousandth of each
    origin: int  # index that step 0 has among them

    def timesteps(self, like: Tensor) -> Tensor:
        """``[steps]``, the run's from step 0 on, of the dtype and on the device of what the model is given.

        Computed there as a pipeline does: another device may round another way. Does not wait for it.
        """
        cast = _moved(self.scheduled, like.device).to(like.dtype)
        return (_thousandth(cast, like.dtype) if self.thousandth else cast)[self.origin :]


@dataclass(frozen=True)
class RunStart:
    """Where in its scheduler's timesteps a run begins."""

    index: int = 0
    rules: tuple[Rule, ...] = ()  # that fit its first call, the likeliest first


def run_start(scheduled: Any, kwargs: Mapping[str, Any], step: int, begin_index: int | None) -> RunStart:
    """What the first call of a run tells of it. Reads the device, once.

    Args:
        scheduled: the scheduler's timesteps.
        kwargs: the transformer's arguments by name.
        step: of the run.
        begin_index: the scheduler's, where it has one.
    """
    given, timestep = _given(kwargs), timestep_of(kwargs)
    same = _same(scheduled, timestep)
    if same is None:
        return RunStart()
    alike = (given == timestep).all()  # in all samples
    *forms, alike = torch.cat([same, alike.expand(1, same.shape[1])]).cpu()
    places = [form.nonzero().flatten().tolist() for form in forms]
    rules = [
        Rule(scheduled, thousandth, index - step)
        for thousandth, found in zip((False, True), places, strict=False)
        for index in found
        if index >= step
    ]
    # as few left out before the first step as may be: a last timestep of 1 is also a first one of 1000 / 1000
    rules.sort(key=lambda rule: (rule.origin != (begin_index or rule.origin), rule.origin))
    index = min((index for found in places for index in found), default=0)
    return RunStart(index, tuple(rules) if bool(alike.all()) else ())


def index_of(scheduled: Any, kwargs: Mapping[str, Any]) -> int | None:
    """Where a call's timestep is among its scheduler's; None if that is not to be seen. Reads the device."""
    same = _same(scheduled, timestep_of(kwargs))
    found = [] if same is None else same.any(0).nonzero().flatten().tolist()
    return found[0] if found else None


def _same(scheduled: Any, timestep: Any) -> Tensor | None:
    """``[forms, steps]``, which of the scheduler's a timestep is, in every form that it may be given in."""
    if not isinstance(scheduled, Tensor) or not isinstance(timestep, Tensor):
        return None
    known, dtype = _moved(scheduled, timestep.device), timestep.dtype
    cast = known.to(dtype)
    forms = cast, _thousandth(cast, dtype), _thousandth(known, dtype)
    return torch.stack([form == timestep for form in forms])


def _thousandth(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    return (timesteps / 1000).to(dtype)


def _moved(timesteps: Tensor, device: torch.device) -> Tensor:
    return uploaded(timesteps, device) if timesteps.device.type == "cpu" else timesteps.to(device)
