"""What works with what: ``python -m tests.compatibility [--write docs/compatibility.md] [--jobs 2]``.

Tries every situation with each of its models, and prints what came of them, or writes the page. With
``--only`` the rows whose name has a text in it are tried, and printed or put into the page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import torch

from tests.compatibility.checks import Outcome
from tests.compatibility.page import page, read
from tests.compatibility.registry import WRONG, Row, try_out
from tests.compatibility.situations import rows
from tests.compatibility.subjects import MODELS, STEPS

SHARE = 20  # rows that a process takes at a time: those of a model share what is drawn of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--only", help="try rows that have this text in their name, and print them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    wanted = [row for row in rows() if (options.only or "").lower() in row.key.lower()]
    outcomes = run(wanted, options.jobs)
    if options.only and not options.write:
        print(*(f"{key}: {found.text} [{found.cached_by}]" for key, found in outcomes.items()), sep="\n")
    wrong = {key: found for key, found in outcomes.items() if found.text.startswith(WRONG)}
    print(*(f"{key}: {found.text}" for key, found in wrong.items()), sep="\n", file=sys.stderr)
    if wrong:
        return 1
    if options.write:
        options.write.write_text(page({**kept(options), **outcomes}, STEPS))
    elif not options.only:
        print(page(outcomes, STEPS))
    return 0


def kept(options: argparse.Namespace) -> dict[str, Outcome]:
    """The rows of the page as it is, where some only are tried anew."""
    if not options.only:
        return {}
    written = read(options.write.read_text())
    cells = {row.key: (row.situation.name, MODELS[row.model].title) for row in rows()}
    return {key: written[cell] for key, cell in cells.items() if cell in written}


def run(wanted: list[Row], jobs: int) -> dict[str, Outcome]:
    """Try rows in so many processes; outcomes by key, in the rows' order."""
    numbers = {row.key: number for number, row in enumerate(rows())}
    # those of a model together
    order = sorted(wanted, key=lambda row: (row.model, numbers[row.key]))
    shares = [[numbers[row.key] for row in order[at : at + SHARE]] for at in range(0, len(order), SHARE)]
    found: dict[str, Outcome] = {}
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(jobs, prepare) as pool:
        for part in pool.imap_unordered(try_share, shares):
            found |= part
            seconds = time.perf_counter() - began
            print(f"\r{len(found)} of {len(wanted)} rows, {seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {row.key: found[row.key] for row in wanted}


def prepare() -> None:
    """What tests do first, in a process of its own."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def try_share(share: list[int]) -> dict[str, Outcome]:
    """Try the rows of these numbers."""
    every = rows()
    return {every[number].key: try_out(every[number]) for number in share}


if __name__ == "__main__":
    sys.exit(main())
