"""Where a peer is better than the best of ours that costs no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.peers.rows import Row
from benchmarks.peers.table import OURS

Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Win:
    """A setting at which a peer is ahead; ``ours`` is None where nothing of ours costs as little."""

    peer: Row
    ours: Row | None
    by: float  # dB


def no_more_full_steps(ours: Row, peer: Row) -> bool:
    """Whether ours has no more full steps than a peer."""
    assert ours.full_steps is not None
    assert peer.full_steps is not None
    return ours.full_steps <= peer.full_steps + 1e-6


def no_slower(ours: Row, peer: Row) -> bool:
    """Whether ours is at least as fast against its uncached loop."""
    assert ours.speedup is not None
    assert peer.speedup is not None
    return ours.speedup >= peer.speedup


def wins(rows: Iterable[Row], value: Value, affordable: Callable[[Row, Row], bool]) -> list[Win]:
    """Return the settings at which a peer is above the best of ours that costs no more, in the rows' order.

    Args:
        rows: with values of what is compared and of what it costs.
        value: what is compared, the more the better.
        affordable: whether a row of ours costs no more than a peer's.
    """
    rows = [row for row in rows if value(row) is not None]
    ours = [row for row in rows if row.package == OURS]
    found = []
    for peer in rows:
        if peer.package == OURS:
            continue
        rivals = [row for row in ours if affordable(row, peer)]
        best = max(rivals, key=lambda row: value(row) or 0.0, default=None)
        by = (value(peer) or 0.0) - ((value(best) or 0.0) if best else 0.0)
        if by > 0:
            found.append(Win(peer, best, by))
    return found
