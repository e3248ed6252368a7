"""cp.async: bytes on their way from global to shared memory.

A copy arrives when its thread waits for the group it is in. Until then nobody may touch where it goes, nor
change where it comes from; then it is a write of its thread, which others see behind a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.faults import Race, Uninitialised
from ptx.memory import Global, Shared
from ptx.values import Array


@dataclass
class _Copy:
    """What threads copy by one instruction."""

    threads: Array  # [n]
    group: Array  # [n]
    source: Array  # [n] addresses
    read: Array  # [n]: whether bytes come from there, or zeros from nowhere
    data: Array  # [n, size]
    to: Array  # [n, size] places in shared memory

    def only(self, which: Array) -> _Copy:
        return _Copy(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


class Copies:
    """Those of a batch of blocks with ``threads`` threads in all."""

    def __init__(self, threads: int, source: Global, shared: Shared) -> None:
        self._committed = np.zeros(threads, np.int64)  # groups of every thread
        self._global, self._shared = source, shared
        self._moving: list[_Copy] = []
        self._coming = np.zeros(shared.shadow.written.size, bool)

    def begin(self, threads: Array, who: Array, source: Array, read: Array, to: Array) -> None:
        """Threads begin to copy from ``source[n]``, or zeros where not ``read[n]``, to ``to[n, size]``."""
        size = to.shape[1]
        self.refuse(to, "copies to where a copy is still on its way to")
        self._shared.shadow.refuse_write(to, who)
        data = np.zeros(to.shape, np.uint8)
        if read.any():
            data[read] = self._global.load(source[read], size, who[read])
        self._coming[to] = True
        self._moving.append(_Copy(threads, self._committed[threads], source, read, data, to))

    def commit(self, threads: Array) -> None:
        """End a group of each of the threads."""
        self._committed[threads] += 1

    def wait(self, active: Array, who: Array, pending: int | None) -> None:
        """Threads of a mask wait for all groups but the last ``pending``; None: for every copy."""
        moving = []
        for copy in self._moving:
            done = active[copy.threads]
            if pending is not None:
                done = done & (copy.group < self._committed[copy.threads] - pending)
            if done.any():
                self._arrive(copy.only(done), who)
            if not done.all():
                moving.append(copy.only(~done))
        self._moving = moving

    def refuse(self, places: Array, what: str) -> None:
        """Raise where a copy is on its way to one of the places in shared memory."""
        if (coming := self._coming[places]).any():
            raise Uninitialised(f"{what}: byte {places[coming][0]} of shared memory, not waited for")

    def _arrive(self, copy: _Copy, who: Array) -> None:
        source, data = copy.source[copy.read], copy.data[copy.read]
        if (self._global.peek(source, data.shape[1]) != data).any():
            raise Race("waits for a copy whose source was changed under way")
        self._coming[copy.to] = False
        self._shared.store(copy.to, copy.data, who[copy.threads])
