"""One call of a transformer in every step: what tells it from the others, its histories, its schedule."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hicache.config import HiCacheConfig
from hicache.reference.blocks import Part
from hicache.reference.history import Feature, History
from hicache.reference.rows import Key, Rows
from hicache.run import Position
from hicache.schedule import is_full
from hicache.stats import ContextStats

if TYPE_CHECKING:  # nobody who does not use them imports them
    from hicache.reference.clusters import Clusters


def form(named: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call looks like: calls of another form have other histories.

    Args:
        named: the arguments by name.

    Returns:
        Shape, dtype and device of every tensor, also of those in lists and dictionaries; whole numbers in
        lists (which layers to skip); and the dtype that autocast, if it is on, casts to.
    """
    devices = sorted({tensor.device.type for tensor in tensors(named)})
    casts = tuple(
        torch.get_autocast_dtype(device)
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    return _form(named), casts


def _form(value: Any, in_list: bool = False) -> Any:
    """Hashable; None for what has no form."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, Mapping):
        forms = tuple((name, _form(part)) for name, part in value.items())
        return tuple(pair for pair in forms if pair[1] is not None) or None
    if isinstance(value, (list, tuple)):
        elements = tuple(_form(part, in_list=True) for part in value)
        return elements if any(element is not None for element in elements) else None
    return ("number", value) if in_list and isinstance(value, int) else None


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, however nested."""
    if isinstance(value, Tensor):
        return [value]
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for part in parts for tensor in tensors(part)]


def wants_gradients(named: Mapping[str, Any]) -> bool:
    """Whether a tensor among the arguments of a call requires grad."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in named.values())


class Context:
    """One call of a transformer in every step: the histories of its features, its own count of steps.

    Args:
        config: the cache's settings.
        label: how :class:`~hicache.stats.Stats` names it.
        first_step: the step it starts at; its schedule counts from there.
        num_steps: steps from there to the end of the run, if known.
        sigmas: noise levels of those steps, if known.
    """

    def __init__(
        self,
        config: HiCacheConfig,
        label: str,
        first_step: int,
        num_steps: int | None,
        sigmas: tuple[float, ...] | None = None,
    ) -> None:
        self.config = config
        self.sigmas = sigmas
        self.label = label
        self.first_step = first_step
        self.num_steps = num_steps
        self.last_full: int | None = None
        self.full_steps = 0
        self.recorded = 0  # full steps since the histories began
        self.skipped_steps = 0
        self.features: dict[Key, Feature] = {}
        self.scale: Any = None  # of the ControlNet, if there is one
        self.rows = Rows(config.weighed_by)
        self.clusters: Clusters | None = None  # of its tokens, with clusters=
        self.pairs: set[str] = set()  # paths of idle submodules that give a pair of streams

    def release(self) -> None:
        self.features.clear()
        self.rows = Rows(self.config.weighed_by)
        self.last_full = None
        self.recorded = 0

    @property
    def stats(self) -> ContextStats:
        held = sum(feature.nbytes for feature in self.features.values())
        return ContextStats(self.full_steps, self.skipped_steps, held)

    def follow(self, scale: Any, step: int, num_steps: int | None) -> None:
        """The ControlNet has another scale from this step of the run on: all begins anew with it."""
        if scale != self.scale and self.last_full is not None:
            self.release()
            if self.clusters is not None:
                self.clusters = self.clusters.anew()
            self.first_step = step
            self.num_steps = None if num_steps is None else num_steps - step
            if self.sigmas is not None and self.num_steps is not None:
                self.sigmas = self.sigmas[len(self.sigmas) - self.num_steps :]
        self.scale = scale

    def is_full(self, step: int) -> bool:
        return is_full(self.config, step, self.last_full, self.num_steps)

    def record(
        self, step: int, outputs: dict[Key, Any], parts: Mapping[str, Part] = MappingProxyType({})
    ) -> None:
        """Take in what the submodules gave at a full step.

        Args:
            step: of the context.
            outputs: of every call of a submodule.
            parts: the submodules, by path; those of the table of :mod:`hicache.reference.blocks`.
        """
        if parts and outputs:
            self.rows.begin_full(parts, [*outputs], self.features, tensors(outputs)[0].device)
        # a submodule that did not run this time starts anew when it does: its history would have a hole
        self.features = {key: self.features.get(key) or Feature(self.config) for key in outputs}
        for key, output in outputs.items():
            self.features[key].record(step, output)
        self.last_full = step
        self.recorded += 1

    def _feature(self, key: Key) -> Feature:
        if key not in self.features:
            path, ordinal = key
            raise RuntimeError(
                f"hicache.reference: {path} was called {ordinal + 1} times in a skipped step, {ordinal} "
                "times in the full step before it: there is nothing to forecast from"
            )
        return self.features[key]

    def history(self, key: Key) -> History:
        """That of a submodule that gives one tensor."""
        return self._feature(key).history

    def forecast(self, step: int, key: Key) -> Any:
        """What a submodule would give at a skipped step."""
        feature = self._feature(key)
        position = functools.partial(
            Position, num_steps=self.num_steps, sigmas=self.sigmas, context=self.label
        )
        return feature.forecast(step, position, functools.partial(self.rows.weights, key))
