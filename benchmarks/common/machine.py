"""What a measurement was taken on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cpu_name() -> str:
    """The processor's name, as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The device, with its threads (CPU) or its memory (CUDA)."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device's name as the name of a folder: ``NVIDIA H200, 140 GiB`` → ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name.split(",")[0]).lower()).strip("-")


@functools.cache
def driver() -> str:
    """The NVIDIA driver's version, or ``none``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "none"


def versions(*more: str) -> str:
    """Versions of hicache, of what it ran on, and of more packages that were measured."""
    found = []
    for name in ("hicache", "torch", "triton", *more):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return ", ".join([*found, f"python {platform.python_version()}"])


class Place(NamedTuple):
    """What every row of a CSV says about its origin."""

    device: str
    driver: str
    versions: str

    def __str__(self) -> str:
        return f"{self.device}; driver {self.driver}; {self.versions}"


def place(device: str, *more: str) -> Place:
    """Describe the machine, and the versions of what was measured, of ``more`` packages too."""
    return Place(device_name(device), driver(), versions(*more))


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 32 MiB where the system does not say."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM])", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"K": 2**10, "M": 2**20}[unit])
    return max(sizes) or 32 * 2**20


def available_bytes(device: str) -> int:
    """Memory free for a benchmark."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()).group(1)) * 1024  # type: ignore[union-attr]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
