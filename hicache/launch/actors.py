"""Processes of a Ray cluster, this machine's or another's: alike, one a GPU, or some on CPUs."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from hicache.launch.loading import Place
from hicache.launch.workers import Staff


class Actors:
    """Ray's actors of one class. One that is lost is started again by Ray.

    Args:
        staff: how many, and where.
        cards: this machine's GPUs that they use, of another cluster none.
        kind: their class. What it is made with is ``arguments``, and then the :class:`Place` of each.
        arguments: of the class.
        retries: how often a call is made again whose actor was lost; -1 without end.

    Raises:
        RuntimeError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, staff: Staff, cards: list[str], kind: type[Any], arguments: tuple[Any, ...], retries: int
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                "more than one worker needs Ray: pip install 'hicache[cluster]'; or leave out --workers, "
                "--ray, and all but one of --gpus"
            ) from error
        self.ray = ray
        self._connect(staff, cards)
        on_gpus = bool(cards) or (staff.ray is not None and staff.gpus != "cpu" and self._gpus())
        self.count = staff.workers or (self._gpus() if on_gpus else 1)
        threads = staff.threads or (None if on_gpus else max(1, (os.cpu_count() or 1) // self.count))
        place = Place("cuda:0" if on_gpus else "cpu", staff.offload, threads)
        needs = {"num_gpus": 1 if on_gpus else 0, "num_cpus": 1}
        actor = ray.remote(**needs, max_restarts=-1, max_task_retries=retries)(kind)
        self.all = [actor.remote(*arguments, place) for _ in range(self.count)]

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
            # as urgent as one process would be, which is not what Ray does of itself
            os.environ.setdefault("RAY_worker_niceness", "0")
            # "local": not a cluster that happens to run here
            where = {"address": "local", "num_cpus": staff.workers, "num_gpus": len(cards)}
        try:
            _knock(staff.ray)
            self.ray.init(**where, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            place = "start here" if staff.ray is None else f"reach a cluster at {staff.ray}"
            raise RuntimeError(f"Ray cannot {place}: {error}") from error

    def _gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

    def close(self) -> None:
        """End them, and leave the cluster."""
        for actor in self.all:
            self.ray.kill(actor)
        self.ray.shutdown()


def _knock(address: str | None) -> None:
    """Find out at once whether anybody listens: Ray itself tries for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
