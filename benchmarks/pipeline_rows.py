"""What ``python -m benchmarks.pipelines`` finds: its rows, for a person, as a CSV and as a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import diffusers

from benchmarks.machine import device_name, driver, versions


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a variant on a model. None: not measured, or nothing to measure."""

    model: str
    size: str
    parameters: int
    dtype: str
    variant: str
    interval: int
    order: int
    warmup: int
    steps: int
    full_steps: int
    loops: int  # timed ones
    seconds: float | None  # of a whole loop, median
    over_uncached: float | None  # how many times faster than the uncached loop, run eagerly
    bound: float  # steps / full steps
    share_of_bound: float | None  # speed-up over the uncached loop, run alike, of the bound
    full_step_ms: float | None  # by itself: nothing else is under way before or after
    skipped_step_ms: float | None
    cache_ms: float | None  # of a whole loop, spent in recording and forecasting
    history_bytes: int
    peak_bytes: int | None  # allocated at most, weights included; CUDA only


def line(row: Row) -> str:
    """A row for a person."""

    parts = [
        f"{row.model:<18} {row.variant:<28}",
        f"{_shown(row.seconds, '.3f', ' s'):>11}",
        f"{_shown(row.over_uncached, '.2f', 'x'):>7}",
        f"{_shown(row.share_of_bound, '.1%', ' of the bound'):>19}",
        f"full {_shown(row.full_step_ms, '.2f', ' ms')},",
        f"skipped {_shown(row.skipped_step_ms, '.2f', ' ms') or '-'},",
        f"cache {_shown(row.cache_ms, '.2f', ' ms') or '-'},",
        f"history {row.history_bytes / 1e6:.1f} MB,",
        f"peak {_shown(row.peak_bytes and row.peak_bytes / 1e9, '.2f', ' GB') or '-'}",
    ]
    return " ".join(parts)


def place(device: str) -> tuple[str, str, str]:
    """Device, driver and versions."""
    return device_name(device), driver(), f"{versions()}, diffusers {diffusers.__version__}"


def write_csv(path: Path, rows: Sequence[Row], device: str) -> None:
    """The rows, and on every one the device, its driver and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = place(device)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(one.name for one in fields(Row)), "device", "driver", "versions"])
        for row in rows:
            values = [f"{value:.5g}" if isinstance(value, float) else value for value in astuple(row)]
            writer.writerow([*values, *where])


def page(rows: Sequence[Row], left_out: Sequence[str], device: str) -> str:
    """The rows and what was left out, as Markdown."""
    name, its_driver, software = place(device)
    header = ["model", "size", "variant", "loop", "over uncached", "bound", "of bound"]
    header += ["full step", "skipped step", "cache", "history", "peak memory"]
    lines = [
        [
            row.model, row.size, row.variant, _shown(row.seconds, ".3f", " s"),
            _shown(row.over_uncached, ".2f", "×"), f"{row.bound:.2f}", _shown(row.share_of_bound, ".1%"),
            _shown(row.full_step_ms, ".2f", " ms"), _shown(row.skipped_step_ms, ".3f", " ms"),
            _shown(row.cache_ms, ".1f", " ms"), f"{row.history_bytes / 1e6:,.0f} MB",
            _shown(row.peak_bytes and row.peak_bytes / 1e9, ".1f", " GB"),
        ]
        for row in rows
    ]  # fmt: skip
    settings = {f"{row.steps} steps, N={row.interval}, O={row.order}, w={row.warmup}" for row in rows}
    parts = [
        "# Denoising loops on this machine",
        f"{name}; driver {its_driver}; {software}.",
        f"{'; '.join(sorted(settings))}; random weights, no text encoder, no autoencoder. Steps are timed by "
        "themselves, the device idle before and after.",
        "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]),
        "## Left out",
        "\n".join(f"- {what}" for what in left_out) or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
