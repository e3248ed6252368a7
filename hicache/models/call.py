"""The current call of a hooked model: what its code asks while it runs, and leaves behind.

Set before the call and read after it by whoever decides (hicache/denoiser.py); in between, code that may be
compiled only reads and writes attributes and tensors. So torch.compile makes one graph of a full step and one
of a skipped step, whatever the step, the context or the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Final

from torch import Tensor, nn

from hicache.engine import Sum

# Under this key a module has the hook that records its output. The same on every module, where torch's
# counter would make each block another one to torch.compile.
TAP: Final[Any] = "hicache"


class Mode(IntEnum):
    """What becomes of a call."""

    OFF = 0  # nothing: it runs uncached
    LEARN = 1  # full, the first of its kind: shapes, layout and order are read and checked
    FULL = 2  # full, as the one it was learned from
    VERIFY = 3  # skipped, the first of its kind: nothing but the blocks must stand between stand-in and head
    SKIP = 4  # skipped


class Call:
    """State of one call of one model."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A call ends, or never came to its end: let go of its tensors."""
        self.mode = Mode.OFF
        self.entered = False  # whether a block has run
        self.left = False  # whether the head has been reached
        # FULL, by stack: memory for the hidden state that enters, and the inbox (which may be the same)
        self.base: Tensor | None = None
        self.slot: Tensor | None = None
        # FULL: the inboxes that are written to
        self.targets: Sequence[Tensor] = ()
        # FULL, by module: sums of terms that several features make up, summed as they come
        self.sums: dict[int, Tensor] = {}
        # SKIP: what the forecast needs
        self.sum: Sum | None = None
        self.gates: Tensor | None = None  # foreseen ones
        # FULL: runs a block, given it and its arguments, where blocks are captured one by one
        self.run_block: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.quiet = False  # compiled, captured or replayed: nothing inside can be timed
        self.between: list[Tensor] = []  # what the model itself adds between its blocks
        # rotary embeddings of the context's last full step, and how many this call has asked for
        self.remembered: list[Any] = []
        self.recalled = 0
