"""How torch.compile is kept out of calls that are learned from.

Calls that are learned from are full of decisions; they run eagerly, and the model is compiled as it runs from
the next one on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch

from hicache import compat


class _Setting:
    """A setting of torch.compile, which is the process's: the first to hold sets it, the last restores it."""

    def __init__(self, set_it: Callable[[], Callable[[], Any]]) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._set = set_it  # returns what restores it
        self._restore: Callable[[], Any] | None = None

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._restore = self._set()
            self._holders += 1

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._restore is not None:
                self._restore()
                self._restore = None


def _force_eager() -> Callable[[], Any]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _open_sizes() -> Callable[[], Any]:
    before = compat.take_equal_sizes_for_one(False)
    return lambda: compat.take_equal_sizes_for_one(before)


_EAGER: Final = _Setting(_force_eager)
_OPEN: Final = _Setting(_open_sizes)


class _Hold:
    """Holds a setting, once, until it lets go."""

    _setting: ClassVar[_Setting]

    def __init__(self) -> None:
        self._holding = False

    def hold(self) -> None:
        """Hold the setting."""
        if not self._holding:
            self._holding = True
            self._setting.hold()

    def let_go(self) -> None:
        """Undo :meth:`hold`."""
        if self._holding:
            self._holding = False
            self._setting.let_go()


class CompilePause(_Hold):
    """Keeps torch.compile from what runs between :meth:`hold` and :meth:`let_go`.

    Compiled modules that are entered from there on (blocks, with regional compilation) run eagerly.
    """

    _setting = _EAGER


class OpenSizes(_Hold):
    """What torch.compile compiles between :meth:`hold` and :meth:`let_go` serves pictures of any form."""

    _setting = _OPEN
