"""How torch.compile is kept out of calls that are learned from.

Calls that are learned from are full of decisions; they run eagerly, and the model is compiled as it runs from
the next one on.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch


class _Pause:
    """torch.compile's stance is the process's: the first to pause sets it, the last to resume restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._stance: Any = None

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._holders += 1

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._stance.__exit__(None, None, None)
                self._stance = None


_PAUSE: Final = _Pause()


class CompilePause:
    """Keeps torch.compile from what runs between :meth:`pause` and :meth:`resume`."""

    def __init__(self) -> None:
        self._paused = False

    def pause(self) -> None:
        """Compiled modules that are entered from here on (blocks, with regional compilation) run eagerly."""
        if not self._paused:
            self._paused = True
            _PAUSE.hold()

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        if self._paused:
            self._paused = False
            _PAUSE.let_go()
