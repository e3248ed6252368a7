"""What torch's allocator takes of a GPU for a graph's pool: more than is held there at once.

It asks the device for segments, cuts blocks from them and joins free neighbours, those of one segment only.
So a large tensor may find no place though as many bytes are free. The rules are those of
``CUDACachingAllocator`` (torch 2.11 – 2.13) without ``PYTORCH_CUDA_ALLOC_CONF``.

>>> arena = Arena()
>>> first, second = arena.take(12 << 20), arena.take(12 << 20)
>>> arena.give_back(first)
>>> arena.give_back(second)
>>> block = arena.take(20 << 20)  # neither of the two segments is enough
>>> arena.reserved == (12 + 12 + 20) << 20
True
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 512  # bytes: sizes are rounded up to a multiple
_SMALL: Final = 1 << 20  # up to here tensors share segments of their own
_SMALL_SEGMENT: Final = 2 << 20
_LARGE_SEGMENT: Final = 20 << 20
_OWN_SEGMENT: Final = 10 << 20  # from here on a tensor that finds no place has a segment cut to its size
_ROUND: Final = 2 << 20


@dataclass(eq=False)
class Block:
    """A piece of a segment, and its neighbours there."""

    size: int
    small: bool
    number: int  # in the order of segments: torch takes the lowest address of several that fit
    offset: int = 0
    before: Block | None = None
    after: Block | None = None
    free: bool = False


class Arena:
    """The segments of one pool."""

    def __init__(self) -> None:
        self.reserved = 0  # bytes of all segments
        self._free: dict[bool, list[tuple[int, int, int, Block]]] = {True: [], False: []}
        self._segments = 0

    def take(self, nbytes: int) -> Block:
        """A block for a tensor of so many bytes."""
        size = max(BLOCK, round_up(nbytes, BLOCK))
        small = size <= _SMALL
        free = self._free[small]
        found = bisect.bisect_left(free, (size, -1, -1))
        block = free.pop(found)[-1] if found < len(free) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= BLOCK if small else rest > _SMALL:
            left = Block(rest, small, block.number, block.offset + size, block, block.after)
            if block.after is not None:
                block.after.before = left
            block.size, block.after = size, left
            self._put(left)
        return block

    def give_back(self, block: Block) -> None:
        """Nobody holds the tensor any more."""
        before, after = block.before, block.after
        if before is not None and before.free:
            self._pull(before)
            block.size, block.offset, block.before = block.size + before.size, before.offset, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._pull(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        whole = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        if size >= _OWN_SEGMENT:
            whole = round_up(size, _ROUND)
        self.reserved += whole
        self._segments += 1
        return Block(whole, small, self._segments)

    def _put(self, block: Block) -> None:
        block.free = True
        bisect.insort(self._free[block.small], (block.size, block.number, block.offset, block))

    def _pull(self, block: Block) -> None:
        found = bisect.bisect_left(self._free[block.small], (block.size, block.number, block.offset))
        del self._free[block.small][found]


def round_up(nbytes: int, unit: int) -> int:
    """The least multiple of a unit that is not less."""
    return math.ceil(nbytes / unit) * unit
