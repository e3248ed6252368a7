"""Answers of a device: asked for at once, heard when it has come to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def reading(values: Tensor) -> Callable[..., Any]:
    """What gives the values of a tensor. Does not wait for a CUDA device unless it is told to.

    Args:
        values: of dtype bool or fp32, of any shape.

    Returns:
        A function: as ``values.tolist()``, or None while a CUDA device has not come to them; with
        ``wait=True`` it waits for that.
    """
    if values.device.type != "cuda":
        known = values.tolist()
        return lambda wait=False: known
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def answer(wait: bool = False) -> Any:
        there = copied.query()
        if wait and not there:
            copied.synchronize()
        # the host's own memory, past torch: a mode that is active then may take it for the device's
        return host.numpy().tolist() if there or wait else None

    return answer
