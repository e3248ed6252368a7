"""Answers of a device: asked for at once, heard when it has come to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def reading(flags: Tensor) -> Callable[[], Any]:
    """What gives the values of flags. Never waits for a CUDA device.

    Args:
        flags: of dtype bool, of any shape.

    Returns:
        A function of no arguments: as ``flags.tolist()``, or None while a CUDA device has not come to them.
    """
    if flags.device.type != "cuda":
        known = flags.tolist()
        return lambda: known
    host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flags.device))
    # the host's own memory, past torch: a mode that is active then may take it for the device's
    return lambda: host.numpy().tolist() if copied.query() else None
