"""Plots of what was measured: ``python -m benchmarks.plots benchmarks/results/kernels-cpu.csv --out DIR``.

From the CSV of ``benchmarks.kernels``: bandwidth against size, and the roofline. From that of
``benchmarks.launches``: operators of a skipped step against the number of features. From that of
``benchmarks.peers``: PSNR against full steps and against seconds. Needs matplotlib (the ``bench`` extra).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.common import command

Rows = Sequence[dict[str, str]]
COLOURS = {
    "native": "tab:blue",
    "triton": "tab:orange",
    "ours": "tab:blue",
    "compiled": "tab:purple",
    "mm": "tab:brown",
    "foreach": "tab:green",
    "eager": "tab:red",
}


def _contestants(rows: Rows, column: str = "backend") -> list[str]:
    found = {row[column] for row in rows}
    return [name for name in COLOURS if name in found]


def _ops(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in rows))


def bandwidth(rows: Rows, dtype: str, order: str = "2") -> Figure:
    """Draw GB/s of the least bytes against those bytes, a panel an op, beside the copy of the same run."""
    rows = [row for row in rows if row["dtype"] == dtype and row["order"] == order]
    ops = _ops(rows)
    across = min(4, len(ops))
    down = -(-len(ops) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(4 * across, 3.2 * down), squeeze=False, sharex=True, sharey=True
    )
    for panel in panels.flat[len(ops) :]:
        panel.set_visible(False)
    for panel, op in zip(panels.flat, ops, strict=False):
        mine = [row for row in rows if row["op"] == op]
        for name in _contestants(mine):
            points = sorted((int(r["bytes"]), float(r["GBps"])) for r in mine if r["backend"] == name)
            panel.plot(*zip(*points, strict=True), marker=".", color=COLOURS[name], label=name)
        copies = sorted({(int(row["bytes"]), float(row["copy_GBps"])) for row in mine})
        panel.plot(*zip(*copies, strict=True), linestyle="--", color="black", label="copy")
        panel.set(xscale="log", yscale="log", title=op)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("least bytes the op moves")
    for panel in panels[:, 0]:
        panel.set_ylabel("GB/s")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f"Order {order}, {dtype}: {rows[0]['device']}", fontsize=10)
    figure.tight_layout()
    return figure


def roofline(rows: Rows) -> Figure:
    """Draw operations a second against operations a byte, at the largest size of every op, order and dtype.

    The slope is the bandwidth of a copy; nothing here comes near a processor's arithmetic.
    """
    largest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["dtype"], row["order"], row["op"], row["backend"])
        if key not in largest or int(row["bytes"]) > int(largest[key]["bytes"]):
            largest[key] = row
    points = list(largest.values())
    figure, panel = plt.subplots(figsize=(8, 4.5))
    markers = dict(zip(_ops(points), "os^vDPX", strict=False))
    for row in points:
        intensity = int(row["flop"]) / int(row["bytes"])
        speed = intensity * float(row["GBps"])
        panel.plot(intensity, speed, markers[row["op"]], color=COLOURS[row["backend"]], markersize=5)
    intensities = [int(row["flop"]) / int(row["bytes"]) for row in points]
    ends = (min(intensities), max(intensities))
    copy = sorted(float(row["copy_GBps"]) for row in points)[len(points) // 2]
    panel.plot(ends, [copy * end for end in ends], "k--")
    handles: list[Any] = [Line2D([], [], linestyle="--", color="black", label=f"copy, {copy:.0f} GB/s")]
    for name in _contestants(points):
        handles.append(Line2D([], [], linestyle="", marker="s", color=COLOURS[name], label=name))
    for op, marker in markers.items():
        handles.append(Line2D([], [], linestyle="", marker=marker, color="grey", label=op))
    panel.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte, of the least bytes",
        ylabel="G operations a second",
        title=f"Roofline: {points[0]['device']}",
    )
    panel.title.set_fontsize(10)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def launches(rows: Rows) -> Figure:
    """Draw the operators of a skipped step against the number of features."""
    ops = _ops(rows)
    figure, panels = plt.subplots(1, len(ops), figsize=(4 * len(ops), 3.4), squeeze=False, sharey=True)
    for panel, op in zip(panels[0], ops, strict=True):
        mine = [row for row in rows if row["op"] == op]
        for name in _contestants(mine, "contestant"):
            points = [(int(r["features"]), int(r["operators"])) for r in mine if r["contestant"] == name]
            panel.plot(*zip(*points, strict=True), marker=".", color=COLOURS[name], label=name)
        panel.set(xscale="log", yscale="log", title=op, xlabel="features")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("torch operators a skipped step")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


# of the packages that benchmarks.peers measures
PACKAGES = {
    "hicache": "tab:blue",
    "diffusers": "tab:green",
    "cache-dit": "tab:red",
    "hicache-pp": "tab:orange",
}


def quality(rows: Rows, column: str, label: str) -> Figure:
    """Draw mean PSNR against what it costs, a line a method, ours that is the default thick.

    Args:
        rows: of ``benchmarks.peers``.
        column: of the cost.
        label: of its axis.
    """
    rows = [row for row in rows if row["psnr_mean"] and row[column]]
    figure, panel = plt.subplots(figsize=(8, 5))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        points = sorted((float(row[column]), float(row["psnr_mean"])) for row in mine)
        package, default = mine[0]["package"], method == "hicache, default"
        panel.plot(
            *zip(*points, strict=True),
            color=PACKAGES[package],
            marker="x" if mine[0]["runs_blocks"] == "True" else ".",
            linewidth=2.5 if default else 0.6,
            alpha=1.0 if default else 0.7,
        )
    handles = [Line2D([], [], color=color, label=package) for package, color in PACKAGES.items()]
    handles.append(Line2D([], [], color="black", linewidth=2.5, label="our default"))
    handles.append(Line2D([], [], color="black", marker="x", label="runs blocks at skipped steps"))
    panel.legend(handles=handles, fontsize=8)
    panel.set(xlabel=label, ylabel="mean PSNR against the full run, dB")
    panel.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def figures(rows: Rows, stem: str) -> dict[str, Figure]:
    """Draw what the CSV holds; return file name → figure.

    Raises:
        ValueError: the rows are of neither benchmark.
    """
    columns = set(rows[0]) if rows else set()
    if {"op", "contestant", "operators"} <= columns:
        return {f"{stem}.png": launches(rows)}
    if {"op", "backend", "GBps", "copy_GBps", "flop"} <= columns:
        dtypes = dict.fromkeys(row["dtype"] for row in rows if row["order"] == "2")
        drawn = {f"{stem}-bandwidth-{dtype}.png": bandwidth(rows, dtype) for dtype in dtypes}
        return {**drawn, f"{stem}-roofline.png": roofline(rows)}
    if {"method", "full_steps", "psnr_mean", "speedup"} <= columns:
        return _of_peers(rows, stem)
    raise ValueError(
        "expected rows of benchmarks.kernels, benchmarks.launches or benchmarks.peers, got columns "
        f"{sorted(columns) or 'of an empty file'}"
    )


def _of_peers(rows: Rows, stem: str) -> dict[str, Figure]:
    """Draw what was measured of it: times may not have been."""
    drawn = {f"{stem}-steps.png": quality(rows, "full_steps", "full steps of 50")}
    share = [
        {**row, "share": str(float(row["seconds"]) / float(row["full_seconds"]))}
        for row in rows
        if row["seconds"]
    ]
    if share:
        drawn[f"{stem}-seconds.png"] = quality(
            share, "share", "seconds of a loop, of those of the uncached one"
        )
    return drawn


def main() -> None:
    parser = command.parser(__doc__, csv=False)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder; default: beside the CSV")
    options = parser.parse_args()
    for path in options.csv:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        folder = options.out or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            drawn = figures(rows, path.stem)
        except ValueError as error:
            raise SystemExit(f"{path}: {error}") from error
        for name, figure in drawn.items():
            # no date and no version inside: the same CSV gives the same file
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            plt.close(figure)
            print(f"saved {folder / name}")


if __name__ == "__main__":
    main()
