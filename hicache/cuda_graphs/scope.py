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
        why_not_full: why full steps are to run eagerly; None where they are not.
        full_only: whether skipped steps have nothing to capture.
    """

    def __init__(self, stats: GraphStats, why_not_full: str | None, full_only: bool = False) -> None:
        self._stats = stats
        self._partly: str | None = None  # what of it is captured, where not all is
        self._full_only = full_only
        self.why_not_full: str | None = None
        self.why_not_whole: str | None = None  # calls as a whole; their blocks are tried alone
        self.why_not_at_all: str | None = None
        self._over_budget = False  # in this run
        self.no_room: str | None = None  # in this run, for anything
        self._eager_full = why_not_full
        self._choose()

    def _tell(self, partly: str | None) -> None:
        self._partly = self._stats.partly = partly

    def _choose(self) -> None:
        self.why_not_full = None
        self._tell(None)
        if self._full_only and self._eager_full is not None:
            self.leave_out_all(f"{_NOTHING}, and full steps are not captured: {self._eager_full}")
        elif self._full_only:
            self._tell(f"only full steps are captured: {_NOTHING}")
        elif self._eager_full is not None:
            self.leave_out_full(self._eager_full)

    def start_run(self) -> None:
        """A run starts: its histories may leave more of the budget."""
        self.no_room = None
        if self._over_budget:
            self._over_budget = False
            self._choose()
            if self.why_not_whole is not None:
                self.leave_out_surroundings(self.why_not_whole)
        self._tell(self._partly)

    def leave_out_full(self, reason: str) -> None:
        """Full steps run eagerly: their intermediate results would take memory that others need."""
        if self._full_only:
            self.leave_out_all(reason)
            return
        self.why_not_full = reason
        self._tell(f"only skipped steps are captured: {reason}")

    def over_budget(self, reason: str, all_of_it: bool) -> None:
        """For the rest of the run full steps run eagerly, or all do: there is no room in the budget."""
        self._over_budget = True
        if all_of_it or self._full_only:
            self.no_room = reason
            self._tell(f"nothing more is captured in this run: {reason}")
        else:
            self.leave_out_full(reason)

    def leave_out_surroundings(self, reason: str) -> None:
        """A call cannot be captured as a whole, maybe for what is before its blocks."""
        if self._full_only:
            self.leave_out_all(reason)
            return
        self.why_not_whole = reason
        if self.why_not_full is None:
            self._tell(f"only its blocks are captured: {reason}")

    def leave_out_all(self, reason: str) -> None:
        """All runs eagerly."""
        if self.why_not_whole is not None and self.why_not_whole not in reason:
            reason += f" (of a block; of the whole call: {self.why_not_whole})"
        self.why_not_at_all = self._stats.eager = reason
        self._tell(None)
