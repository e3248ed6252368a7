"""Calls of one transformer, from any thread, take turns: what is hooked is there once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hicache import compat


class Turns:
    """Whose call of a transformer runs.

    Args:
        module: the transformer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._free = threading.Condition()  # reentrant
        self._thread: int | None = None  # whose turn it is
        self._waiting = 0  # threads

    def take(self) -> bool:
        """Wait for a turn; whether the last one was not given back: an interrupt has ended its call."""
        with self._free:
            self._wait()
            left, self._thread = self._thread is not None, threading.get_ident()
            return left

    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._thread == threading.get_ident()

    def give_back(self) -> None:
        """The next one's turn."""
        with self._free:
            self._thread = None
            if self._waiting:
                self._free.notify_all()  # one of those that wait may be in none(), and take no turn

    @contextmanager
    def none(self) -> Iterator[None]:
        """Wait until no other thread has a turn, and give none in the meantime."""
        with self._free:
            self._wait()
            yield

    def _wait(self) -> None:
        while self._thread not in (None, threading.get_ident()) and self._is_in_its_call():
            self._waiting += 1
            try:
                self._free.wait(timeout=1.0)
            finally:
                self._waiting -= 1

    def _is_in_its_call(self) -> bool:
        assert self._thread is not None
        return compat.is_calling(self._thread, self._module)
