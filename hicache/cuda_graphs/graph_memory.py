"""What the graphs of one transformer take of a GPU's memory, and whether one more of them fits the budget.

Histories come first: graphs get what those leave of the budget, and are given up for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hicache.cuda_graphs.capture import Captured
from hicache.cuda_graphs.live_bytes import LiveBytes, nbytes
from hicache.stats import GraphStats
from hicache.trees import tensors_of


@dataclass
class Expected:
    """What a graph will take, as the eager call before it tells; bytes."""

    peak: int = 0  # of the pool while it is captured
    held: int = 0  # of that, what the graph gives: other graphs cannot use it


@dataclass
class GraphMemory:
    """The memory of one transformer's graphs, which share a pool.

    What a graph works in is used again by the next one, what it gives is not.

    Args:
        stats: tell the user.
        unlimited: whatever the budget says.
        room: bytes that histories leave of the budget; None: nobody knows.
    """

    stats: GraphStats
    unlimited: bool = False
    room: Callable[[], int | None] = lambda: None
    _held: int = field(default=0, init=False)

    @property
    def scratch(self) -> int:
        """Bytes of the pool that graphs work in: nothing but graphs can use them."""
        return max(0, self.stats.pool_nbytes - self._held)

    def why_not(self, expected: Expected, beside: int = 0) -> str | None:
        """Why there is no room for one more graph; None where there is.

        Args:
            expected: what it takes of the pool.
            beside: bytes beside the pool: of the copies it reads, and of sums of full steps that run eagerly.
        """
        return self._over(max(0, expected.peak - self.scratch) + beside)

    def overdrawn(self) -> str | None:
        """Why the graphs there are are too many; None where they are not."""
        return self._over(0) if self.stats.nbytes else None

    def _over(self, more: int) -> str | None:
        room, wanted = None if self.unlimited else self.room(), self.stats.nbytes + more
        if room is None or wanted <= room:
            return None
        return (
            f"they would take about {wanted:,} bytes, and of memory_budget {max(0, room):,} are left beside "
            "what is cached"
        )

    def took(self, captured: Captured, held: Iterable[Tensor], inputs: int) -> None:
        """A graph has been captured.

        Args:
            captured: it.
            held: tensors of the pool that it keeps.
            inputs: bytes of the copies it reads.
        """
        self.stats.captures += 1
        self.stats.pool_nbytes += max(0, captured.nbytes)
        self.stats.input_nbytes += inputs
        self._held += sum(map(nbytes, held))

    def let_go(self, inputs: int) -> None:
        """A graph with copies of so many bytes is gone; what it had of the pool is for others to come."""
        self.stats.input_nbytes -= inputs

    def clear(self) -> None:
        """All graphs are gone, and with them the pool."""
        self.stats.pool_nbytes = self.stats.input_nbytes = self._held = 0


def expected(memory: LiveBytes, output: Any, sums: Iterable[Tensor] = ()) -> Expected:
    """What a graph will take of what an eager call took.

    Args:
        memory: looked on while it ran.
        output: of the call.
        sums: tensors that it left beside.
    """
    return Expected(memory.reserved, sum(map(nbytes, [*tensors_of(output), *sums])))
