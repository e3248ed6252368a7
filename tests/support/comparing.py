"""A small comparison by the bundled model, for tests of its numbers and of its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hicache.compare import metrics
from hicache.compare.origin import Origin, origin
from hicache.compare.page import numbers, page
from hicache.compare.request import Request
from hicache.compare.run import Comparison, compare
from hicache.compare.variants import variants

PROMPTS = ("a red ring on blue", "a green square on yellow", "a white triangle on purple")


def asked(folder: Path, **changes: Any) -> Request:
    """Two modes at two intervals, 12 steps, one round."""
    settings: dict[str, Any] = {
        "prompt": PROMPTS,
        "out": folder / "compare.html",
        "mode": ("hicache", "reuse"),
        "interval": (3, 6),
        "steps": 12,
        "repeats": 1,
        "batch": 2,
        "metrics": ("psnr", "ssim"),
        "call": {"guidance_scale": 4.0},
    }
    return Request(**{**settings, **changes})


def compared(pipe: Any, request: Request, **changes: Any) -> Comparison:
    """Drawn, timed and judged as the command does it."""
    chosen = variants(pipe, request.mode, request.interval, request.steps, request.base, request.cached)
    measuring, _ = metrics.load(request.metrics)
    settings = {"rounds": request.repeats, "granularity": request.cached, **changes}
    return compare(pipe, request.pictures, chosen, measuring, **settings)


def written(
    pipe: Any, request: Request, missing: dict[str, str] | None = None, prompts: tuple[str, ...] = ()
) -> Comparison:
    """The same, with its page and numbers in files; ``prompts`` are shown in place of its own."""
    found = compared(pipe, request)
    found.asked = replace(found.asked, prompts=prompts or request.prompt)
    made: Origin = origin(request, pipe, missing or {})
    request.out.write_text(page(found, made), encoding="utf-8")
    request.numbers.write_text(numbers(found, made), encoding="utf-8")
    return found
