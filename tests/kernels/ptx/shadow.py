"""Who read and wrote every byte since when, and whether anybody did.

A thread is ordered after another of its block once both have been at a barrier: an epoch of the block ends
there. Threads of two blocks are never ordered. Every byte remembers its last writer and its readers, each as
one number: block, epoch, thread.
"""

from __future__ import annotations

import numpy as np

from ptx.faults import Race, Uninitialised
from ptx.values import Array

_EPOCH, _BLOCK = 16, 40  # first bit of each; threads are below
NOBODY = np.int64(-1)
_SEVERAL_THREADS = np.int64((1 << _EPOCH) - 1)  # in place of one: of this block, in this epoch
_SEVERAL_BLOCKS = np.int64((1 << 62) - 1)


def person(block: Array, epoch: Array, thread: Array) -> Array:
    """Block, epoch and thread as one number."""
    return (block.astype(np.int64) << _BLOCK) | (epoch.astype(np.int64) << _EPOCH) | thread


class Shadow:
    """Of ``size`` bytes: who touched them, and which hold something."""

    def __init__(self, size: int, holds: bool) -> None:
        self.written = np.full(size, holds)
        self._writer = np.full(size, NOBODY)
        self._reader = np.full(size, NOBODY)

    def read(self, at: Array, who: Array) -> None:
        """Threads ``who[n]`` read bytes ``at[n, size]``.

        Raises:
            Uninitialised: nobody ever wrote some of them.
            Race: a thread that is not ordered before wrote some of them.
        """
        if not self.written[at].all():
            raise Uninitialised(f"reads memory that nobody wrote: byte {_first(at, ~self.written[at])}")
        who = np.broadcast_to(who[:, None], at.shape)
        self._refuse(self._writer[at], who, at, "reads what {other} wrote")
        seen = self._reader[at]
        stale = (seen >> _BLOCK == who >> _BLOCK) & (seen >> _EPOCH < who >> _EPOCH)
        new = np.where((seen == NOBODY) | stale, who, _together(seen, who))
        self._reader[at] = new
        # two threads at one byte: the last one stands there, until all are in what stands there
        while (missing := _together(seen := self._reader[at], new) != seen).any():
            new = np.where(missing, _together(seen, new), new)
            self._reader[at[missing]] = new[missing]

    def write(self, at: Array, who: Array) -> None:
        """Threads ``who[n]`` write bytes ``at[n, size]``.

        Raises:
            Race: a thread that is not ordered before read or wrote some of them.
        """
        self.refuse_write(at, who)
        who = np.broadcast_to(who[:, None], at.shape)
        self._writer[at] = who
        self._refuse(self._writer[at], who, at, "writes what {other} writes")
        self.written[at] = True

    def refuse_write(self, at: Array, who: Array) -> None:
        """Raise as :meth:`write` does, and remember nothing."""
        who = np.broadcast_to(who[:, None], at.shape)
        self._refuse(self._writer[at], who, at, "writes what {other} wrote")
        self._refuse(self._reader[at], who, at, "writes what {other} read")

    @staticmethod
    def _refuse(other: Array, who: Array, at: Array, what: str) -> None:
        """Raise where another thread was there, of another block or in the same epoch."""
        apart = other ^ who
        race = (other != NOBODY) & (apart != 0) & ((apart >> _BLOCK != 0) | (apart >> _EPOCH == 0))
        if race.any():
            index = tuple(np.argwhere(race)[0])
            raise Race(f"{_named(who[index])} {what.format(other=_named(other[index]))}: byte {at[index]}")


def _together(a: Array, b: Array) -> Array:
    """Both persons as one."""
    same_block = a >> _BLOCK == b >> _BLOCK
    several = np.where(same_block, np.maximum(a, b) | _SEVERAL_THREADS, _SEVERAL_BLOCKS)
    return np.where(a == b, a, several)


def _named(who: np.int64) -> str:
    if who == _SEVERAL_BLOCKS:
        return "threads of several blocks"
    thread = who & _SEVERAL_THREADS
    of = "several threads" if thread == _SEVERAL_THREADS else f"thread {thread}"
    return f"{of} of block {who >> _BLOCK}"


def _first(at: Array, where: Array) -> int:
    return int(at[where][0])
