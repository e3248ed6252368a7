"""Calls of one transformer on several streams of a GPU: each one's kernels after those of the call before."""

from __future__ import annotations

from typing import Any

import torch


class StreamOrder:
    """Which stream of a device the last call was on.

    Calls of a transformer share memory that is there once: what graphs read and write, what contexts of one
    form add features up in. Their turns on the host (:class:`~hicache.runtime.turns.Turns`) say nothing of
    the device: streams of two threads run side by side.
    """

    def __init__(self) -> None:
        self._last: Any = None

    def follow(self, device: torch.device) -> None:
        """A call begins on the current stream of a device, and waits there for the one before it."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream
