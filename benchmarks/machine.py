"""What a measurement was taken on."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch


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


def versions() -> str:
    """Versions of what was measured and what it ran on."""
    names = ["hicache", "torch", "triton"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"python {platform.python_version()}"])
