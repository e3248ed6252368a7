"""How much the latents change from step to step: computed on the device, read at full steps.

A skipped step launches a few small operations and reads nothing. At a full step the host asks before the
blocks, and looks once they have been launched, while the device has those to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hicache.input_filter import relative
from hicache.runtime.reading import reading
from hicache.schedule import Online
from hicache.trees import tensors_of


class InputWatch:
    """Looks at what the first call of every step is given, for a schedule that decides by it.

    Args:
        online: the schedule's decisions in the run.
    """

    def __init__(self, online: Online) -> None:
        self._online = online
        self._step = -1  # the last one looked at
        self._held: list[Tensor] = []  # its latents, filtered
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # by step, not asked for yet: change and size, fp32

    def see(self, step: int, given: Any) -> None:
        """A call of a step begins.

        Args:
            step: of the run.
            given: the latents: a tensor, or several however nested.

        Raises:
            TypeError: there is none.
        """
        if step == self._step or not self._online.measures(step):
            return
        latents = tensors_of(given)
        if not latents:
            raise TypeError(f"hicache: InputChange: expected latents for the first argument, got {given!r}")
        with torch.no_grad():
            held = [self._online.filtered(tensor, step) for tensor in latents]
            before = self._held if self._step == step - 1 else []
            if [tensor.shape for tensor in before] == [tensor.shape for tensor in held]:
                moved = [new - old for new, old in zip(held, before, strict=True)]
                self._sums[step] = _magnitude(moved), _magnitude(before)
            self._step, self._held = step, held
            if self._online.asks(step):
                self._online.ask(step, self._answer())

    def _answer(self) -> Callable[[], Mapping[int, float]]:
        sums, self._sums = self._sums, {}
        if not sums:
            return dict
        read = reading(torch.stack([number for pair in sums.values() for number in pair]))

        def answer() -> Mapping[int, float]:
            numbers = iter(read(wait=True))
            pairs = zip(numbers, numbers, strict=True)
            return {step: relative(*pair) for step, pair in zip(sums, pairs, strict=True)}

        return answer

    def note(self, step: int) -> None:
        """A step is full."""
        self._online.note(step)

    def end(self, step: int) -> None:
        """A call of a step has ended: what was asked for is looked at now."""
        self._online.end(step)


def _magnitude(tensors: list[Tensor]) -> Tensor:
    """The sum of absolute values, a number in fp32."""
    sums = [
        torch.linalg.vector_norm(tensor, 1, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    total: Tensor = functools.reduce(torch.add, sums)
    return total.float()
