"""Who draws: one process, or workers of a Ray cluster, this machine's or another's.

The queue, the workers and what becomes of lost ones are Ray's (``pip install 'hicache[cluster]'``). A worker
loads the model once, is given one task while it draws another, and sends back bytes: files are written by the
process that started all, so workers need no folder in common with it.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch

from hicache.launch.backends import Backend
from hicache.launch.drawing import Painter
from hicache.launch.loading import Place, load
from hicache.launch.manifest import Made
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture, Task

#: Tasks that a worker has: one that is drawn, one that waits.
_AHEAD: Final = 2
#: Workers that a task may lose before it counts as failed.
_LOSSES: Final = 3
Result = tuple[Picture, Made]


class Workers(Protocol):
    """Draws tasks in any order."""

    count: int

    def draw(self, tasks: Iterator[Task]) -> Iterator[Result]:
        """Every wanted picture, as it comes. Takes tasks as they are needed."""
        ...

    def close(self) -> None:
        """End them."""
        ...


@dataclass(frozen=True)
class Staff:
    """How many draw, and where.

    Args:
        gpus: ``"cpu"``, ``"all"``, numbers divided by commas, or None: the first GPU, or the CPU without one.
        workers: how many; None: one a GPU.
        ray: of a cluster that runs; None: this machine.
        offload: of :data:`hicache.launch.loading.OFFLOADS`.
        threads: of each on a CPU; None: torch's own, of several an equal share of the cores.
    """

    gpus: str | None = None
    workers: int | None = None
    ray: str | None = None
    offload: str = "none"
    threads: int | None = None

    def cards(self) -> list[str]:
        """The GPUs of this machine that draw; none for the CPU.

        Raises:
            ValueError: one of them is not there.
        """
        present = torch.cuda.device_count()
        if self.gpus == "cpu" or (self.gpus is None and not present):
            return []
        if self.gpus is None:
            return ["0"]
        if not present:
            raise ValueError(
                f"--gpus {self.gpus}: this machine has no GPU that torch can use; --gpus cpu draws without"
            )
        if self.gpus == "all":
            return [str(index) for index in range(present)]
        wanted = [part.strip() for part in self.gpus.split(",")]
        for part in wanted:
            if not part.isdigit() or int(part) >= present or wanted.count(part) > 1:
                raise ValueError(
                    f"--gpus: expected cpu, all, or some of 0 … {present - 1} divided by commas, got "
                    f"{self.gpus}"
                )
        return wanted

    def hire(self, settings: Settings, backend: Backend) -> Workers:
        """The workers; none has loaded anything yet.

        Raises:
            ValueError: no such GPU, or a number of workers that cannot be.
            RuntimeError: several are asked for, and Ray is not installed.
        """
        if self.ray is not None:
            return RayWorkers(self, settings, backend, [])
        cards = self.cards()
        count = self.workers or max(1, len(cards))
        if cards and count > len(cards):
            raise ValueError(f"--workers: expected at most one a GPU, {len(cards)}, got {count}")
        if count > 1:
            return RayWorkers(replace(self, workers=count), settings, backend, cards[:count])
        device = f"cuda:{cards[0]}" if cards else "cpu"
        return OneProcess(settings, backend, Place(device, self.offload, self.threads))


class OneProcess:
    """This process draws."""

    count = 1

    def __init__(self, settings: Settings, backend: Backend, place: Place) -> None:
        self._loading = settings, backend, place
        self._painter: Painter | None = None

    def draw(self, tasks: Iterable[Task]) -> Iterator[Result]:
        for task in tasks:
            if self._painter is None:
                settings, backend, place = self._loading
                self._painter = Painter(load(settings, place), settings, backend)
            yield from self._painter.draw(task)

    def close(self) -> None:
        if self._painter is not None:
            self._painter.close()


class _Remote(OneProcess):
    """A process of a cluster that draws."""

    def make(self, task: Task) -> list[Result]:
        """All of a task; the model is loaded at the first."""
        return list(self.draw([task]))


class RayWorkers:
    """Workers of a Ray cluster: one a GPU, or as many as are asked for on CPUs.

    A worker that is lost is started again by Ray; what it had goes to the next that is idle.

    Raises:
        RuntimeError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, staff: Staff, settings: Settings, backend: Backend, cards: list[str]) -> None:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                "more than one worker needs Ray: pip install 'hicache[cluster]'; or leave out --workers, "
                "--ray, and all but one of --gpus"
            ) from error
        self._ray = ray
        self._connect(staff, cards)
        on_gpus = bool(cards) or (staff.ray is not None and staff.gpus != "cpu" and self._gpus())
        self.count = staff.workers or (self._gpus() if on_gpus else 1)
        threads = staff.threads or (None if on_gpus else max(1, (os.cpu_count() or 1) // self.count))
        place = Place("cuda:0" if on_gpus else "cpu", staff.offload, threads)
        actor = ray.remote(num_gpus=1 if on_gpus else 0, num_cpus=1, max_restarts=-1, max_task_retries=0)(
            _Remote
        )
        self._actors = [actor.remote(settings, backend, place) for _ in range(self.count)]

    def _connect(self, staff: Staff, cards: list[str]) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        if staff.ray is not None:
            quiet.pop("include_dashboard")
            where: dict[str, Any] = {"address": staff.ray}
        else:
            # numbers of torch become what the driver knows the cards by
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            known = given.split(",") if given else [str(card) for card in range(torch.cuda.device_count())]
            if cards:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[int(card)] for card in cards)
            # "local": not a cluster that happens to run here
            where = {"address": "local", "num_cpus": staff.workers, "num_gpus": len(cards)}
        try:
            _knock(staff.ray)
            self._ray.init(**where, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            place = "start here" if staff.ray is None else f"reach a cluster at {staff.ray}"
            raise RuntimeError(f"Ray cannot {place}: {error}") from error

    def _gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    def draw(self, tasks: Iterator[Task]) -> Iterator[Result]:
        again: deque[Task] = deque()  # of lost workers
        lost: dict[int, int] = {}
        running: dict[Any, tuple[Task, int]] = {}
        free = deque(list(range(self.count)) * _AHEAD)
        while True:
            while free and (task := again.popleft() if again else next(tasks, None)) is not None:
                worker = free.popleft()
                running[self._actors[worker].make.remote(task)] = task, worker
            if not running:
                return
            [ready], _ = self._ray.wait(list(running))
            task, worker = running.pop(ready)
            free.append(worker)
            try:
                results = self._ray.get(ready)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                first = task.pictures[0].index
                lost[first] = lost.get(first, 0) + 1
                if lost[first] < _LOSSES:
                    again.append(task)
                    continue
                text = f"{_LOSSES} workers were lost drawing it: {' '.join(str(error).split())[:200]}"
                results = [(picture, Made(picture.index, None, {}, text)) for picture in task.keeps()]
            yield from results

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


def _knock(address: str | None) -> None:
    """Find out at once whether anybody listens: Ray itself tries for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
