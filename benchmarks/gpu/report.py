"""Collects what ``python -m benchmarks.gpu`` finds, and writes it as it goes."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import checks
from benchmarks.common.machine import place
from benchmarks.common.tables import bullets, markdown, write_rows
from benchmarks.kernels import measure, tiles
from benchmarks.kernels.problems import OPS, SIZES, Size
from hicache_kernels import backend_status
from hicache_kernels.backends import triton
from hicache_kernels.tiles import write_table

# by device: what a model is, timed first; then everything else
FIRST = {"cuda": ("FLUX 1024² module", "FLUX 1024² stack", "Wan-14B 720p stack"), "cpu": ("demo",)}
OTHERS = {
    "cuda": (
        "Qwen-Image 1328² module", "1Ki", "demo", "1Mi", "Qwen-Image 1328² stack", "76 small", "16Mi",
    ),
    "cpu": ("1Ki",),
}  # fmt: skip
_COMPILED = ("FLUX 1024² module", "FLUX 1024² stack")
_EVERY = 2.0  # seconds between two writings of all files
_TUNE_SIZES = {"cuda": {1: Size(1, 16384, 3072), 76: SIZES["FLUX 1024² module"]}}
_TUNE_SIZES["cpu"] = {1: Size(1, 16, 64), 4: Size(4, 16, 64)}


class Report:
    """Runs the stages on a device and keeps what they found.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run at small sizes.
        native: what came of building the native extension.
        out: folder for the results.
    """

    def __init__(self, device: str, native: str, out: Path) -> None:
        self.device, self.native, self.out = device, native, out
        self.place = place(device)
        self.checks: list[checks.Check] = []
        self.rows: list[measure.Row] = []
        self.choices: list[tiles.Choice] = []
        self.notes: list[str] = []
        self.spent: list[tuple[str, float]] = []
        self._plan = checks.core(device)
        self._written = 0.0

    @property
    def failed(self) -> list[checks.Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.reason is not None]

    def check(self, deadline: float, everything: bool = False) -> None:
        """Correctness: what every timing rests on, or ``everything`` that was not checked before.

        A backend that fails a check is not timed.
        """
        if everything:
            self._plan = itertools.chain(self._plan, checks.others(self.device))
        for check in checks.run(self._plan, deadline):
            self.checks.append(check)
            if check.reason is not None:
                print(f"FAILED {check.kind}, {check.backend}, {check.what}: {check.reason}", flush=True)
            self.flush()
        if everything and next(self._plan, None) is not None:
            self.notes.append(f"checks stopped after {len(self.checks)}: out of time")

    def broke_off(self, stage: str, trace: str) -> None:
        """A stage ended in an error: that counts as a failed check, and the other stages go on."""
        print(trace, flush=True)
        self.checks.append(
            checks.Check("stage", "all", stage, f"broke off: {trace.strip().splitlines()[-1]}")
        )

    def sanitized(self, outcome: str) -> None:
        """Note what compute-sanitizer said."""
        self.notes.append(f"compute-sanitizer memcheck: {outcome}")
        if outcome.startswith("FAILED"):
            self.checks.append(checks.Check("compute-sanitizer", "all", "memcheck", outcome))

    def measure(self, sizes: Sequence[str], orders: tuple[int, ...], deadline: float) -> None:
        """Time every op at these sizes and orders, bf16 first."""
        for dtype in ("bf16", "fp32"):
            for name in sizes:
                self._measure([name], [dtype], orders, list(OPS), deadline)

    def compiled(self, deadline: float) -> None:
        """Time ``torch.compile`` too, whose compilations take longer than everything else."""
        if self.device == "cuda":
            ops = list(measure.COMPILED)
            self._measure(_COMPILED, ["bf16"], (2,), ops, deadline, compiled=_COMPILED)

    def _measure(
        self,
        sizes: Sequence[str],
        dtypes: Sequence[str],
        orders: Sequence[int],
        ops: Sequence[str],
        deadline: float,
        compiled: Sequence[str] = (),
    ) -> None:
        wrong = {check.backend for check in self.failed}
        blocks = measure.measure(
            self.device,
            sizes,
            dtypes,
            orders,
            ops,
            compiled=compiled,
            seconds=1.0,
            deadline=deadline,
            without={"native", "triton"} if compiled else wrong,
            left_out=self.notes,
        )
        for block in blocks:
            rows = [row for row in block if not compiled or row.backend == "compiled"]
            self.rows += rows
            for row in rows:
                print(measure.line(row), flush=True)
            self.flush()

    def tune(self, deadline: float) -> None:
        """Look for tiles faster than the default ones."""
        if (reason := backend_status(self.device)["triton"]) is not None:
            self.notes.append(f"tiles left out: {reason}")
            return
        if any(check.backend == "triton" for check in self.failed):
            self.notes.append("tiles left out: triton failed a check")
            return
        candidates = (*tiles.ROW_TILES[:1], *tiles.GATED_TILES[:2]) if self.device == "cpu" else None
        for choice in tiles.tune(self.device, _TUNE_SIZES[self.device], deadline, candidates=candidates):
            self.choices.append(choice)
            print(f"tile {choice.key}: {choice.tile}, {choice.GBps:.0f} GB/s", flush=True)
            self.flush()
        if time.monotonic() > deadline:
            self.notes.append(f"tiles of all problems but {len(self.choices)} left out: out of time")

    def flush(self) -> None:
        """Write all files, unless that was done a moment ago: a run that is killed leaves what it found."""
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def write(self, finished: bool = False) -> None:
        """Write all files."""
        write_rows(self.out / "kernels.csv", measure.Row, self.rows, self.place)
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
        """A few lines for a terminal: checks, the first sizes at order 2, tiles, and what was left out."""
        lines = ["; ".join(self.place), self.native]
        lines += [
            f"FAILED {c.kind}, {c.backend}, {c.what}: {(c.reason or '')[:200]}" for c in self.failed[:10]
        ]
        lines += [f"note: {note[:200]}" for note in self.notes[:10]]
        if len(self.notes) > 10:
            lines.append(f"note: {len(self.notes) - 10} more notes are in summary.md")
        lines += [f"tile {c.key}: {c.GBps / c.default_GBps:.2f}x with {c.tile}" for c in self.choices]
        problems: dict[tuple[str, ...], dict[str, measure.Row]] = {}
        for row in self.rows:
            if row.order == 2 and row.size in FIRST[self.device]:
                problems.setdefault((row.size, row.dtype, row.op), {})[row.backend] = row
        names = ("native", "triton", "eager", "foreach", "compiled")
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
            f"{'; '.join(self.place)}. {self.native}.",
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
