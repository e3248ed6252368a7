"""One run of ``hicache generate``: what is missing is drawn, written, counted."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from hicache.launch.manifest import Made, RunFolder
from hicache.launch.tasks import Picture, Work
from hicache.launch.workers import Workers

_REASONS: Final = 10  # that are told of pictures that failed; done.jsonl has them all
_LAST: Final = 1000  # pictures whose seconds count


@dataclass
class Summary:
    """What a run did.

    Args:
        wanted: pictures in all.
        there: of those, drawn by earlier runs.
    """

    wanted: int
    there: int
    made: int = 0
    failed: int = 0
    reasons: dict[int, str] = field(default_factory=dict)  # index → why, of the first that failed
    # of each picture but the workers' first; of the last ones only, as there may be any number
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    full_steps: int = 0
    skipped_steps: int = 0
    took: float = 0.0  # seconds, loading included
    stopped: bool = False  # by the user

    def add(self, made: Made) -> None:
        """Count a picture."""
        if made.error is not None:
            self.failed += 1
            if len(self.reasons) < _REASONS:
                self.reasons[made.index] = made.error
            return
        self.made += 1
        self.full_steps += made.facts["full_steps"]
        self.skipped_steps += made.facts["skipped_steps"]
        if not made.facts["warmup"]:
            self.seconds.append(made.facts["seconds"])

    @property
    def status(self) -> int:
        """For the shell: 0, 1 where pictures failed, 130 where the user stopped it."""
        return 130 if self.stopped else 1 if self.failed else 0

    def rows(self) -> dict[str, str]:
        """For people."""
        steps = self.full_steps + self.skipped_steps
        rows = {"drawn": str(self.made), "there already": str(self.there), "failed": str(self.failed)}
        rows["not drawn"] = str(self.wanted - self.there - self.made - self.failed)
        if self.made:
            rows["full / all steps"] = f"{self.full_steps} / {steps}"
            rows["bound, steps / full steps"] = f"{steps / max(1, self.full_steps):.2f}x"
            rows["pictures a second"] = f"{self.made / self.took:.3g}"
        if self.seconds:
            rows["seconds a picture, median"] = f"{statistics.median(self.seconds):.3f}"
        return rows


def run(
    work: Work,
    folder: RunFolder,
    hire: Callable[[], Workers],
    progress: Callable[[Summary, Picture], Any] = lambda summary, picture: None,
) -> Summary:
    """Draw what is missing.

    Args:
        work: what is wanted.
        folder: where it goes.
        hire: makes the workers, where there is anything to do.
        progress: called after each picture.

    Raises:
        ValueError, RuntimeError: a model that cannot be loaded, a folder that cannot be written to.
    """
    there = wanted = 0
    for picture in work.pictures():
        wanted += 1
        there += not folder.missing(picture)
    summary, start = Summary(wanted, there), time.perf_counter()
    if there == wanted:
        return summary
    workers = hire()
    try:
        for picture, made in workers.draw(work.tasks(folder.missing)):
            folder.add(picture, made)
            summary.add(made)
            summary.took = time.perf_counter() - start
            progress(summary, picture)
    except KeyboardInterrupt:
        summary.stopped = True
    finally:
        workers.close()
    return summary
