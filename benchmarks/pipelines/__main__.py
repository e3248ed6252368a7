"""Whole denoising loops, uncached and cached, timed in one run: ``python -m benchmarks.pipelines``.

The transformers have their true size and random weights on a GPU, and are small ones of the same classes on a
CPU; there is no text encoder and no autoencoder. Correctness first: with ``interval=1`` the cached loop must
equal the uncached one bit for bit, and replayed graphs the same steps run eagerly. Then whole loops are
timed in turn, after a warm-up each, and the steps of a further loop one by one.

A variant that fails its check is not timed. The clock is watched: a model whose loops do not fit has its
steps timed alone, and what was left out is said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import command
from benchmarks.common.machine import place
from benchmarks.common.tables import write_rows
from benchmarks.pipelines.bench import PARITY_STEPS
from benchmarks.pipelines.measure import Notes, measure
from benchmarks.pipelines.models import MODELS
from benchmarks.pipelines.rows import Row, line, page
from hicache import HiCacheConfig


def run(
    device: str,
    models: Sequence[str],
    config: HiCacheConfig,
    steps: int,
    minutes: float,
    *,
    compiled: bool = False,
    rounds: int = 2,
    csv: Path | None = None,
    markdown: Path | None = None,
) -> Notes:
    """Measure, print and write, model by model: what was found is kept, come what may.

    Returns:
        Notes: what was left out, and what failed.
    """
    deadline = time.monotonic() + 60 * minutes
    where = place(device, "diffusers")
    print(where, flush=True)
    notes, rows = Notes(), list[Row]()
    for block in measure(
        device, models, config, steps, notes, compiled=compiled, rounds=rounds, deadline=deadline
    ):
        for row in block:
            print(line(row), flush=True)
        rows += block
        if csv:
            write_rows(csv, Row, rows, where)
        if markdown:
            markdown.write_text(page(rows, [*notes.failed, *notes.left_out], where))
    return notes


def main() -> None:
    known = {device: list(models) for device, models in MODELS.items()}
    parser = command.parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--models", nargs="+", help=f"default: all, in this order: {known}")
    parser.add_argument("--steps", type=int, default=50, help="of a loop")
    parser.add_argument("--interval", type=int, default=7)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="loops of each variant, at most; medians count")
    parser.add_argument("--compiled", action="store_true", help="also run with compiled blocks")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, about")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    command.require(device)
    models = options.models or known[device]
    if unknown := sorted(set(models) - set(known[device])):
        parser.error(
            f"--models: unknown on {device}: {', '.join(unknown)}; known: {', '.join(known[device])}"
        )
    if options.steps <= PARITY_STEPS or options.rounds < 1:
        parser.error(f"expected --steps > {PARITY_STEPS} and --rounds >= 1")
    notes = run(
        device,
        models,
        HiCacheConfig(interval=options.interval, order=options.order, warmup=options.warmup),
        options.steps,
        options.minutes,
        compiled=options.compiled,
        rounds=options.rounds,
        csv=options.csv,
    )
    if notes.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
