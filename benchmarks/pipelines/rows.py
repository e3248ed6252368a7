"""The rows of ``python -m benchmarks.pipelines``, for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.machine import Place
from benchmarks.common.tables import bullets, markdown, shown


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
    graphs_bytes: int | None  # that CUDA graphs took, their copies of inputs included
    planned_graphs_bytes: int | None  # of them what plan() says


def line(row: Row) -> str:
    """Format a row for a terminal."""
    planned = shown(row.planned_graphs_bytes and row.planned_graphs_bytes / 1e6, ".0f", " MB") or "-"
    parts = [
        f"{row.model:<18} {row.variant:<28}",
        f"{shown(row.seconds, '.3f', ' s'):>11}",
        f"{shown(row.over_uncached, '.2f', 'x'):>7}",
        f"{shown(row.share_of_bound, '.1%', ' of the bound'):>19}",
        f"full {shown(row.full_step_ms, '.2f', ' ms')},",
        f"skipped {shown(row.skipped_step_ms, '.2f', ' ms') or '-'},",
        f"cache {shown(row.cache_ms, '.2f', ' ms') or '-'},",
        f"history {row.history_bytes / 1e6:.1f} MB,",
        f"peak {shown(row.peak_bytes and row.peak_bytes / 1e9, '.2f', ' GB') or '-'},",
        f"graphs {shown(row.graphs_bytes and row.graphs_bytes / 1e6, '.0f', ' MB') or '-'}",
        f"(planned {planned})",
    ]
    return " ".join(parts)


def page(rows: Sequence[Row], left_out: Sequence[str], place: Place) -> str:
    """Write the rows and what was left out as Markdown."""
    header = ["model", "size", "variant", "loop", "over uncached", "bound", "of bound"]
    header += ["full step", "skipped step", "cache", "history", "peak memory", "graphs", "graphs, planned"]
    lines = [
        [
            row.model, row.size, row.variant, shown(row.seconds, ".3f", " s"),
            shown(row.over_uncached, ".2f", "×"), f"{row.bound:.2f}", shown(row.share_of_bound, ".1%"),
            shown(row.full_step_ms, ".2f", " ms"), shown(row.skipped_step_ms, ".3f", " ms"),
            shown(row.cache_ms, ".1f", " ms"), f"{row.history_bytes / 1e6:,.0f} MB",
            shown(row.peak_bytes and row.peak_bytes / 1e9, ".1f", " GB"),
            shown(row.graphs_bytes and row.graphs_bytes / 1e6, ".0f", " MB"),
            shown(row.planned_graphs_bytes and row.planned_graphs_bytes / 1e6, ".0f", " MB"),
        ]
        for row in rows
    ]  # fmt: skip
    settings = {f"{row.steps} steps, N={row.interval}, O={row.order}, w={row.warmup}" for row in rows}
    parts = [
        "# Denoising loops on this machine",
        f"{place}.",
        f"{'; '.join(sorted(settings))}; random weights, no text encoder, no autoencoder. Steps are timed by "
        "themselves, the device idle before and after.",
        markdown(header, lines),
        "## Left out",
        bullets(left_out, "Nothing."),
    ]
    return "\n\n".join(parts) + "\n"
