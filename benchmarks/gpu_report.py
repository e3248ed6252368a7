"""What ``python -m benchmarks.gpu`` collects, and the page it writes."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import checks, kernels, tune
from benchmarks.problems import OPS, SIZES, Size
from hicache_kernels import backend_status
from hicache_kernels.backends import triton
from hicache_kernels.tiles import write_table

_CUDA_SIZES = (
    "FLUX 1024² module", "FLUX 1024² stack", "Wan-14B 720p stack", "Qwen-Image 1328² module", "1Ki", "demo",
    "1Mi", "Qwen-Image 1328² stack", "76 small", "16Mi",
)  # fmt: skip
_COMPILED = ("FLUX 1024² module", "FLUX 1024² stack")
_DRY_SIZES = ("1Ki", "demo")
_TUNE_SIZES = {"cuda": {1: Size(1, 16384, 3072), 76: SIZES["FLUX 1024² module"]}}
_TUNE_SIZES["cpu"] = {1: Size(1, 16, 64), 4: Size(4, 16, 64)}


class Report:
    """Runs the stages on a device and keeps what they found.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run at small sizes.
        where: device, driver and versions, in words.
        native: what came of building the native extension.
        out: folder for the results.
    """

    def __init__(self, device: str, where: str, native: str, out: Path) -> None:
        self.device, self.where, self.native, self.out = device, where, native, out
        self.checks: list[checks.Check] = []
        self.rows: list[kernels.Row] = []
        self.choices: list[tune.Choice] = []
        self.notes: list[str] = []

    @property
    def failed(self) -> list[checks.Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if check.reason is not None]

    def check(self, deadline: float) -> None:
        """Correctness, first of all: a backend that fails a check is not timed."""
        self.checks, left_out = checks.run(self.device, deadline=deadline)
        if left_out:
            self.notes.append(f"{left_out} checks left out: out of time")
        for check in self.failed:
            print(f"FAILED {check.kind}, {check.backend}, {check.what}: {check.reason}", flush=True)

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

    def measure(self, orders: tuple[int, ...], deadline: float) -> None:
        """Time every op at these orders, the sizes that matter most first."""
        wrong = {check.backend for check in self.failed}
        sizes = _CUDA_SIZES if self.device == "cuda" else _DRY_SIZES
        for name in sizes:
            blocks = kernels.measure(
                self.device,
                [name],
                ["bf16", "fp32"],
                orders,
                list(OPS),
                compiled=_COMPILED if self.device == "cuda" else (),
                seconds=1.0,
                deadline=deadline,
                without=wrong,
                left_out=self.notes,
            )
            for block in blocks:
                self.rows += block
                for row in block:
                    print(kernels.line(row), flush=True)

    def tune(self, deadline: float) -> None:
        """Look for tiles faster than the default ones."""
        if (reason := backend_status(self.device)["triton"]) is not None:
            self.notes.append(f"tiles left out: {reason}")
            return
        if any(check.backend == "triton" for check in self.failed):
            self.notes.append("tiles left out: triton failed a check")
            return
        candidates = (*tune.ROW_TILES[:1], *tune.GATED_TILES[:2]) if self.device == "cpu" else None
        self.choices, left_out = tune.tune(
            self.device, _TUNE_SIZES[self.device], deadline, candidates=candidates
        )
        if left_out:
            self.notes.append(f"tiles of {left_out} problems left out: out of time")

    def write(self, spent: list[tuple[str, float]]) -> str:
        """Write all files; the page, as Markdown."""
        kernels.write_csv(self.out / "kernels.csv", self.rows, self.device)
        write_table(self.out / "tiles.json", {choice.key: choice.tile for choice in self.choices})
        lines = [
            f"{'ok' if check.reason is None else 'FAILED'}: {check.kind}, {check.backend}, {check.what}"
            + ("" if check.reason is None else f": {check.reason}")
            for check in self.checks
        ]
        (self.out / "checks.txt").write_text("\n".join(lines) + "\n")
        page = self._page(spent)
        (self.out / "summary.md").write_text(page)
        return page

    def _page(self, spent: list[tuple[str, float]]) -> str:
        kinds = Counter((check.kind, check.backend, check.reason is None) for check in self.checks)
        parts = [
            "# Kernels on this machine",
            f"{self.where}. {self.native}.",
            "Backends: "
            + "; ".join(f"{name}: {why or 'runs'}" for name, why in backend_status(self.device).items())
            + (" (Triton's interpreter)" if triton.interpreted() else ""),
            f"## Correctness: {len(self.checks) - len(self.failed)} of {len(self.checks)} checks passed",
            _table(
                ["check", "backend", "passed", "failed"],
                [
                    [kind, backend, str(kinds[kind, backend, True]), str(kinds[kind, backend, False])]
                    for kind, backend in sorted({(kind, backend) for kind, backend, _ in kinds})
                ],
            ),
            "\n".join(
                f"- FAILED {check.kind}, {check.backend}, {check.what}: {check.reason}"
                for check in self.failed[:20]
            ),
            "## Order 2, bf16",
            "Median of a call (on CUDA after flushing the L2 cache); GB/s of the least bytes; share of the "
            "bandwidth of a copy of as many bytes in the same run.",
            _table(
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
            _table(
                ["key", "measured with", "best", "GB/s", "default GB/s", "tried"],
                [
                    [c.key, c.op, str(c.tile), f"{c.GBps:.0f}", f"{c.default_GBps:.0f}", str(c.tried)]
                    for c in self.choices
                ],
            ),
            "## Left out, and time spent",
            "\n".join(f"- {note}" for note in self.notes) or "Nothing was left out.",
            ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent)
            + f"; written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
            + (f"; peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
               if self.device == "cuda" else "") + ".",
        ]  # fmt: skip
        return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "None."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
