"""Workers of a Ray cluster, this machine's or another's.

The queue, the workers and what becomes of lost ones are Ray's (``pip install 'hicache[cluster]'``). A worker
loads the model once, is given one task while it draws another, and sends back bytes: files are written by the
process that started all, so workers need no folder in common with it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final

from hicache.launch.actors import Actors
from hicache.launch.backends import Backend
from hicache.launch.manifest import Made
from hicache.launch.settings import Settings
from hicache.launch.tasks import Task
from hicache.launch.workers import OneProcess, Result, Staff

#: Tasks that a worker has: one that is drawn, one that waits.
_AHEAD: Final = 2
#: Workers that a task may lose before it counts as failed.
_LOSSES: Final = 3


class _Remote(OneProcess):
    """A process of a cluster that draws."""

    def make(self, task: Task) -> list[Result]:
        """All of a task; the model is loaded at the first."""
        return list(self.draw([task]))

    def ready(self) -> None:
        """Answers when it is there."""


class Shift:
    """Which worker has which tasks, and which are lost.

    Args:
        count: of workers.
    """

    def __init__(self, count: int) -> None:
        self.running: dict[Any, tuple[int, Task | None]] = {}  # None: a worker's return is waited for
        self.again: deque[Task] = deque()  # of lost workers
        self.away: set[int] = set()
        self._count = count
        self._losses: Counter[int] = Counter()  # by a task's first picture

    def idle(self) -> int | None:
        """The worker that has least to do; None where all have enough."""
        load = Counter(worker for worker, _ in self.running.values())
        here = [worker for worker in range(self._count) if worker not in self.away and load[worker] < _AHEAD]
        return min(here, key=lambda worker: load[worker], default=None)

    def next(self, tasks: Iterator[Task]) -> Task | None:
        """What is to be done next."""
        return self.again.popleft() if self.again else next(tasks, None)

    def give(self, answer: Any, worker: int, task: Task | None) -> None:
        """Note that a worker has a task, or is waited for."""
        self.running[answer] = worker, task

    def take(self, answer: Any) -> tuple[int, Task | None]:
        """The worker and the task of an answer."""
        return self.running.pop(answer)

    def lose(self, worker: int, task: Task) -> bool:
        """Note that a worker was lost with a task; whether that is news: others it had are lost with it.

        What it was drawing is charged with the loss, not what waited behind that.
        """
        if worker in self.away:
            return False
        self.away.add(worker)
        behind = [other for whose, other in self.running.values() if whose == worker and other is not None]
        first = min([task, *behind], key=lambda other: other.pictures[0].index)
        self._losses[first.pictures[0].index] += 1
        return True

    def given_up(self, task: Task, error: Exception) -> Iterator[Result]:
        """The failure of a task that has lost too many workers; else it is to be drawn again."""
        if self._losses[task.pictures[0].index] < _LOSSES:
            self.again.append(task)
            return
        text = f"{_LOSSES} workers were lost drawing it: {' '.join(str(error).split())[:200]}"
        for picture in task.keeps():
            yield picture, Made(picture.index, None, {}, text)


class RayWorkers:
    """Workers of a Ray cluster: one a GPU, or as many as are asked for on CPUs.

    A worker that is lost is started again by Ray; what it had goes to the next that is idle.

    Raises:
        RuntimeError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, staff: Staff, settings: Settings, backend: Backend, cards: list[str]) -> None:
        # what a lost worker had is given to another at once
        self._team = Actors(staff, cards, _Remote, (settings, backend), retries=0)
        self._ray, self._actors, self.count = self._team.ray, self._team.all, self._team.count

    def draw(self, tasks: Iterator[Task]) -> Iterator[Result]:
        """Every wanted picture.

        Raises:
            RuntimeError: no worker is left.
        """
        shift = Shift(self.count)
        while True:
            while (worker := shift.idle()) is not None and (task := shift.next(tasks)) is not None:
                shift.give(self._actors[worker].make.remote(task), worker, task)
            if not shift.running:
                if shift.again:
                    raise RuntimeError("Ray lost all workers, and cannot start one again")
                return
            [ready], _ = self._ray.wait(list(shift.running))
            yield from self._taken(shift, ready)

    def _taken(self, shift: Shift, ready: Any) -> Iterator[Result]:
        """What came of a task, or of waiting for a worker that was lost."""
        worker, task = shift.take(ready)
        exceptions = self._ray.exceptions
        try:
            found = self._ray.get(ready)
        except exceptions.RayTaskError as error:  # of our own code: the same for every picture
            raise error.cause from None
        except exceptions.RayError as error:
            if task is None:
                return  # it does not come back
            if shift.lose(worker, task):
                # the answer comes when Ray has started it again
                again = self._actors[worker].ready.options(max_task_retries=-1).remote()
                shift.give(again, worker, None)
            yield from shift.given_up(task, error)
            return
        if task is None:
            shift.away.discard(worker)
        else:
            yield from found

    def close(self) -> None:
        self._team.close()
