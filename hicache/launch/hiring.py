"""Where work is done: in this process, or by workers that are made for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hicache.launch.backends import Backend
from hicache.launch.cluster import RayWorkers
from hicache.launch.loading import Place
from hicache.launch.settings import Settings
from hicache.launch.workers import OneProcess, Staff, Workers


@dataclass(frozen=True)
class Team:
    """Several workers, or those of another cluster.

    Args:
        staff: how many, and where.
        cards: this machine's GPUs that they use.
    """

    staff: Staff
    cards: list[str]


def placed(staff: Staff) -> Place | Team:
    """Where this process works, or who does in its place.

    Raises:
        ValueError: no such GPU, or a number of workers that cannot be.
    """
    if staff.ray is not None:
        return Team(staff, [])
    cards = staff.cards()
    count = staff.workers or max(1, len(cards))
    if cards and count > len(cards):
        raise ValueError(f"--workers: expected at most one a GPU, {len(cards)}, got {count}")
    if count > 1:
        return Team(replace(staff, workers=count), cards[:count])
    return Place(f"cuda:{cards[0]}" if cards else "cpu", staff.offload, staff.threads)


def hire(staff: Staff, settings: Settings, backend: Backend) -> Workers:
    """The workers; none has loaded anything yet.

    Raises:
        ValueError: no such GPU, or a number of workers that cannot be.
        RuntimeError: several are asked for, and Ray is not installed.
    """
    where = placed(staff)
    if isinstance(where, Place):
        return OneProcess(settings, backend, where)
    return RayWorkers(where.staff, settings, backend, where.cards)
