"""Numbers that the host computes, on the device: coefficients and gaps of a run, brought there together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Numbers:
    """Small tensors of host-computed numbers, by value: steps of later runs ask for the same ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[float, ...], Tensor] = {}
        self.nbytes = 0  # of them on the device

    def of(self, rows: Sequence[tuple[float, ...]], like: Tensor) -> list[Tensor]:
        """A tensor a row, of its length, on the device of a history, in the dtype its arithmetic is done in.

        Args:
            rows: numbers; those that are not there yet are brought there together.
            like: the history.
        """
        missing = [row for row in dict.fromkeys(rows) if row not in self._known]
        if missing:
            self._add(missing, like)
        return [self._known[row] for row in rows]

    def _add(self, rows: list[tuple[float, ...]], like: Tensor) -> None:
        dtype = _dtype(like.dtype)
        padded = [(*row, *[0.0] * _padding(len(row), dtype)) for row in rows]
        with torch.inference_mode(False):  # outlives the mode of the run that made it
            numbers = torch.tensor([number for row in padded for number in row], dtype=dtype, device="cpu")
            moved = uploaded(numbers, like.device)
            parts = moved.split([len(row) for row in padded])
        self.nbytes += moved.nbytes
        self._known.update({row: part[: len(row)] for row, part in zip(rows, parts, strict=True)})

    def clear(self) -> None:
        """Forget them: the history has moved."""
        self._known.clear()
        self.nbytes = 0


def numbers_of_rows(rows: Tensor, num_coeffs: int, history: torch.dtype) -> list[Tensor]:
    """Coefficients by feature as kernels take them, all in one allocation.

    Args:
        rows: ``[places, orders, features]``, on the device of the history.
        num_coeffs: at least as many as there are orders; those beyond weigh nothing.
        history: dtype of the history.

    Returns:
        Tensors ``[num_coeffs, features]``, one a place.
    """
    dtype, (places, orders, features) = _dtype(history), rows.shape
    length = num_coeffs * features
    held = rows.new_zeros(places, length + _padding(length, dtype), dtype=dtype)
    made = held[:, :length].unflatten(1, (num_coeffs, features))
    made[:, :orders].copy_(rows)
    return list(made.unbind())


def planned_nbytes(rows: Iterable[tuple[float, ...]], dtype: torch.dtype) -> int:
    """Bytes that numbers of a run take, for a history of this dtype."""
    dtype = _dtype(dtype)
    return sum(len(row) + _padding(len(row), dtype) for row in dict.fromkeys(rows)) * dtype.itemsize


def _dtype(history: torch.dtype) -> torch.dtype:
    return torch.float64 if history == torch.float64 else torch.float32


def _padding(length: int, dtype: torch.dtype) -> int:
    return -length % (16 // dtype.itemsize)  # where a tensor begins decides which code Triton makes for it


def uploaded(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device; on a GPU without waiting for it."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)
