"""Measures one method for ``python -m benchmarks.peers``, in a process of its own: some leave it changed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.judging import subjects
from benchmarks.common.tables import shown
from benchmarks.peers import rows
from benchmarks.peers.measure import Bench
from benchmarks.peers.table import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--settings", type=float, nargs="+", required=True)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True, help="folder of pictures drawn in full")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # the bits of a picture depend on the number of threads
    full = options.kept / f"{options.model}-{torch.get_num_threads()}-threads.pt"
    bench = Bench(options.model, subjects(options.pictures), full)
    method = METHODS[options.method]
    for setting in options.settings:
        table = rows.read(options.csv)
        old = table.get((method.name, setting))
        if options.operators and old is not None:
            row = bench.counted(method, setting, old)
        else:
            row = bench.row(method, setting, old, options.judge, options.rounds)
        rows.write(options.csv, {**table, row.key: row}.values(), METHODS)
        print(line(row), flush=True)


def line(row: rows.Row) -> str:
    """Format a row for a terminal."""
    start = f"{row.method:<44} {row.knob} {row.setting:<5g}"
    if row.note:
        return f"{start} does not apply: {row.note}"
    cells = (
        shown(row.full_steps, "5.1f", " full"),
        shown(row.blocks_run, "6.1%", " of the blocks"),
        shown(row.psnr_mean, "6.2f", " dB"),
        shown(row.psnr_worst, "6.2f", " worst"),
        shown(row.speedup, "5.2f", "x"),
        shown(row.skipped_ms, "7.2f", " ms"),
        shown(row.skipped_operators, "5.0f", " operators"),
        shown(row.cache_bytes, "10,d", " bytes"),
    )
    return " ".join([start, *cells])


if __name__ == "__main__":
    main()
