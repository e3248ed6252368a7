"""What the cache must know of torch.compile: whether a call is being compiled, and how to have it left alone.

Calls that are learned from are full of decisions; they run eagerly, and the model is compiled as it runs from
the next one on.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


class Compiling:
    """Keeps torch.compile from what runs between :meth:`pause` and :meth:`resume`."""

    def __init__(self) -> None:
        self._paused: Any = None

    def pause(self) -> None:
        """Compiled modules that are entered from here on (blocks, with regional compilation) run eagerly."""
        if self._paused is None:
            self._paused = torch.compiler.set_stance("force_eager")

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        if self._paused is not None:
            self._paused.__exit__(None, None, None)
            self._paused = None

    @staticmethod
    def inside() -> bool:
        """Whether a compiled callable is on the stack: what it calls is compiled, whatever the stance."""
        frame = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False
