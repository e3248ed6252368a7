"""How far the latents of a cached run are from the full run's, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def can_be_watched(pipe: Any) -> bool:
    """Whether a pipeline hands its latents out after each step."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


class Trail:
    """Latents after every step of a full run, kept on the host until :meth:`forget`."""

    def __init__(self) -> None:
        self._latents: list[torch.Tensor] = []

    def keep(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Callback of the full run."""
        self._latents.append(tensors["latents"].detach().float().cpu())
        return tensors

    def of(self, step: int) -> torch.Tensor:
        return self._latents[step]

    def forget(self) -> None:
        """Before the full run of other pictures."""
        self._latents.clear()


class Distance:
    """Squares of latents' distances from a trail, over all pictures."""

    def __init__(self) -> None:
        self._off: list[float] = []
        self._size: list[float] = []

    def against(self, trail: Trail) -> Callback:
        """Callback of a cached run."""

        def add(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            full = trail.of(step)
            if step == len(self._off):
                self._off.append(0.0)
                self._size.append(0.0)
            self._off[step] += float((tensors["latents"].detach().float().cpu() - full).square().sum())
            self._size[step] += float(full.square().sum())
            return tensors

        return add

    def read(self) -> list[tuple[float, float]]:
        """Squares summed, of the error and of the full run's latents: two numbers a step."""
        return list(zip(self._off, self._size, strict=True))
