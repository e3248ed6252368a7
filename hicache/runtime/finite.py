"""Whether what a full step made is finite: asked at once, answered when the device has come to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hicache.runtime.reading import reading


class FiniteCheck:
    """NaN or infinity in a full step of one context. Never waits for a CUDA device.

    A feature that is not finite makes the model's output so: the output is looked at, which is small, and of
    the history only what it may have been too narrow for.
    """

    def __init__(self) -> None:
        self._step = 0
        self._answer: Callable[[], bool | None] | None = None  # None: the device has not come to it

    def ask(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Full step ``step`` has ended with these tensors, in place of an earlier one.

        Args:
            step: of the run.
            tensors: of floating dtypes.
        """
        if not tensors:
            self._answer = None
            return
        device = tensors[0].device
        finite = torch.stack([tensor.detach().isfinite().all().to(device) for tensor in tensors]).all()
        self._step, self._answer = step, reading(finite)

    def failed_step(self) -> int | None:
        """The full step that was not finite, told once; None where it was, or nothing is known yet."""
        finite = None if self._answer is None else self._answer()
        if finite is None:
            return None
        self._answer = None
        return None if finite else self._step


def not_finite(context: str, step: int) -> str:
    """What a user is told."""
    return (
        f"gives numbers that are not finite (NaN or infinity) at step {step} of {context}: nothing is "
        "forecast from them, and the next step runs in full"
    )
