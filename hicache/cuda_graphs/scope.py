"""How much of a transformer's calls is captured: everything, skipped steps, single blocks, or nothing."""

from __future__ import annotations

from typing import Final

from hicache.stats import GraphStats

_NOTHING: Final = "nothing of the model runs at skipped steps"


class Scope:
    """What is not captured, each with the reason; None where it is.

    What failed once is not tried again: each time would cost a step.

    Args:
        stats: tell the user.
        skipped_only: whether full steps are to run eagerly.
        full_only: whether skipped steps have nothing to capture.
    """

    def __init__(self, stats: GraphStats, skipped_only: bool, full_only: bool = False) -> None:
        self._stats = stats
        self._full_only = full_only
        self.why_not_full: str | None = None
        self.why_not_whole: str | None = None  # calls as a whole; their blocks are tried alone
        self.why_not_at_all: str | None = None
        if full_only and skipped_only:
            self.leave_out_all(_NOTHING)
        elif full_only:
            stats.partly = f"only full steps are captured: {_NOTHING}"
        elif skipped_only:
            self.leave_out_full("asked for")

    def leave_out_full(self, reason: str) -> None:
        """Full steps run eagerly: their intermediate results would take memory that others need."""
        if self._full_only:
            self.leave_out_all(reason)
            return
        self.why_not_full = reason
        self._stats.partly = f"only skipped steps are captured: {reason}"

    def leave_out_surroundings(self, reason: str) -> None:
        """A call cannot be captured as a whole, maybe for what is before its blocks."""
        if self._full_only:
            self.leave_out_all(reason)
            return
        self.why_not_whole = reason
        if self.why_not_full is None:
            self._stats.partly = f"only its blocks are captured: {reason}"

    def leave_out_all(self, reason: str) -> None:
        """All runs eagerly."""
        if self.why_not_whole is not None and self.why_not_whole not in reason:
            reason += f" (of a block; of the whole call: {self.why_not_whole})"
        self.why_not_at_all = self._stats.eager = reason
        self._stats.partly = None
