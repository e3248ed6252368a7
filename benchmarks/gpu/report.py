"""What ``python -m benchmarks.gpu`` finds: files written as it goes, and a few lines for a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.checks import Check
from benchmarks.common.machine import place
from benchmarks.common.tables import bullets, markdown, write_rows
from benchmarks.kernels.measure import Row
from benchmarks.kernels.tiles import Choice
from hicache_kernels import backend_status
from hicache_kernels.backends import triton
from hicache_kernels.tiles import write_table

_EVERY = 2.0  # seconds between two writings of all files


class Report:
    """Keeps what was found.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        native: what came of building the native extension.
        out: folder for the files.
        sizes: names of the sizes that the terminal is told about.
    """

    def __init__(self, device: str, native: str, out: Path, sizes: Sequence[str] = ()) -> None:
        self.device, self.native, self.out, self.sizes = device, native, out, sizes
        self.place = place(device)
        self.checks: list[Check] = []
        self.rows: list[Row] = []
        self.choices: list[Choice] = []
        self.notes: list[str] = []
        self.spent: list[tuple[str, float]] = []
        self._written = 0.0

    @property
    def failed(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.reason is not None]

    def flush(self) -> None:
        """Write all files, unless that was done a moment ago: a run that is killed leaves what it found."""
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def write(self, finished: bool = False) -> None:
        """Write all files."""
        write_rows(self.out / "kernels.csv", Row, self.rows, self.place)
        write_table(self.out / "tiles.json", {choice.key: choice.tile for choice in self.choices})
        lines = [
            f"{'ok' if check.reason is None else 'FAILED'}: {check.kind}, {check.backend}, {check.what}"
            + ("" if check.reason is None else f": {check.reason}")
            for check in self.checks
        ]
        (self.out / "checks.txt").write_text("\n".join([*lines, ""]))
        (self.out / "summary.md").write_text(self._page(finished))
        self._written = time.monotonic()

    def short(self) -> str:
        """Sum up for a terminal: checks, a few sizes at order 2, tiles, and what was left out."""
        lines = [str(self.place), self.native]
        lines += [
            f"FAILED {c.kind}, {c.backend}, {c.what}: {(c.reason or '')[:200]}" for c in self.failed[:10]
        ]
        lines += [f"note: {note[:200]}" for note in self.notes[:10]]
        if len(self.notes) > 10:
            lines.append(f"note: {len(self.notes) - 10} more notes are in summary.md")
        lines += [f"tile {c.key}: {c.GBps / c.default_GBps:.2f}x with {c.tile}" for c in self.choices]
        problems: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in self.rows:
            if row.order == 2 and row.size in self.sizes:
                problems.setdefault((row.size, row.dtype, row.op), {})[row.backend] = row
        names = ("native", "triton", "mm", "eager", "foreach", "compiled")
        lines.append(f"{'order 2: ms (of a copy)':<55}" + "".join(f"{name:>17}" for name in names))
        for problem, found in problems.items():
            cells = [
                f"{found[name].p50_ms:.4f} ({found[name].share_of_copy:.2f})" if name in found else "-"
                for name in names
            ]
            lines.append(f"{' '.join(problem):<55}" + "".join(f"{cell:>17}" for cell in cells))
        lines.append(
            f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks passed; {self._spent}"
        )
        return "\n".join(lines)

    @property
    def _spent(self) -> str:
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.spent)

    def _page(self, finished: bool) -> str:
        kinds = Counter((check.kind, check.backend, check.reason is None) for check in self.checks)
        parts = [
            "# Kernels on this machine",
            f"{self.place}. {self.native}.",
            "Backends: "
            + "; ".join(f"{name}: {why or 'runs'}" for name, why in backend_status(self.device).items())
            + (" (Triton's interpreter)" if triton.interpreted() else ""),
            f"## Correctness: {len(self.checks) - len(self.failed)} of {len(self.checks)} checks passed",
            markdown(
                ["check", "backend", "passed", "failed"],
                [
                    [kind, backend, str(kinds[kind, backend, True]), str(kinds[kind, backend, False])]
                    for kind, backend in sorted({(kind, backend) for kind, backend, _ in kinds})
                ],
            ),
            bullets(
                (f"FAILED {c.kind}, {c.backend}, {c.what}: {c.reason}" for c in self.failed[:20]),
                "None failed." if self.checks else "None was made.",
            ),
            "## Order 2, bf16",
            "Median of a call (on CUDA after flushing the L2 cache); GB/s of the least bytes; share of the "
            "bandwidth of a copy of as many bytes in the same run.",
            markdown(
                ["size", "op", "backend", "ms", "GB/s", "of copy", "over eager", "in a graph"],
                [
                    [
                        row.size, row.op, row.backend, f"{row.p50_ms:.4f}", f"{row.GBps:.1f}",
                        f"{row.share_of_copy:.2f}",
                        "" if row.over_eager is None else f"{row.over_eager:.2f}×",
                        "" if row.graph_us is None else f"{row.graph_us:.1f} µs",
                    ]
                    for row in self.rows
                    if row.order == 2 and row.dtype == "bf16"
                ],
            ),
            "## Tiles",
            markdown(
                ["key", "measured with", "best", "GB/s", "default GB/s", "tried"],
                [
                    [c.key, c.op, str(c.tile), f"{c.GBps:.0f}", f"{c.default_GBps:.0f}", str(c.tried)]
                    for c in self.choices
                ],
            ),
            "" if finished else "**Not finished**: this is what was found so far.",
            "## Left out, and time spent",
            bullets(self.notes, "Nothing was left out."),
            f"{self._spent}; written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
            + (f"; peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
               if self.device == "cuda" else "") + ".",
        ]  # fmt: skip
        return "\n\n".join(part for part in parts if part) + "\n"
