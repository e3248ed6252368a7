"""Makes the workers that are asked for."""

from __future__ import annotations

from dataclasses import replace

from hicache.launch.backends import Backend
from hicache.launch.cluster import RayWorkers
from hicache.launch.loading import Place
from hicache.launch.settings import Settings
from hicache.launch.workers import OneProcess, Staff, Workers


def hire(staff: Staff, settings: Settings, backend: Backend) -> Workers:
    """The workers; none has loaded anything yet.

    Raises:
        ValueError: no such GPU, or a number of workers that cannot be.
        RuntimeError: several are asked for, and Ray is not installed.
    """
    if staff.ray is not None:
        return RayWorkers(staff, settings, backend, [])
    cards = staff.cards()
    count = staff.workers or max(1, len(cards))
    if cards and count > len(cards):
        raise ValueError(f"--workers: expected at most one a GPU, {len(cards)}, got {count}")
    if count > 1:
        return RayWorkers(replace(staff, workers=count), settings, backend, cards[:count])
    device = f"cuda:{cards[0]}" if cards else "cpu"
    return OneProcess(settings, backend, Place(device, staff.offload, staff.threads))
