"""Who draws: how many, where, and the one process that does without a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from hicache.launch.backends import Backend
from hicache.launch.drawing import Painter
from hicache.launch.loading import Place, load
from hicache.launch.manifest import Made
from hicache.launch.settings import Settings
from hicache.launch.tasks import Picture, Task

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
