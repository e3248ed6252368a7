"""Whether histories may be held: by the budget, and by what is free on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class GraphMemory(Protocol):
    """What is known here of a transformer's CUDA graphs."""

    @property
    def scratch(self) -> int:
        """Bytes that torch has of the device for graphs alone, and counts as not allocated."""


class Graphs(Protocol):
    """The CUDA graphs of a transformer."""

    @property
    def memory(self) -> GraphMemory:
        """What they take."""

    def drop(self) -> None:
        """Forget them, and free their memory."""


class MemoryRoom:
    """Histories come first: graphs go before a run is cached more coarsely.

    Args:
        budget: bytes that a denoiser's histories may take.
        graphs: of the denoiser, if it has some.
        warn: tells the user, once.
    """

    def __init__(self, budget: int, graphs: Graphs | None, warn: Callable[[str], None]) -> None:
        self.budget = budget
        self._graphs = graphs
        self._warn = warn

    def why_not(self, what: str, planned: int, wanted: int, device: torch.device) -> str | None:
        """Why the histories of this run's contexts must not be held; None when they may.

        Args:
            what: is to be held.
            planned: bytes of it.
            wanted: of those, bytes that are not held yet.
            device: that holds them.
        """
        # Where the second context is too much, the first has been recorded in vain; in every such run anew,
        # as nothing of an earlier run may change the picture.
        if planned > self.budget:
            return f"{what}, {planned:,} bytes or more, is over memory_budget={self.budget:,}"
        if wanted <= 0 or device.type != "cuda":  # others do not tell
            return None
        free = self._free(device)
        if wanted > free and self._graphs is not None:
            self._graphs.drop()
            free = self._free(device)
        if wanted <= free:
            return None
        why = f"{what} wants {wanted:,} bytes and {free:,} are free on {device}"
        self._warn(f"is cached more coarsely: {why}")
        return why

    def _free(self, device: torch.device) -> int:
        """Bytes that can be allocated on a GPU."""
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached) - (0 if self._graphs is None else self._graphs.memory.scratch)
