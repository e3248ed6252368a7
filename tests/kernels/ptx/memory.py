"""Global memory as allocations at addresses, the blocks' shared memory, and parameters.

An access must lie in one allocation, at a multiple of its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.faults import Misaligned, OutOfBounds
from ptx.shadow import Shadow
from ptx.values import Array


@dataclass
class Allocation:
    """Bytes at an address of the device.

    Args:
        holds: whether there is something in them; else reading comes after writing.
        writable: whether a kernel may write there.
    """

    name: str
    address: int
    data: Array = field(repr=False)  # uint8, which a launch changes
    holds: bool = True
    writable: bool = False


class Global:
    """Allocations, side by side in one array, and what was done to them in one launch."""

    def __init__(self, allocations: list[Allocation]) -> None:
        """Raises ValueError when two overlap or there is none."""
        self._all = sorted((a for a in allocations if a.data.size), key=lambda a: a.address)
        if not self._all:
            raise ValueError("expected an allocation")
        self._starts = np.array([a.address for a in self._all], np.int64)
        sizes = np.array([a.data.size for a in self._all], np.int64)
        self._ends = self._starts + sizes
        if (self._starts[1:] < self._ends[:-1]).any():
            raise ValueError(f"allocations overlap: {self._all}")
        self._places = np.cumsum(sizes) - sizes
        self._writable = np.array([a.writable for a in self._all])
        self._data = np.concatenate([a.data for a in self._all])
        self._shadow = Shadow(self._data.size, True)
        for place, allocation in zip(self._places, self._all, strict=True):
            self._shadow.written[place : place + allocation.data.size] = allocation.holds

    def load(self, address: Array, size: int, who: Array) -> Array:
        """``[n, size]`` bytes."""
        at = self._at(address, size, "reads")
        self._shadow.read(at, who)
        return self._data[at]

    def store(self, address: Array, data: Array, who: Array) -> None:
        """Write ``data[n, size]``."""
        at = self._at(address, data.shape[1], "writes", writing=True)
        self._shadow.write(at, who)
        self._data[at] = data

    def peek(self, address: Array, size: int) -> Array:
        """``[n, size]`` bytes, as they are: nobody reads them."""
        return self._data[self._at(address, size, "reads")]

    def copy_back(self) -> None:
        """Leave what was written in the allocations' data."""
        for place, allocation in zip(self._places, self._all, strict=True):
            if allocation.writable:
                allocation.data[:] = self._data[place : place + allocation.data.size]

    def _at(self, address: Array, size: int, verb: str, writing: bool = False) -> Array:
        """Places ``[n, size]`` of the bytes at addresses ``[n]``."""
        begin = address.view(np.int64)
        if (wrong := begin % size != 0).any():
            raise Misaligned(f"{verb} {size} bytes at {begin[wrong][0]:#x}")
        found = np.searchsorted(self._starts, begin, "right") - 1
        wrong = (found < 0) | (begin + size > self._ends[found])
        if writing:
            wrong |= ~self._writable[found]
        if wrong.any():
            first = begin[wrong][0]
            raise OutOfBounds(f"{verb} {size} bytes at {first:#x}, {self._near(int(first))}")
        return (self._places[found] + begin - self._starts[found])[:, None] + np.arange(size)

    def _near(self, address: int) -> str:
        index = int(np.searchsorted(self._starts, address, "right")) - 1
        if index < 0:
            return f"{self._starts[0] - address} bytes before {self._all[0].name}"
        nearest = self._all[index]
        inside = " (read-only)" if address < self._ends[index] and not nearest.writable else ""
        return f"{address - nearest.address} bytes into {nearest.name}{inside} of {nearest.data.size} bytes"


class Shared:
    """``size`` bytes for each block, at addresses from 0 on. A block's memory ends at ``size``."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self._data = np.zeros(blocks * size, np.uint8)
        self.shadow = Shadow(self._data.size, False)

    def load(self, at: Array, who: Array) -> Array:
        self.shadow.read(at, who)
        return self._data[at]

    def store(self, at: Array, data: Array, who: Array) -> None:
        self.shadow.write(at, who)
        self._data[at] = data

    def places(self, block: Array, address: Array, size: int) -> Array:
        """Where bytes ``[n, size]`` of blocks ``[n]`` are, at addresses ``[n]``."""
        begin = address.astype(np.int64)
        if (wrong := begin % size != 0).any():
            raise Misaligned(f"shared memory: {size} bytes at {begin[wrong][0]:#x}")
        if (wrong := (begin < 0) | (begin + size > self.size)).any():
            raise OutOfBounds(f"shared memory: {size} bytes at {begin[wrong][0]:#x} of {self.size}")
        return (block * self.size + begin)[:, None] + np.arange(size)
