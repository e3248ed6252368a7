"""Where the numbers of a comparison come from: all that somebody needs who wants them again."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import hicache
from hicache.compare.request import Request

PACKAGES: Final = ("torch", "diffusers", "transformers", "triton", "numpy", "scikit-image")


@dataclass(frozen=True)
class Origin:
    """What made a comparison.

    Args:
        model: as it was asked for.
        command: what makes the page again.
        settings: of the runs, by name.
        versions: of the machine and of packages, by name.
        missing: metrics that were not measured, and why.
    """

    model: str
    command: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    missing: Mapping[str, str]


def origin(asked: Request, pipe: Any, missing: Mapping[str, str]) -> Origin:
    """Of a comparison by this pipeline, on this machine."""
    settings = {
        "pipeline": type(pipe).__name__,
        "weights": str(getattr(pipe, "dtype", "unknown")).removeprefix("torch."),
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "steps": str(asked.steps),
        "seeds": f"{asked.seed} – {asked.seed + len(asked.prompt) - 1}",
        **{name: str(value) for name, value in asked.call.items()},
        "order O, σ, warm-up": f"{asked.order}, {asked.sigma}, {asked.warmup}",
        "granularity": asked.cached,
        "backend": asked.backend,
        "pictures together": str(min(asked.batch, len(asked.prompt))),
        "timed rounds": str(asked.repeats),
        **({} if asked.workers is None else {"workers": str(asked.workers)}),
    }
    model = "The bundled model" if asked.model is None else asked.model
    return Origin(model, asked.command(), settings, _versions(pipe), missing)


def _versions(pipe: Any) -> dict[str, str]:
    found = {"hicache": hicache.__version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    device = torch.device(getattr(pipe, "device", "cpu"))
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = f"{_processor()}, {torch.get_num_threads()} threads"
    return found


def _processor() -> str:
    """The processor's name, where the system gives it away."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
